"""What `pip install .` puts into an environment, its command, and a user's project beside it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv

import pytest

from vit_jax import __main__, commands
from vit_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """A copy of what is packed: building leaves files beside its sources."""
    folder = tmp_path_factory.mktemp('sources')
    for name in ('configs', 'vit_jax'):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns('*.pyc')
        )
    for name in ('pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope='module')
def environment(sources, tmp_path_factory):
    """An environment that `pip install .` has filled; what the package needs is found here."""
    folder = tmp_path_factory.mktemp('environment')
    venv.create(folder, symlinks=True)
    site = pathlib.Path(sysconfig.get_path('purelib', vars={'base': folder}))
    (site / 'packages.pth').write_text(sysconfig.get_path('purelib') + '\n')
    pip = [sys.executable, '-m', 'pip', '--python', folder / 'bin' / 'python', 'install']
    offline = ['--no-deps', '--no-index', '--no-build-isolation', '--ignore-installed']
    done = subprocess.run([*pip, *offline, sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def run(environment, tmp_path):
    """Runs a program of the environment in a folder that has nothing of ours."""

    def run(program, *words, cwd=tmp_path, path=''):
        env = {**os.environ, 'PYTHONPATH': str(path), 'JAX_PLATFORMS': 'cpu'}
        return subprocess.run(
            [environment / 'bin' / program, *words],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
        )

    return run


def test_the_package_is_all_that_is_installed(environment):
    site = pathlib.Path(sysconfig.get_path('purelib', vars={'base': environment}))
    names = {path.name.partition('-')[0] for path in site.iterdir()}
    assert names == {'vit_jax', 'packages.pth'}
    files = {path.relative_to(ROOT) for path in ROOT.glob('vit_jax/**/*') if path.is_file()}
    files |= {
        pathlib.Path('vit_jax') / path.relative_to(ROOT) for path in ROOT.glob('configs/*.py')
    }
    packed = {path.relative_to(site) for path in site.glob('vit_jax/**/*') if path.is_file()}
    assert {path for path in files ^ packed if path.suffix != '.pyc'} == set()
    assert (site / 'vit_jax' / 'py.typed').is_file()


def test_a_source_distribution_has_the_same_files(sources, tmp_path):
    build = 'from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])'
    done = subprocess.run([sys.executable, '-c', build, tmp_path], cwd=sources, capture_output=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob('*.tar.gz')
    with tarfile.open(archive) as tar:
        names = [member.name.partition('/')[2] for member in tar if member.isfile()]
    assert {'vit_jax/py.typed', 'vit_jax/configs/b16.py', 'vit_jax/analysis/report.html.j2'} <= {
        *names
    }
    assert not [name for name in names if name.startswith(('configs/', 'tests/'))]


def test_the_command_lists_commands_without_jax(run):
    done = run('vit_jax', '--help')
    assert done.returncode == 0 and not done.stderr
    for name in commands.NAMES:
        assert f'\n  {name} ' in done.stdout
    code = 'import sys; from vit_jax import __main__; __main__.main(); print(*sys.modules)'
    done = run('python', '-c', code)
    assert not {'jax', 'numpy', 'absl', 'ml_collections'} & set(done.stdout.split())


def test_a_name_is_our_config_everywhere(run, tmp_path):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / '__init__.py').touch()
    (tmp_path / 'configs' / 'mine.py').write_text('RATE = 0.5\n')
    done = run('python', '-m', 'vit_jax', 'train', '--config', 'b16:digits', '--config.pp.crop=33')
    assert done.stderr.startswith('error: config.pp.crop=33 is not a multiple of'), done.stderr


def test_a_config_of_the_user_imports_ours_and_his(run, tmp_path):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'mine.py').write_text('RATE = 0.5\n')
    (tmp_path / 'my.py').write_text(
        'from configs import mine\n'
        'from vit_jax.configs import common\n'
        "get_config = common.fine_tuning('ViT-Ti_16', '', base_lr=mine.RATE)\n"
    )
    done = run('vit_jax', 'train', '--config', 'my.py', '--config.base_lrr=1')
    assert 'did you mean --config.base_lr?' in done.stderr  # so the file was read
    done = run('vit_jax', 'train', '--config', 'mine')
    assert 'did you mean configs/mine.py?' in done.stderr


def test_the_config_of_the_page():
    block = re.search(r'```python\n(.*?)```', (ROOT / 'docs/install.md').read_text(), re.DOTALL)[1]
    namespace = {}
    exec(block, namespace)
    config = config_lib.resolve(namespace['get_config']())
    assert (config.dataset, config.pp.crop, config.total_steps) == ('/my/photos', 384, 2000)
    assert config.model.model_name == 'ViT-B_16'


@pytest.mark.parametrize('files', [('__init__', 'base'), ('base',)], ids=['package', 'namespace'])
@pytest.mark.parametrize('path', ['', ROOT], ids=['wheel', 'checkout'])
def test_a_package_configs_of_the_user_is_his(run, tmp_path, files, path):
    (tmp_path / 'configs').mkdir()
    for name in files:
        (tmp_path / 'configs' / f'{name}.py').write_text('lr = 1e-3\n')
    (tmp_path / 'train.py').write_text(
        'from configs import base\n'
        'from vit_jax import main\n'
        'from vit_jax.configs import b16\n'
        'print(base.lr, main.__file__, b16.get_config().model.model_name)\n'
    )
    done = run('python', 'train.py', path=path)
    assert done.returncode == 0, done.stderr
    lr, file, name = done.stdout.split()
    assert (lr, name) == ('0.001', 'ViT-B_16')
    assert pathlib.Path(file).is_relative_to(ROOT) == bool(path)


CORE = """
import importlib, json, pkgutil, sys, time
import numpy as np
from PIL import Image


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in sys.argv[2:]:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)


