"""A run on a table: what its model and its report know, what is refused before it begins."""

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import config as config_lib
from vit_jax import train
from vit_jax.analysis import report_data, run_files
from vit_jax.configs import digits
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.run import recipe

HEADER = 'file,kind,part\n'


def config_for(table, **knobs):
    config = digits.get_config()
    config.model.hidden_size = 16
    config.model.transformer.update(mlp_dim=32, num_heads=2, num_layers=1, dropout_rate=0.0)
    config.update(dataset=str(table), columns='label=kind,split=part', report=False, batch=8)
    config.update(accum_steps=1, total_steps=2, warmup_steps=1, **knobs)
    return config_lib.resolve(config)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """20 images in a folder, a table elsewhere, and a finished run on it."""
    root = tmp_path_factory.mktemp('root')
    rng, lines = np.random.default_rng(0), []
    for number in range(20):
        pixels = rng.integers(0, 80, (20, 20, 3)) + 160 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f'{number}.png')
        lines.append(
            f'{number}.png,{("dark", "light")[number % 2]},{"test" if number > 13 else "train"}\n'
        )
    (root / 'tables').mkdir()
    (root / 'tables/labels.csv').write_text(HEADER + ''.join(lines))
    config = config_for(root / 'tables/labels.csv', image_root=str(root))
    train.train_and_evaluate(config, root / 'run')
    return root


def test_the_model_knows_how_to_read_what_it_was_trained_on(root, run_script):
    def split(*words):
        done = run_script('evaluate.py', '--model', root / 'run/model', *words)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith('split: ')]
        return line.removeprefix('split: ')

    assert split() == 'test, the test part of the dataset'
    other = root / 'tables/other.csv'
    other.write_text(
        'path,class\n' + ''.join(f'{n}.png,{"dark" if n % 2 else "light"}\n' for n in range(6))
    )
    assert split('--dataset', other, '--image_root', root) == (
        'train, all of it: the model tells of no training on it'
    )
    done = run_script('evaluate.py', '--model', root / 'run/model', '--dataset', other)
    assert done.returncode == 1 and 'not one' in done.stderr, done.stderr
    opened = report_data.open_data(run_files.read(root / 'run'))
    assert [len(part) for part in opened] == [14, 6]


def test_too_many_bad_rows_stop_before_training(root):
    table = root / 'tables/bad.csv'
    table.write_text((root / 'tables/labels.csv').read_text() + 'none.png,dark,train\n')
    knobs = {'image_root': str(root)}
    with pytest.raises(UserError, match='row 22: there is no file none.png in .*max_unreadable'):
        train.train_and_evaluate(config_for(table, **knobs), root / 'other')
    train.train_and_evaluate(config_for(table, max_unreadable=0.1, **knobs), root / 'other')
    assert 'none.png' in (root / 'other/train.log').read_text()


def test_rows_of_weight_0_change_nothing_and_others_do(root):
    """Training is the same whatever image a row of weight 0 has; and not where it has weight 1."""

    def trained(name, image, weight):
        lines = (root / 'tables/labels.csv').read_text().replace('part', 'part,weight')
        lines = lines.replace('train\n', 'train,1\n').replace('test\n', 'test,1\n')
        wrong = [f'{image}.png,dark,train,{weight}'] * 6
        (root / f'tables/{name}.csv').write_text(lines + '\n'.join(wrong))
        config = config_for(root / f'tables/{name}.csv', image_root=str(root))
        params = train.train_and_evaluate(config, root / name)
        return np.concatenate([x.ravel() for x in jax.tree.leaves(jax.device_get(params))])

    dark, light = trained('a', 0, 0), trained('b', 1, 0)
    assert np.array_equal(dark, light)
    assert not np.array_equal(dark, trained('c', 1, 1))


def test_what_labels_are_decides_the_loss(root):
    table = root / 'tables/kinds.csv'
    rows = [f'{n}.png,{("a", "a;b", "b")[n % 3]},{n / 4},{n % 2},{n % 3 % 2}\n' for n in range(20)]
    table.write_text('path,marks,age,cat,dog\n' + ''.join(rows))
    for columns, kind in (
        ('labels=marks', 'several classes'), ('labels=cat+dog', 'several classes'),
        ('target=age', 'numbers'), ('target=age+cat', 'numbers'), ('label=cat', 'one class'),
    ):  # fmt: skip
        selected, _ = sources.open_sources(str(table), columns=columns, image_root=str(root))
        assert recipe.losses_of(config_for(table), selected, None)[2].kind == kind, columns
