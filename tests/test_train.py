"""Whole runs: what comes out, resuming, speed of the loop's mechanics."""

import json
import logging
import pathlib

import jax
import ml_collections
import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax import data, loop, models, sharding, steps, train
from vit_jax import state as state_lib
from vit_jax.analysis import run_files
from vit_jax.checkpoint import npz
from vit_jax.configs import digits
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.export import pytorch
from vit_jax.inference import model_folder, predict
from vit_jax.run import initial_weights, resume

TINY = {'mlp_dim': 32, 'num_heads': 2, 'num_layers': 1, 'dropout_rate': 0.0}


def make_config(**changes) -> ml_collections.ConfigDict:
    """Digits with a model that compiles in a moment; 12 steps on 4 devices."""
    config = digits.get_config()
    config.report = False
    config.model.hidden_size = 16
    config.model.transformer.update(TINY)
    config.pp.crop, config.pp.resize, config.model.patches.size = 16, 18, (8, 8)
    config.batch, config.batch_eval, config.total_steps, config.warmup_steps = 32, 100, 12, 2
    config.progress_every, config.eval_every, config.checkpoint_every = 2, 6, 6
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config)


def lines(workdir, name='metrics.jsonl'):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """One run from start to end, whose output several tests look at."""
    tmp_path = tmp_path_factory.mktemp('run')
    config = make_config(report=True)
    params = train.train_and_evaluate(config, tmp_path / 'run')
    return config, tmp_path / 'run', jax.device_get(params)


def test_a_run_leaves_what_it_promises(finished):
    config, workdir, params = finished
    metrics = lines(workdir)
    training = [line for line in metrics if 'train_loss' in line]
    assert [line['step'] for line in training] == [1, 2, 4, 6, 8, 10, 12]
    assert '</html>' in (workdir / 'report.html').read_text()
    assert set(training[0]) == {'step', 'train_loss', 'accuracy_train', 'lr', 'gradient_norm'}
    testing = [line for line in metrics if 'accuracy_test' in line]
    assert [line['step'] for line in testing] == [6, 12]
    assert set(testing[0]) == {'step', 'accuracy_test', 'loss_test', 'accuracy_top5_test'}
    timing = lines(workdir, 'timing.jsonl')
    assert timing[0]['step'] == 1 and timing[0]['first_step_s'] > 0
    speeds = [line for line in timing if 'img_sec_core_train' in line]
    assert all(line['img_sec_core_train'] > 0 and 0 <= line['data_wait'] <= 1 for line in speeds)
    assert [line['step'] for line in timing if 'img_sec_core_test' in line] == [6, 12]
    assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == ['12', '6']
    log = (workdir / 'train.log').read_text()
    places = [log.index(words) for words in (
        'model: ', 'data: ', 'workdir: ', 'compiling the training step', 'memory: ', 'weights: ',
        'step 1/12', 'step 6: test accuracy', 'model folder: ', 'writing the report', 'report: ',
    )]  # fmt: skip
    assert places == sorted(places)
    run = run_files.read(workdir)
    assert run.finished and not run.stopped and run.resumes() == [] and run.notes == ()
    assert run.device['devices'] == 4 and run.device['dtype'] == 'float32'
    assert [event['step'] for event in run.happened('evaluated', 'saved_model')] == [
        6,
        12,
        12,
    ]
    assert len(log.splitlines()) >= len(run.events)
    assert json.loads((workdir / 'config.json').read_text())['batch'] == 32
    assert 'jax' in (workdir / 'versions.json').read_text()
    assert list(workdir.glob('events.out.tfevents.*'))
    assert config.model.model_name in log

    saved = npz.open_file(workdir / 'model/params.npz').read()
    jax.tree.map(np.testing.assert_array_equal, saved, dict(params))


