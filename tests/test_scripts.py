"""The shell scripts, and the requirement files they install."""

import functools
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent


def bash(script, *arguments, cwd='/', **environment):
    return subprocess.run(
        ['bash', str(script), *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@functools.cache
def pins(file, python):
    """What a requirement file installs on a version of Python: {name: version}."""
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        line = line.partition('#')[0].strip()
        if line.startswith('-r '):
            found |= pins(line[3:], python)
        elif line:
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == '==', line
            if requirement.marker is None or requirement.marker.evaluate(
                {'python_version': python, 'python_full_version': f'{python}.0'}
            ):
                name = canonicalize_name(requirement.name)
                assert found.get(name, specifier.version) == specifier.version, line
                found[name] = specifier.version
    return found


def project_requirements():
    """What the project needs with its extras, but for another build of JAX, and what few need."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies']
    own = [name for name in extras if name not in ('cuda12', 'cloud', 'heif')]
    texts = project['dependencies'] + sum((extras[name] for name in own), [])
    return [Requirement(text) for text in texts if not text.startswith('vit_jax[')]


@pytest.mark.parametrize(
    'script',
    sorted({p.name for p in (ROOT / 'scripts').glob('*.py')} - {'quickstart_picture.py'}),
)
def test_help_comes_before_anything_slow_is_imported(script, tmp_path):
    """Also from another folder, in a checkout that is not installed."""
    code = (
        'import runpy, sys\n'
        'sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in f.__module__]\n'
        f'sys.argv = ["{script}", "--help"]\n'
        'try:\n'
        f'    runpy.run_path({str(ROOT / "scripts" / script)!r}, run_name="__main__")\n'
        'finally:\n'
        '    print(*sys.modules, file=sys.stderr)\n'
    )
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'usage: {script}') and 'Example' in done.stdout
    imported = set(done.stderr.split())
    ours = {name for name in imported if name.partition('.')[0] == 'vit_jax'}
    # None of these imports anything but the standard library.
    quick = {'cli', 'errors', 'files', 'run', 'run.streams', 'analysis', 'analysis.tables'}
    quick |= {'commands', f'commands.{script[:-3]}'}
    quick |= {'export', 'export.formats', 'export.options'}
    assert ours <= {'vit_jax', *(f'vit_jax.{name}' for name in quick)}
    slow = {'PIL', 'flax', 'jax', 'matplotlib', 'numpy', 'onnx', 'rich', 'tensorflow', 'torch'}
    assert not imported & slow


@pytest.mark.parametrize('python', ['3.11', '3.12', '3.13'])
@pytest.mark.parametrize(
    'file', ['requirements.txt', 'requirements-cpu.txt', 'requirements-test.txt']
)
def test_pins_lie_in_the_ranges_of_pyproject(file, python):
    pinned = pins(file, python)
    for requirement in project_requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (requirement, version)


def test_python_3_11_has_its_own_jax():
    assert pins('requirements.txt', '3.11')['jax'].startswith('0.10.')
    assert pins('requirements.txt', '3.12')['jax'] == pins('requirements.txt', '3.13')['jax']
    assert pins('requirements.txt', '3.12')['jax'] != pins('requirements.txt', '3.11')['jax']


@pytest.mark.parametrize('python', ['3.11', '3.12'])
def test_cuda_packages_are_of_the_version_of_jax(python):
    pinned = pins('requirements.txt', python)
    assert (
        pinned['jax']
        == pinned['jaxlib']
        == pinned['jax-cuda12-plugin']
        == pinned['jax-cuda12-pjrt']
    )
    lines = [
        line for line in (ROOT / 'requirements.txt').read_text().splitlines() if 'cuda12]' in line
    ]
    assert len(lines) == 2 and all(line.startswith('jax[cuda12]==') for line in lines)


@pytest.mark.parametrize('python', ['3.12', '3.13'])
def test_pytorch_only_where_a_cpu_build_is_certain(python):
    assert 'torch' in pins('requirements-test.txt', '3.11')
    assert not {'torch', 'transformers'} & pins('requirements-test.txt', python).keys()
    assert 'torch' not in pins('requirements-cpu.txt', '3.11')


def test_everything_the_packages_need_is_pinned():
    """Follows the requirements of the installed packages; none may be left to the resolver."""
    _all_that_they_need_is_pinned(project_requirements())


def test_what_peers_need_is_pinned_in_the_version_they_want():
    """They are installed with --no-deps."""
    peers = pins('requirements-peers.txt', '3.11')
    for name, version in peers.items():
        if not list(importlib.metadata.distributions(name=name)):
            pytest.skip(f'{name} is not installed: scripts/setup.sh --peers')
        assert importlib.metadata.version(name).partition('+')[0] == version
    _all_that_they_need_is_pinned(map(Requirement, peers), peers)


def _all_that_they_need_is_pinned(requirements, beside={}):  # noqa: B006
    pinned = pins('requirements-test.txt', '{}.{}'.format(*sys.version_info[:2]))
    todo, seen = [(Requirement(name), '') for name in pinned], set()
    todo += [(requirement, '') for requirement in requirements]
    pinned = pinned | beside
    while todo:
        requirement, extra = todo.pop()
        if (requirement.name, extra) in seen:
            continue
        seen.add((requirement.name, extra))
        for text in importlib.metadata.requires(requirement.name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({'extra': extra}):
                name = canonicalize_name(needed.name)
                assert name in pinned, f'{requirement.name} needs {needed}'
                assert needed.specifier.contains(pinned[name]), f'{requirement.name} needs {needed}'
                todo += [(needed, extra) for extra in ('', *needed.extras)]
    assert len(seen) > 50


@pytest.fixture
def project(tmp_path):
    """A checkout with the real scripts that needs no package but what is installed here."""
    root = tmp_path / 'my checkout'  # the space is on purpose
    shutil.copytree(ROOT / 'scripts', root / 'scripts')
    (root / 'tiny').mkdir()
    (root / 'tiny' / '__init__.py').write_text('')
    (root / 'pyproject.toml').write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "tiny"\nversion = "1"\n[tool.setuptools]\npackages = ["tiny"]\n'
        '[tool.mypy]\nfiles = ["tiny"]\n'
    )
    for kind in ('', '-cpu', '-test', '-peers'):
        (root / f'requirements{kind}.txt').write_text('# nothing\n')
    return root


@pytest.mark.parametrize('python', ['3.9', '3.14', '2.7', 'latest', ''])
def test_setup_refuses_other_pythons(project, python):
    done = bash(project / 'scripts' / 'setup.sh', '--python', python)
    assert done.returncode == 1 and 'expected a version from 3.11 to 3.13' in done.stderr
    assert done.stdout == ''


def test_setup_refuses_unknown_arguments(project):
    done = bash(project / 'scripts' / 'setup.sh', 'tests')
    assert done.returncode == 1 and "unknown argument 'tests'" in done.stderr


def test_setup_without_any_python(project, tmp_path):
    tools = tmp_path / 'bin'
    tools.mkdir()
    for name in ('dirname', 'bash'):
        (tools / name).symlink_to(shutil.which(name))
    done = bash(
        project / 'scripts' / 'setup.sh',
        PATH=str(tools),
        PYENV_ROOT=str(tmp_path),
        HOME=str(tmp_path),
    )
    assert done.returncode == 1
    assert 'no Python 3.11 to 3.13 was found' in done.stderr and 'apt install' in done.stderr
    assert not (project / '.venv').exists()


def test_setup_installs_once_and_again_after_a_change(project, tmp_path):
    # Building an editable package takes setuptools, which a new environment lacks offline.
    library = tmp_path / 'library'
    library.mkdir()
    for found in pathlib.Path(sysconfig.get_path('purelib')).iterdir():
        if found.name.startswith(('setuptools', '_distutils_hack', 'wheel', 'packaging')):
            (library / found.name).symlink_to(found)
    python = '{}.{}'.format(*sys.version_info[:2])
    setup = functools.partial(
        bash,
        project / 'scripts' / 'setup.sh',
        '--python',
        python,
        PYTHONPATH=str(library),
        PIP_NO_INDEX='1',
        PATH=os.pathsep.join([str(pathlib.Path(sys._base_executable).parent), os.environ['PATH']]),
    )
    venv = project / f'.venv-{python}'
    first = setup()
    assert first.returncode == 0, first.stderr
    assert first.stdout == f'{venv}\n'
    assert 'Making .venv-' in first.stderr and 'Ready: ' in first.stderr
    where = subprocess.run(
        [venv / 'bin' / 'python', '-c', 'import tiny; print(tiny.__file__)'],
        capture_output=True,
        text=True,
    )
    assert where.stdout.strip() == str(project / 'tiny' / '__init__.py'), where.stderr

    second = setup()
    assert (second.returncode, second.stdout, second.stderr) == (0, f'{venv}\n', '')

    # More is needed for the tests; after that, nothing is missing for a run.
    with_tests = setup('--test')
    assert with_tests.returncode == 0 and 'Installing the packages' in with_tests.stderr
    assert setup('--test').stderr == '' and setup().stderr == ''

    # Without PyTorch, no libraries that run on it; what failed is not taken for installed.
    (project / 'requirements-peers.txt').write_text('no-such-package-of-vit-jax==1\n')
    peers = setup('--peers')
    assert peers.returncode == 0 and peers.stdout == f'{venv}\n'
    assert 'timm, torchvision and open_clip are left out, and their tests skip' in peers.stderr
    (library / 'torch').mkdir()
    (library / 'torch' / '__init__.py').write_text('')
    for _ in range(2):
        peers = setup('--peers')
        assert peers.returncode == 1 and peers.stdout == ''
        assert 'pip could not install requirements-peers.txt' in peers.stderr
    (project / 'requirements-peers.txt').write_text('# nothing\n')
    broken = library / 'torchvision' / '_meta_registrations.py'
    broken.parent.mkdir()
    (library / 'torchvision' / '__init__.py').write_text('')
    broken.write_text('raise RuntimeError')
    peers = setup('--peers')
    assert 'Installing the packages of requirements-peers.txt' in peers.stderr
    assert peers.stdout == f'{venv}\n' and broken.read_text() == ''
    assert setup('--peers').stderr == setup('--test').stderr == setup().stderr == ''

    # A GPU asks for the CUDA build; a driver that does not answer is no GPU.
    tools = tmp_path / 'bin'
    tools.mkdir()
    path = os.pathsep.join([str(tools), setup.keywords['PATH']])
    for answer, expected in (
        ('echo "GPU 0: NVIDIA H100"', 'Installing the packages of requirements.txt '),
        ('echo "no driver"; exit 9', 'Installing the packages of requirements-cpu.txt '),
    ):
        (tools / 'nvidia-smi').write_text(f'#!/bin/sh\n{answer}\n')
        (tools / 'nvidia-smi').chmod(0o755)
        assert expected in setup(PATH=path).stderr

    (project / 'requirements-cpu.txt').write_text('# changed\nno-such-package-of-vit-jax==1\n')
    changed = setup()
    assert changed.returncode == 1 and changed.stdout == ''
    assert 'pip could not install requirements' in changed.stderr
    assert setup().returncode == 1, 'a failed installation is not taken for a finished one'


@pytest.mark.parametrize(
    'code, typed, status, shown',
    [
        ('def test_x():\n    assert True\n', 'x: int = 1\n', 0, '1 passed'),
        ('def test_x():\n    assert False\n', '', 1, '1 failed'),
        ('import os\n\n\ndef test_x():\n    assert True\n', '', 1, '1 passed'),
        ('def test_x( ):\n    assert True\n', '', 1, '1 passed'),
        ('def test_x():\n    assert True\n', "x: int = 'one'\n", 1, '1 passed'),
    ],
    ids=['good', 'failing test', 'lint', 'format', 'types'],
)
def test_test_script_fails_with_tests_linter_and_types(project, code, typed, status, shown):
    (project / 'scripts' / 'setup.sh').write_text(f'echo "$*" >&2\necho {sys.prefix}\n')
    for path in [*(project / 'scripts').glob('*.py')]:
        path.unlink()
    (project / 'tests').mkdir()
    (project / 'tests' / 'test_x.py').write_text(code)
    (project / 'tiny' / '__init__.py').write_text(typed)
    words = ['-n', '0', '--peers', '--python', '3.12', 'tests', '-q']
    done = bash(project / 'scripts' / 'test.sh', *words)
    assert done.returncode == status, done.stdout + done.stderr
    assert shown in done.stdout
    assert done.stderr.splitlines()[0] == '--test --peers --python 3.12'


def test_quickstart_trains_afresh_and_ends_with_the_accuracy(project):
    """The whole of it, with few steps: main, prediction, picture, advice, last line."""
    (project / 'scripts' / 'setup.sh').write_text(f'echo {sys.prefix}\n')
    (project / 'configs').symlink_to(ROOT / 'configs')
    quick = ['total_steps=3', 'warmup_steps=1', 'progress_every=1', 'compile_cache=']
    quick.append('model.transformer.num_layers=1')
    (project / 'runs' / 'quickstart').mkdir(parents=True)
    (project / 'runs' / 'quickstart' / 'metrics.jsonl').write_text('{"step": 1, "train_loss": 0}\n')
    done = bash(
        project / 'scripts' / 'quickstart.sh',
        *(f'--config.{setting}' for setting in quick),
        JAX_NUM_CPU_DEVICES='1',
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = project / 'runs' / 'quickstart'
    rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows if row.get('train_loss')] == [1, 2, 3], 'trained afresh'
    assert len([row for row in rows if 'train_loss' in row]) == 3
    assert 'Removing runs/quickstart' in done.stdout
    lines = done.stdout.splitlines()
    (accuracy,) = [row['accuracy_test'] for row in rows if 'accuracy_test' in row]
    assert lines[-1] == f'test accuracy: {100 * accuracy:.1f} %'
    assert sum(line.startswith('  python -m vit_jax') for line in lines[-12:]) == 3
    with Image.open(run / 'predictions.png') as picture:
        assert min(picture.size) > 800
    images = sorted((run / 'images').glob('*.png'))
    assert [image.name[0] for image in images] == list('0123456789')
    first = lines.index(f'runs/quickstart/images/{images[0].name}')
    shown = [float(line.split()[1]) for line in lines[first + 1 : first + 4]]
    assert shown == sorted(shown, reverse=True) and 0.3 < sum(shown) <= 1


def test_a_stopped_quickstart_goes_on(project):
    (project / 'scripts' / 'setup.sh').write_text(f'echo {sys.prefix}\n')
    (project / 'configs').symlink_to(ROOT / 'configs')
    output = project / 'output'
    flags = ['compile_cache=', 'progress_every=1', 'model.transformer.num_layers=1']
    for _ in range(2):
        with open(output, 'w') as file:
            process = subprocess.Popen(
                ['bash', project / 'scripts/quickstart.sh', *(f'--config.{x}' for x in flags)],
                env=os.environ | {'JAX_NUM_CPU_DEVICES': '1'},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not re.search(r'step \d+/', output.read_text()) and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        assert process.wait(60) == 130, output.read_text()
        assert 'run the same command again' in output.read_text()
    assert 'Going on with runs/quickstart, which was stopped' in output.read_text()
    assert 'resumed from step' in output.read_text()


def test_quickstart_fails_with_the_training(project):
    (project / 'scripts' / 'setup.sh').write_text(f'echo {sys.prefix}\n')
    (project / 'configs').symlink_to(ROOT / 'configs')
    done = bash(project / 'scripts' / 'quickstart.sh', '--config.total_stepz=3')
    assert done.returncode != 0 and 'total_steps' in done.stderr
    assert 'test accuracy' not in done.stdout