def resident():
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * 4096


sys.meta_path.insert(0, Absent())
import jax, flax.linen, optax
modules, before, taken = set(sys.modules), resident(), []
for _ in range(3):  # the first may have to compile them
    start = time.process_time()
    import vit_jax.models
    taken.append(time.process_time() - start)
    added, memory = set(sys.modules) - modules, resident() - before
    for name in added:
        del sys.modules[name]
seconds, names = min(taken), {name.partition('.')[0] for name in added}
import vit_jax.models

from vit_jax.errors import MissingPackageError
missing = {}


def ask(name, work):
    try:
        work()
    except MissingPackageError as error:
        missing[name] = str(error)


for module in pkgutil.walk_packages(vit_jax.__path__, 'vit_jax.'):
    if not module.name.endswith('__main__'):
        ask(module.name, lambda: importlib.import_module(module.name))
from vit_jax import model_folder, predict
from vit_jax.data import sources
from vit_jax.inference import classifier, contact_sheet
Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save('photo.jpg')
((_, probabilities),) = predict(model_folder.load(sys.argv[1]), ['photo.jpg'])
ask('digits', lambda: sources.open_dataset('digits'))
ask('tfds', lambda: sources.open_dataset('tf_flowers'))
ask('parquet', lambda: sources.open_dataset('labels.parquet'))
ask('onnx', lambda: classifier.open_classifier('photo.onnx'))
ask('picture', lambda: contact_sheet.save('x.png', [('photo.jpg', probabilities)], 'ab', title=''))
total = float(probabilities.sum())
print(json.dumps([sorted(names), seconds, memory, total, missing]))
"""


def test_without_extras_everything_imports_and_photos_are_predicted(tmp_path, tiny_model):
    """And vit_jax.models is small: what it adds to jax, flax and optax is ml_collections."""
    tiny_model(['a', 'b'], folder=tmp_path / 'model')
    (tmp_path / 'photo.onnx').touch()
    (tmp_path / 'labels.parquet').touch()
    absent = ['grain', 'matplotlib', 'onnx', 'onnxruntime', 'sklearn', 'tensorboard']
    absent += ['pyarrow', 'tensorflow', 'tensorflow_datasets']
    done = subprocess.run(
        [sys.executable, '-c', CORE, tmp_path / 'model', *absent],
        cwd=tmp_path,
        env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names, seconds, memory, total, missing = json.loads(done.stdout)
    assert names == ['ml_collections', 'vit_jax']
    assert memory < 5e6 and seconds < 0.15, (memory, seconds)  # 2.5 MB, 0.03 to 0.05 s
    assert total == pytest.approx(1)
    extras = {name: line.split("'vit_jax[")[1].split(']')[0] for name, line in missing.items()}
    graphs = ('', '_activations', '_graph', '_heads', '_models', '_quantize', '_text')
    assert extras == {
        **{f'vit_jax.export.onnx{name}': 'export' for name in graphs},
        'digits': 'train',
        'tfds': 'train',
        'parquet': 'parquet',
        'onnx': 'export',
        'picture': 'report',
    }
    assert "onnxruntime is not installed: pip install 'vit_jax[export]'" in missing['onnx']
    assert not [line for line in missing.values() if '\n' in line]


def test_every_command_has_a_module_and_is_listed():
    modules = {file.stem for file in (ROOT / 'vit_jax' / 'commands').glob('*.py')} - {'__init__'}
    assert modules == set(commands.NAMES)


@pytest.mark.parametrize(
    ('word', 'hint'),
    [
        ('predcit', 'did you mean `vit_jax predict`?'),
        ('eval', 'did you mean `vit_jax evaluate`?'),
        ('list-models', 'did you mean `vit_jax list_models`?'),
        ('--config', 'did you mean `vit_jax train`?'),
        ('x', 'it has train, finetune, sweep, '),
    ],
)
def test_a_misspelt_command(monkeypatch, capsys, word, hint):
    monkeypatch.setattr(sys, 'argv', ['vit_jax', word])
    assert __main__.main() == 2
    line = capsys.readouterr().err
    assert hint in line and line.count('\n') == 1


def test_the_command_runs_what_its_first_word_names(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['vit_jax', 'list_models', '--variants', 'DeiT-Ti'])
    assert __main__.main() == 0 and 'DeiT-Ti_16' in capsys.readouterr().out
    monkeypatch.setattr(sys, 'argv', ['vit_jax', 'list_models', 'B_17'])
    assert __main__.main() == 1
    assert capsys.readouterr().err == 'vit_jax list_models: nothing has B_17\n'
