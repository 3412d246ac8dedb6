"""Distillation: DeiT's and big_vision's losses, the step on any topology, and whole runs."""

import json
import shutil

import jax
import ml_collections
import modules
import numpy as np
import optax
import pytest
import small

from vit_jax import data, losses, models, sharding, steps, train
from vit_jax import state as state_lib
from vit_jax.errors import UserError
from vit_jax.export import onnx, pytorch
from vit_jax.inference import model_folder
from vit_jax.inference.onnx import OnnxClassifier

RNG = np.random.default_rng(0)
CLASSES = 3
VIT = {
    'num_classes': CLASSES, 'patches': {'size': (8, 8)}, 'hidden_size': 8,
    'transformer': {
        'mlp_dim': 8, 'num_heads': 2, 'num_layers': 1,
        'dropout_rate': 0.0, 'attention_dropout_rate': 0.0,
    },
}  # fmt: skip


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def deit(kind, both, teacher, label, alpha, tau):
    """DeiT's `DistillationLoss`, in NumPy."""
    of_class, of_token = both[:, 0], both[:, 1]
    rows = np.arange(len(label))
    base = -log_softmax(of_class)[rows, label].mean()
    if kind == 'soft':  # F.kl_div(..., reduction='sum', log_target=True) * (T * T) / numel
        ours, theirs = log_softmax(of_token / tau), log_softmax(teacher / tau)
        told = (np.exp(theirs) * (theirs - ours)).sum() * tau * tau / of_token.size
    else:
        told = -log_softmax(of_token)[rows, teacher.argmax(1)].mean()
    return base * (1 - alpha) + told * alpha


@pytest.mark.parametrize('kind', ['hard', 'soft'])
def test_losses_are_those_of_deit(kind):
    both, teacher = RNG.normal(0, 3, (6, 2, CLASSES)), RNG.normal(0, 3, (6, CLASSES))
    label = RNG.integers(0, CLASSES, 6).astype(np.int32)
    batch = {'label': label, 'teacher': teacher.astype(np.float32)}
    loss_fn = losses.distillation(losses.cross_entropy(), kind, alpha=0.3, temperature=2.5)
    loss, metrics = loss_fn(both.astype(np.float32), batch, None)
    np.testing.assert_allclose(loss, deit(kind, both, teacher, label, 0.3, 2.5), rtol=1e-5)
    right = (both[:, 0].argmax(-1) == label).mean()
    np.testing.assert_allclose(metrics['accuracy_train'], right)


def test_the_patient_loss_is_that_of_big_vision():
    """`dist(student, teacher, 'kl', t=t)`: cross-entropy less the teacher's entropy, times t^2."""
    student, teacher, t = RNG.normal(0, 3, (6, CLASSES)), RNG.normal(0, 3, (6, CLASSES)), 2.0
    shares = np.exp(log_softmax(teacher / t))
    cross = -(shares * log_softmax(student / t)).sum(-1)
    entropy = -(shares * np.log(shares)).sum(-1)
    batch = {'label': np.zeros(6, np.int32), 'teacher': teacher.astype(np.float32)}
    loss_fn = losses.distillation(losses.cross_entropy(), 'patient', temperature=t)
    loss, _ = loss_fn(student.astype(np.float32), batch, None)
    np.testing.assert_allclose(loss, (t**2 * (cross - entropy)).mean(), rtol=1e-5)


def test_both_heads_are_what_the_mean_is_of():
    model = models.VisionTransformer(**VIT, distilled=True)
    images = RNG.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    params = modules.params_of(model, images, scale=0.3, train=False)
    both = model.clone(both_heads=True).apply({'params': params}, images, train=False)
    assert both.shape == (2, 2, CLASSES) and np.abs(both[:, 0] - both[:, 1]).max() > 0.01
    mean = model.apply({'params': params}, images, train=False)
    np.testing.assert_array_equal(mean, (both[:, 0] + both[:, 1]) / 2)


def random_params(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: np.asarray(p) + rng.normal(0, 0.3, p.shape).astype(np.float32),
        state_lib.init_params(model, 16, seed=0),
    )


def one_step(devices=1, fsdp=1, accum_steps=1):
    """Parameters of a student after two steps, mirrored images and all."""
    student = models.VisionTransformer(**VIT, distilled=True, both_heads=True)
    teacher = models.VisionTransformer(**VIT)
    params, taught = random_params(student, 1), random_params(teacher, 2)
    rng, tx = np.random.default_rng(3), optax.sgd(0.1)
    batch = {
        'image': rng.uniform(0, 255, (8, 16, 16, 3)).astype(np.float32),
        'label': rng.integers(0, CLASSES, 8).astype(np.int32),
        'position': np.arange(8, dtype=np.int32),
    }
    mesh = sharding.create_mesh(fsdp, jax.devices()[:devices])
    state = state_lib.create_state(params, tx, mesh)
    places = sharding.state_sharding(taught, mesh)
    step = steps.make_train_step(
        student, tx, None, mesh, sharding.state_sharding(state, mesh), seed=0,
        accum_steps=accum_steps, loss_fn=losses.distillation(losses.cross_entropy(), 'hard'),
        teacher=teacher, teacher_shardings=places,
    )  # fmt: skip
    on_devices = sharding.put_tree(taught, places)
    new, metrics = step(state, sharding.put_batch(batch, mesh), on_devices)
    again, _ = step(new, sharding.put_batch(batch, mesh), on_devices)  # it is not donated
    return jax.device_get((again.params, metrics))


def test_a_step_is_the_same_on_any_topology(monkeypatch):
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)
    params, metrics = one_step()
    for devices, fsdp, accum_steps in ((4, 1, 2), (4, 4, 1)):
        other, its = one_step(devices, fsdp, accum_steps)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), other, params)
        np.testing.assert_allclose(its['train_loss'], metrics['train_loss'], rtol=1e-5)


