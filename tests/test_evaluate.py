"""Evaluation: what is right, every example once, one path from the file to the logits."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_jax import evaluate, sharding, steps
from vit_jax.data import sources
from vit_jax.data.batches import eval_batches
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Example
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import verify
from vit_jax.inference import metrics, predict
from vit_jax.inference.classifier import JaxClassifier, classify
from vit_jax.inference.task import ONE_CLASS


class Oracle:
    """A model that reads the class from the pixels: logits are -(grey level - class)^2."""

    def apply(self, variables, images, train):
        return -((images[:, 0, 0, :1] * 127.5 + 127.5 - np.arange(10)[None]) ** 2)


class Digits:
    """Examples of ten classes that show their class, every third a wrong one; some are broken."""

    class_names = tuple('0123456789')
    exif = False

    def __init__(self, count=359, wrong=True, bad=()):
        self.count, self.wrong, self.bad = count, wrong, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label = index % 10
        shown = (label + 7) % 10 if self.wrong and index % 3 == 0 else label
        image = b'' if index in self.bad else np.full((4, 4, 3), shown, np.uint8)
        return Example(image, label, str(index))


def evaluate_oracle(source, devices, **options):
    mesh = sharding.create_mesh(1, jax.devices()[:devices])
    step = steps.make_eval_step(Oracle(), mesh, sharding.replicated(mesh))
    params = sharding.put_tree({'p': np.zeros(())}, {'p': sharding.replicated(mesh)})
    return evaluate.evaluate(step, params, source, Preprocess(4), mesh, **options)


# Of equal logits the first class counts as predicted, as argmax does; NaN is never right.
NAN = np.nan
RULES = [
    ([1, 1, 0], 0, 0), ([1, 1, 0], 1, 1), ([0, 1, 1], 2, 1), ([NAN, 1, 0], 0, 3),
    ([NAN, 1, 0], 1, 0), ([NAN, NAN, NAN], 0, 3), ([np.inf, 0, 0], 0, 3), ([0, 0, 0], 2, 2),
]  # fmt: skip


@pytest.mark.parametrize('library', [np, jnp])
def test_ties_and_nan_are_no_luck(library):
    logits, labels, ranks = zip(*RULES, strict=True)
    with np.errstate(invalid='ignore'):
        told = evaluate.outcomes(library.asarray(np.float32(logits)), library.asarray(labels))
    assert told['rank'].tolist() == list(ranks)
    assert set(told) == {'rank', 'predicted', 'log_probability', 'confidence'}


def test_outcomes_of_both_libraries_agree():
    logits = np.random.default_rng(0).normal(0, 4, (50, 7)).astype(np.float32)
    labels = np.arange(50) % 7
    host, device = evaluate.outcomes(logits, labels), jax.jit(evaluate.outcomes)(logits, labels)
    probabilities = ONE_CLASS.values(logits)
    for told in (host, device):
        np.testing.assert_allclose(told['confidence'], probabilities.max(axis=1), rtol=1e-5)
        np.testing.assert_allclose(
            np.exp(told['log_probability']), probabilities[np.arange(50), labels], rtol=1e-5
        )
        assert np.array_equal(told['predicted'], probabilities.argmax(axis=1))
        order = np.argsort(-logits, axis=1)
        assert np.array_equal(told['rank'], np.argmax(order == labels[:, None], axis=1))


def test_join_puts_batches_in_the_order_of_the_source():
    fields = ('label', 'readable', 'rank', 'predicted', 'log_probability', 'confidence')
    parts = [
        {'example': np.array(example)} | {name: np.array(example) for name in fields}
        for example in ([2, -1], [0, -1], [1, 3])
    ]
    assert evaluate.join(parts, 4).label.tolist() == [0, 1, 2, 3]
    for count, wrong in ((5, parts), (4, [*parts, parts[0]])):
        with pytest.raises(RuntimeError, match='each of [45] once'):
            evaluate.join(wrong, count)


@pytest.mark.parametrize(
    ('batch', 'devices'), [(1, 1), (7, 3), (64, 4), (359, 1), (359, 4), (1000, 3)]
)
def test_every_example_counts_once(batch, devices):
    found, speed = evaluate_oracle(Digits(), devices, batch=batch)
    assert found['accuracy_test'] == pytest.approx((359 - 120) / 359, abs=1e-12)
    assert speed > 0


def test_unreadable_images_count_as_wrong_and_not_in_the_loss():
    images, errors = Digits(41, wrong=False), []

    def run(**options):
        return evaluate_oracle(images, 2, batch=8, **options)[0]

    clean = run()
    assert clean['accuracy_test'] == 1 and 'unreadable_test' not in clean
    assert run(on_bad=errors.append) == clean and not errors
    images.bad = (0, 5, 8, 40)
    found = run(on_bad=errors.append)
    assert found['unreadable_test'] == 4
    assert found['accuracy_test'] == pytest.approx(37 / 41, abs=1e-12)
    assert found['accuracy_top5_test'] == pytest.approx(37 / 41, abs=1e-12)
    # Cross-entropy of class c where the logits are -(c - j)^2.
    loss = np.array([np.log(np.exp(-((c - np.arange(10.0)) ** 2)).sum()) for c in range(10)])
    labels = np.arange(41) % 10
    assert clean['loss_test'] == pytest.approx(loss[labels].mean(), abs=1e-6)
    readable = np.delete(labels, images.bad)
    assert found['loss_test'] == pytest.approx(loss[readable].mean(), abs=1e-6)
    assert [error.key for error in errors] == ['0', '5', '8', '40']
    with pytest.raises(BadImageError, match='image 0:'):
        run()
    images.bad = range(41)
    with pytest.raises(UserError, match='not one of the 41 images'):
        run(on_bad=errors.append)


def test_an_evaluation_can_be_stopped():
    asked = []
    stop = lambda: asked.append(0) or len(asked) == 2  # noqa: E731
    assert evaluate_oracle(Digits(), 1, batch=8, should_stop=stop) is None
    assert len(asked) == 2


def test_one_image_takes_the_same_way_everywhere(tiny_model, tmp_path, monkeypatch):
    """Training's evaluation, evaluate, predict and verify: the same pixels, the same answer."""
    files = []
    kinds = [('JPEG', (40, 31)), ('PNG', (16, 50)), ('JPEG', (9, 9))]
    for number, (form, size) in enumerate(kinds):
        rng = np.random.default_rng(number)
        pixels, exif, file = rng.integers(0, 255, (*size, 3), np.uint8), Image.Exif(), io.BytesIO()
        exif[0x0112] = 6  # lies on its side
        Image.fromarray(pixels).save(file, form, exif=exif)
        path = tmp_path / 'photos' / 'ab'[number % 2] / f'{number}.{form.lower()}'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        files.append(str(path))
    model = tiny_model('ab')
    classifier, source = JaxClassifier(model), sources.open_dataset(str(tmp_path / 'photos'))
    source = source.select('train')
    row = {source[i].key: i for i in range(3)}
    seen = []
    put = sharding.put_batch
    monkeypatch.setattr(
        sharding, 'put_batch', lambda data, mesh: put(seen.append(data) or data, mesh)
    )
    mesh = sharding.create_mesh(1, jax.devices()[:1])
    step = steps.make_eval_step(model.model, mesh, sharding.replicated(mesh))
    trained, _ = evaluate.evaluate(step, model.params, source, model.preprocess, mesh, batch=3)
    ((data, logits),) = classify(classifier, source, batch=3, on_bad=None)
    found, _ = metrics.collect(classifier, source, model_labels=(0, 1), batch=3)
    assert np.array_equal(data['image'], seen[0]['image'])
    (verified,) = eval_batches(verify.images_for(files).source, model.preprocess, batch=7)
    for number, (path, probabilities) in enumerate(predict.predict(classifier, files, batch=3)):
        i = row[path]
        assert np.array_equal(verified['image'][number], data['image'][i])
        assert np.array_equal(probabilities, ONE_CLASS.values(logits[i]))
        assert found.confidence[i] == pytest.approx(probabilities.max(), rel=1e-6)
    assert trained['loss_test'] == pytest.approx(-found.log_probability.mean(), rel=1e-6)
    assert trained['accuracy_test'] == found.right.mean()