def test_the_model_folder_predicts_as_the_run_evaluated(finished):
    """Through files on disk: the product has weights, classes and preprocessing of the run."""
    from PIL import Image

    _, workdir, _ = finished
    model = model_folder.load(workdir / 'model')
    assert model.class_names == tuple('0123456789')
    _, test = sources.open_sources('digits', train_split='train[:80%]', test_split='train[80%:]')
    examples = [test[i] for i in range(len(test))]
    paths = []
    for place, example in enumerate(examples):
        paths.append(workdir.parent / f'{place}.png')
        Image.fromarray(example.image).save(paths[-1])
    found = [p.argmax() for _, p in predict.predict(model, paths)]
    accuracy = np.mean([a == b.label for a, b in zip(found, examples, strict=True)])
    assert accuracy == pytest.approx(lines(workdir)[-1]['accuracy_test'], abs=1e-9)


def test_a_finished_run_started_again_does_nothing(finished, capsys):
    config, workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}
    assert train.train_and_evaluate(config, workdir) is None
    assert 'this run is finished (12 steps)' in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()} == before


def test_more_steps_for_a_finished_run_are_refused_with_what_to_do(finished, tmp_path):
    _, workdir, _ = finished
    with pytest.raises(UserError) as error:
        train.train_and_evaluate(make_config(total_steps=24), workdir)
    text = str(error.value)
    assert 'total_steps: 12 -> 24' in text and 'learning rate' in text
    assert f'--config.pretrained={workdir / "model"} --config.keep_head=True' in text
    # What it says to do does it.
    changes = {
        'total_steps': 2,
        'warmup_steps': 1,
        'pretrained': str(workdir / 'model'),
        'keep_head': True,
    }
    train.train_and_evaluate(make_config(**changes), tmp_path / 'further')
    first, last = (lines(folder)[-1] for folder in (tmp_path / 'further', workdir))
    assert first['accuracy_test'] > last['accuracy_test'] - 0.1