PIXELS = np.random.RandomState(0).randint(0, 256, (40, 16, 16, 3)).astype(np.uint8)
LABELS = np.random.RandomState(1).randint(0, 3, 40)
NAMES = ('cat', 'dog', 'cow')


def make_config(distilled=False, **changes) -> ml_collections.ConfigDict:
    if distilled:
        changes |= {'model.distilled': True, 'model.classifier': 'token'}
    return small.run_config(**{'eval_every': 6, 'base_lr': 0.01, **changes})


def run(config, workdir, callbacks=(), names=NAMES, loss_fn=None):
    sources = tuple(
        data.from_arrays(PIXELS[part], LABELS[part], names) for part in (slice(30), slice(30, 40))
    )
    return train.train_and_evaluate(
        config, workdir, sources=sources, callbacks=callbacks, loss_fn=loss_fn
    )


class Stop:
    def on_step(self, step, state, metrics):
        if step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('teacher') / 'run'
    run(make_config(), workdir)
    return str(workdir / 'model')


@pytest.fixture(scope='module')
def student(teacher, tmp_path_factory):
    """Config, folder and parameters of a finished run."""
    knobs = {'teacher': teacher, 'distillation': 'hard', 'mixup': 0.2}
    config = make_config(distilled=True, **knobs)
    workdir = tmp_path_factory.mktemp('student') / 'run'
    return config, workdir, jax.device_get(run(config, workdir))


def test_a_student_learns_from_a_model_folder_and_survives_a_stop(teacher, student, tmp_path):
    config, workdir, whole = student
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, [Stop()])
    again = jax.device_get(run(config, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert set(whole) >= {'head', 'head_dist', 'dist'}
    log = (workdir / 'train.log').read_text()
    assert f'teacher: {teacher}' in log and "config.distillation='hard'" in log
    opened = model_folder.load(workdir / 'model')
    assert opened.model.distilled and not opened.model.both_heads


def test_a_teacher_that_was_replaced_meanwhile_is_noticed(teacher, tmp_path):
    folder = tmp_path / 'teacher'
    shutil.copytree(teacher, folder)
    config = make_config(teacher=str(folder), distillation='patient')
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / 'run', [Stop()])
    opened = model_folder.load(folder)
    params = jax.tree.map(np.array, opened.params)
    params['head']['bias'][0] += 1
    told = {'class_names': opened.class_names, 'preprocess': opened.preprocess, 'source': {}}
    model_folder.save(folder, params, model_config=opened.model_config, **told)
    with pytest.raises(UserError, match='the model that config.teacher names is another than when'):
        run(config, tmp_path / 'run')
    shutil.rmtree(folder)
    shutil.copytree(teacher, folder)  # as it was
    assert run(config, tmp_path / 'run') is not None


def test_a_student_is_converted_and_exported_with_both_heads(student, tmp_path):
    opened = model_folder.load(student[1] / 'model')
    pixels = RNG.uniform(0, 255, (3, 16, 16, 3)).astype(np.float32)
    inputs = pixels / 127.5 - 1
    expected = np.asarray(modules.apply(opened.model, opened.params, inputs))
    onnx.save(onnx.build(opened), tmp_path / 'a.onnx')
    found = OnnxClassifier(tmp_path / 'a.onnx').logits(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    pytorch.write(tmp_path / 'a.npz', opened, to='npz')
    again = model_folder.load(tmp_path / 'a.npz')
    found = modules.apply(again.model, again.params, inputs)
    np.testing.assert_array_equal(found, expected)
    torch = pytest.importorskip('torch')
    theirs = torch.tensor(inputs.transpose(0, 3, 1, 2))
    transformers = pytest.importorskip('transformers')
    pytorch.write(tmp_path / 'hf', opened, to='huggingface')
    model = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / 'hf')
    with torch.no_grad():
        np.testing.assert_allclose(model(theirs).logits, expected, atol=1e-5)
    timm = pytest.importorskip('timm')
    pytorch.write(tmp_path / 'timm', opened, to='timm')
    model = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True).eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(theirs), expected, atol=1e-5)


def test_a_patient_student_comes_near_its_teacher(teacher, tmp_path):
    knobs = {'teacher': teacher, 'distillation': 'patient', 'distillation_temperature': 2.0}
    rarely = {'eval_every': 60, 'checkpoint_every': 60}
    run(make_config(total_steps=60, **rarely, **knobs), tmp_path / 'run')
    lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
    found = [json.loads(line)['train_loss'] for line in lines if 'train_loss' in line]
    assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5])


def test_teachers_that_do_not_fit_are_refused(teacher, tmp_path):
    knobs = {'teacher': teacher, 'distillation': 'patient'}
    for changes, options, message in (
        ({}, {'names': ('dog', 'cat', 'cow')}, "calls class 0 'cat', and this data 'dog'"),
        ({}, {'names': ('a', 'b', 'c', 'd')}, 'tells 3 classes, and the student .* 4 classes'),
        ({}, {'loss_fn': losses.softmax_cross_entropy}, 'no effect on a loss_fn of your own'),
        ({'pp.crop': 24}, {}, 'sees 16 px, and the student 24'),
        ({'distillation': 'hard'}, {}, 'distillation token, which this model does not have'),
        ({'teacher': str(tmp_path / 'nothing')}, {}, 'nothing'),
    ):
        with pytest.raises(UserError, match=message):
            run(make_config(**(knobs | changes)), tmp_path / 'run', **options)
    assert not (tmp_path / 'run/checkpoints').exists()