def test_an_interrupted_run_ends_like_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    """Stopped at step 10, with a checkpoint of step 6: no line is missing, none is there twice."""
    _, whole, params = finished
    original = loop._report_progress

    def stop_at_ten(run, step, *rest):
        original(run, step, *rest)
        if step == 10:
            raise KeyboardInterrupt

    config = make_config()
    with monkeypatch.context() as patch:
        patch.setattr(loop, '_report_progress', stop_at_ten)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(config, tmp_path / 'run')
    assert lines(tmp_path / 'run')[-1]['step'] == 10
    resumed = jax.device_get(train.train_and_evaluate(config, tmp_path / 'run'))
    jax.tree.map(np.testing.assert_array_equal, resumed, params)
    assert (tmp_path / 'run/metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
    assert 'resumed from step 6' in (tmp_path / 'run/train.log').read_text()
    assert run_files.read(tmp_path / 'run').resumes() == [6]


def test_own_arrays_train_as_the_dataset_they_are_from(finished, tmp_path):
    _, whole, params = finished
    given = []
    for named in sources.open_sources(
        'digits', train_split='train[:80%]', test_split='train[80%:]'
    ):
        examples = [named[i] for i in range(len(named))]
        images, labels = [e.image for e in examples], [e.label for e in examples]
        given.append(data.from_arrays(images, labels, named.class_names))
    config = make_config()
    found = train.train_and_evaluate(config, tmp_path / 'run', sources=tuple(given))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), params)
    assert (tmp_path / 'run/metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_threads_and_cache_change_nothing(finished, tmp_path):
    _, whole, params = finished
    config = make_config(data_threads=1, cache=0.01)
    found = jax.device_get(train.train_and_evaluate(config, tmp_path / 'run'))
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert (tmp_path / 'run/metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_training_on_approximate_pixels(finished, tmp_path, monkeypatch):
    """8 bits in training, exact ones in evaluation."""
    seen = set()
    original = sharding.put_batch

    def put(batch, mesh):
        seen.add(('readable' if 'readable' in batch else 'position', str(batch['image'].dtype)))
        return original(batch, mesh)

    monkeypatch.setattr(sharding, 'put_batch', put)
    workdir = tmp_path / 'run'
    train.train_and_evaluate(make_config(**{'pp.exact': False}), workdir)
    assert seen == {('position', 'uint8'), ('readable', 'float32')}
    losses, exact = (
        [line['train_loss'] for line in lines(folder) if 'train_loss' in line]
        for folder in (workdir, finished[1])
    )
    # Pixels are rounded to whole grey levels, and otherwise those of the exact run.
    np.testing.assert_allclose(losses, exact, rtol=1e-3)
    assert losses != exact
    first, second = (model_folder.load(folder / 'model') for folder in (workdir, finished[1]))
    assert first.preprocess == second.preprocess
    with pytest.raises(UserError, match='pp.exact: false -> true'):
        resume.check_config(workdir / 'config.json', finished[0].to_dict())


def test_nothing_compiles_after_the_first_step_and_evaluation(tmp_path, monkeypatch):
    """Every function compiles once; transfers are explicit (the loop disallows others itself)."""
    made = []

    def keep(make):
        def wrapped(*args, **kwargs):
            made.append(make(*args, **kwargs))
            return made[-1]

        return wrapped

    monkeypatch.setattr(steps, 'make_train_step', keep(steps.make_train_step))
    monkeypatch.setattr(steps, 'make_eval_step', keep(steps.make_eval_step))
    compiled = []

    class Listen(logging.Handler):
        def emit(self, record):
            if 'Finished XLA compilation' in record.getMessage():
                compiled.append(record.getMessage())

    marks = []
    original = loop.Loop._evaluate

    def mark(*args):
        result = original(*args)
        marks.append(len(compiled))
        return result

    monkeypatch.setattr(loop.Loop, '_evaluate', mark)
    logger, handler = logging.getLogger('jax._src.dispatch'), Listen()
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            config = make_config(eval_every=4, checkpoint_every=100)
            train.train_and_evaluate(config, tmp_path / 'run')
    finally:
        logger.removeHandler(handler)
    assert len(marks) == 3 and marks[0] > 2
    assert marks[0] == marks[-1], compiled[marks[0] :]
    # The training step is compiled ahead, once, and never by a call.
    alone = [getattr(function, '_alone', function) for function in made]  # `steps._Program`
    assert [function._cache_size() for function in alone] == [0, 1]
    assert len([message for message in compiled if 'jit(train_step)' in message]) == 1


def test_loss_goes_down_on_real_photos(shared_dir, tmp_path):
    """Folders with their own train/ and test/, a preprocessed size, and the ViT of the digits."""
    config = make_config(
        **{
            'dataset': str(shared_dir / 'data/flowers_folder'),
            'pp.resize': 0,
            'pp.inception_crop': True,
            'pp.crop': 32,
            'total_steps': 100,
            'eval_every': 100,
            'checkpoint_every': 100,
        },
    )
    train.train_and_evaluate(config, tmp_path / 'run')
    losses = [line['train_loss'] for line in lines(tmp_path / 'run') if 'train_loss' in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.1
    model = model_folder.load(tmp_path / 'run/model')
    assert model.class_names == ('daisy', 'dandelion', 'roses', 'sunflowers', 'tulips')
    log = (tmp_path / 'run/train.log').read_text()
    assert '200 examples' in log and '60 examples' in log


def test_neither_tensorflow_nor_pytorch_is_imported_by_a_run(command, tmp_path):
    code = f"""
import sys
from absl import flags
sys.argv = ['x', '--config=configs/digits.py', '--workdir={tmp_path / 'run'}',
            '--config.total_steps=2', '--config.warmup_steps=1', '--config.batch=16',
            '--config.model.transformer.num_layers=1', '--config.model.transformer.num_heads=2',
            '--config.model.transformer.mlp_dim=16', '--config.model.hidden_size=16',
            '--config.compile_cache=']
from vit_jax import main
try:
    main.run()
except SystemExit as stop:
    assert not stop.code, stop.code
print(sorted({{m.split('.')[0] for m in sys.modules}} & {{'tensorflow', 'torch', 'keras'}}))
"""
    result = command('-c', code)
    assert result.stdout.strip().splitlines()[-1] == '[]', result.stdout + result.stderr
    assert pathlib.Path(tmp_path / 'run/model/model.json').exists()


def test_weights_are_fitted_and_accounted_for(tmp_path, finished):
    """Another number of classes, another image size, from a file of the released naming."""
    _, workdir, _ = finished
    config = make_config(
        **{'pretrained': str(workdir / 'model/params.npz'), 'pp.crop': 24, 'pp.resize': 0},
    )
    model = models.from_config(config.model, num_classes=3)
    abstract = jax.eval_shape(lambda: state_lib.init_params(model, 24, 0))
    params, origin = initial_weights.initial_params(config, model, abstract)
    assert 'resized: Transformer/posembed_input/pos_embedding (1, 4, 16) -> (1, 9, 16)' in origin
    assert 'newly initialised: head' in origin
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract)
    whole = state_lib.init_params(model, 24, config.seed)
    jax.tree.map(np.testing.assert_array_equal, params['head'], whole['head'])
    some = state_lib.init_params(model, 24, 0, only=['embedding/kernel'])
    jax.tree.map(
        np.testing.assert_array_equal, some, {'embedding': {'kernel': whole['embedding']['kernel']}}
    )


def test_pixels_that_weights_were_made_for_are_said(tmp_path, finished):
    _, workdir, _ = finished
    opened = model_folder.load(
        workdir / 'model', pixels={'eval': 'resize_crop', 'resize': 18, 'interpolation': 'bicubic',
                                   'antialias': True}
    )  # fmt: skip
    pytorch.write(tmp_path / 'timm', opened, to='timm')
    knobs = {'pretrained': str(tmp_path / 'timm'), 'pp.crop': 24, 'pp.resize': 0}
    config = make_config(**knobs)
    model = models.from_config(config.model, num_classes=10)
    abstract = jax.eval_shape(lambda: state_lib.init_params(model, 24, 0))
    _, origin = initial_weights.initial_params(config, model, abstract)
    flags = (
        '--config.pp.eval=resize_crop --config.pp.resize=27 --config.pp.interpolation=bicubic '
        '--config.pp.antialias=True'
    )
    assert origin.endswith(
        'short side 27, bicubic, antialiased, centre crop 24; this run evaluates the whole image '
        f'squashed to 24, bilinear, not antialiased. For theirs: {flags}'
    )
    theirs = dict(flag.removeprefix('--config.').split('=') for flag in flags.split())
    theirs |= {'pp.resize': 27, 'pp.antialias': True}
    _, origin = initial_weights.initial_params(make_config(**knobs | theirs), model, abstract)
    assert 'made for other pixels' not in origin


def test_overlapping_splits_are_said(tmp_path):
    config = make_config(**{'pp.train': 'train[:90%]', 'total_steps': 3})
    train.train_and_evaluate(config, tmp_path / 'run')
    log = (tmp_path / 'run/train.log').read_text()
    assert 'WARNING: 179 of the 359 test images are trained on as well' in log


def test_fully_sharded_training_is_one_config_line(finished, tmp_path, monkeypatch):
    """The same model as data parallel, and a whole one in the model folder."""
    _, workdir, params = finished
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)
    config = make_config(fsdp=-1, total_steps=6)
    ours = train.train_and_evaluate(config, tmp_path / 'run')
    kernel = ours['Transformer']['encoderblock_0']['MlpBlock_0']['Dense_0']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    saved = npz.open_file(tmp_path / 'run/model/params.npz').read()
    jax.tree.map(np.testing.assert_array_equal, saved, dict(jax.device_get(ours)))
    first = {line['step']: line for line in lines(tmp_path / 'run') if 'train_loss' in line}
    other = {line['step']: line for line in lines(workdir) if 'train_loss' in line}
    assert first[2]['train_loss'] == pytest.approx(other[2]['train_loss'], abs=1e-5)


@pytest.mark.gpu
def test_a_run_on_a_gpu_computes_in_bfloat16_and_learns(tmp_path):
    config = make_config(total_steps=300, warmup_steps=30, eval_every=300)
    train.train_and_evaluate(config, tmp_path / 'run')
    assert ', bfloat16, ' in (tmp_path / 'run/train.log').read_text()
    assert lines(tmp_path / 'run')[-1]['accuracy_test'] > 0.5
    assert 'device_memory_peak' in lines(tmp_path / 'run', 'timing.jsonl')[-2]
