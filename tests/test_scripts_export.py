"""vit_jax export: from a model to a verified file, and everything that leaves none."""

import hashlib
import importlib.util
import json
import os
import pathlib
import signal

import onnx
import pytest

from vit_jax.checkpoint import npz
from vit_jax.commands import export
from vit_jax.export import formats, options, verify
from vit_jax.inference import model_folder

ROOT = pathlib.Path(__file__).parents[1]
FIXTURES = pathlib.Path(__file__).parent / 'fixtures' / 'conformance'
NAMES = ['daisy', 'rose', 'tulip', 'dandelion', 'sunflower', 'aster', 'lily']


@pytest.fixture
def script(monkeypatch, run_script):
    """Runs vit_jax export in this process: (exit status, standard output, standard error)."""
    for name in ('JAX_PLATFORMS', 'TF_CPP_MIN_LOG_LEVEL'):  # the script sets them if they are not
        monkeypatch.setenv(name, os.environ.get(name, '2'))
    handler = signal.getsignal(signal.SIGTERM)

    def run(*words):
        done = run_script('export.py', *words)
        return done.returncode, done.stdout, done.stderr

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A model folder of 32 pixels and 7 classes."""
    folder = tmp_path_factory.mktemp('model') / 'model'
    config = json.loads((FIXTURES / 'index.json').read_text())['vit_token']['config']
    model_folder.save(
        folder,
        npz.open_file(FIXTURES / 'vit_token.checkpoint.npz').read(),
        model_config={k: v for k, v in config.items() if k != 'num_classes'},
        class_names=NAMES,
        preprocess=model_folder.Preprocess(crop=32),
        source={'dataset': 'flowers'},
    )
    return folder


@pytest.fixture
def out(tmp_path):
    """An empty folder."""
    (tmp_path / 'out').mkdir()
    return tmp_path / 'out'


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_onnx_file_and_its_report(script, model, out):
    status, text, err = script('--model', model, '--format', 'onnx', '--output', out / 'x.onnx')
    assert (status, err) == (0, '')
    assert files(out) == ['x.onnx', 'x.onnx.verify.json']
    assert text.splitlines()[-1].endswith('x.onnx: written, verified')
    report = json.loads((out / 'x.onnx.verify.json').read_text(encoding='utf-8'))
    assert report['status'] == 'verified'
    assert [(c['batch'], c['passed']) for c in report['comparisons']] == [
        (1, True),
        (2, True),
        (7, True),
    ]
    digest = hashlib.sha256((out / 'x.onnx').read_bytes()).hexdigest()
    assert report['files']['x.onnx']['sha256'] == digest
    # What was printed is what is stored.
    rows = [line for line in text.splitlines() if line.startswith('logits ')]
    assert len(rows) == 3 and set(rows) <= set(report['text'])


def test_stablehlo_and_npz(script, model, out):
    for name, output in (('stablehlo', 'x.stablehlo'), ('npz', 'x.npz')):
        status, text, err = script('--model', model, '--format', name, '--output', out / output)
        assert (status, err) == (0, ''), err
        report = json.loads((out / f'{output}.verify.json').read_text(encoding='utf-8'))
        assert report['status'] == 'verified'
        assert report['facts']['imported_vit_jax'] == (name == 'npz')
    assert files(out) == [
        'x.npz',
        'x.npz.verify.json',
        'x.stablehlo',
        'x.stablehlo.json',
        'x.stablehlo.verify.json',
    ]
    assert json.loads((out / 'x.stablehlo.json').read_text())['class_names'] == NAMES


def test_without_verification(script, model, out):
    words = ('--model', model, '--format', 'onnx', '--output', out / 'x.onnx', '--no-verify')
    status, text, _ = script(*words)
    assert status == 0 and text.splitlines()[-1].endswith('x.onnx: written, not verified')
    assert files(out) == ['x.onnx']


def test_a_damaged_export_leaves_no_file(script, model, out, monkeypatch):
    write = formats.write

    def damaged(path, *args):
        notes = write(path, *args)
        proto = onnx.load(path)
        (tensor,) = [t for t in proto.graph.initializer if t.name == 'head/bias']
        values = onnx.numpy_helper.to_array(tensor) * 1.01
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(proto, path)
        return notes

    monkeypatch.setattr(formats, 'write', damaged)
    words = ('--model', model, '--format', 'onnx', '--output', out / 'x.onnx')
    status, text, err = script(*words)
    assert status == 1 and files(out) == []
    assert 'TOO FAR' in text
    assert err == f'export.py: {out / "x.onnx"} was not written: logits too far from JAX\n'

    monkeypatch.setattr(formats, 'write', lambda path, *args: path.write_bytes(b'x') and [])
    status, text, err = script(*words)
    assert status == 1 and files(out) == []
    assert 'it cannot be loaded and run (onnxruntime)' in err and err.count('\n') == 1


def test_an_interruption_leaves_no_file(script, model, out, monkeypatch):
    words = ('--model', model, '--format', 'onnx', '--output', out / 'x.onnx')
    for sent, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        seen = []

        def interrupted(*args, sent=sent, seen=seen, **kwargs):
            seen += files(out)
            os.kill(os.getpid(), sent)
            raise AssertionError('the signal should have come')

        monkeypatch.setattr(verify, 'verify', interrupted)
        status, _, err = script(*words)
        assert status == expected and err.startswith('export.py: interrupted; ')
        assert len(seen) == 1 and seen[0].startswith('.x.onnx.')  # hidden until it is verified
        assert files(out) == []


ERRORS = {
    'unknown format': (['--format', 'onxx'], "unknown format 'onxx'; did you mean onnx?"),
    'no such model': (['--model', 'runs/none/model'], 'runs/none/model'),
    'no such folder': (['--output', 'nowhere/x.onnx'], 'there is no folder nowhere'),
    'suffix': (['--output', 'x.pb'], 'a file whose name ends in .onnx'),
    'a file for a folder': (['--format', 'timm', '--output', 'x.onnx'], 'timm writes a folder'),
    'opset': (['--format', 'timm', '--output', 'x', '--opset', '17'], '--opset goes with'),
    'dtype': (['--format', 'stablehlo', '--dtype', 'float16'], '--dtype goes with --format onnx'),
    'drop': (['--drop', 'pre_logits'], '--drop goes with --format timm or huggingface'),
    'no such layer': (
        ['--format', 'npz', '--output', 'x.npz', '--drop', 'head'],
        "cannot drop 'head'",
    ),
    'no such image': (['--images', 'none.jpg'], 'none.jpg'),
    'variant': (
        ['--model', str(FIXTURES / 'vit_token.checkpoint.npz'), '--variant', 'ViT-B_17'],
        'ViT-B_17',
    ),
    'no place for it': (
        ['--format', 'torchvision', '--output', 'x', '--model']
        + [str(FIXTURES / 'vit_gap.checkpoint.npz')],
        'torchvision cannot express this model',
    ),
    'mixer': (
        ['--attention', '--model', str(FIXTURES / 'mixer.checkpoint.npz')],
        'MLP-Mixer has no attention',
    ),
}


@pytest.mark.parametrize('name', ERRORS)
def test_errors_are_one_line(script, model, out, monkeypatch, name):
    monkeypatch.chdir(out)
    words, message = ERRORS[name]
    given = {'--model': str(model), '--format': 'onnx', '--output': 'x.onnx'}
    given = {k: v for k, v in given.items() if k not in words}
    status, _, err = script(*(word for item in given.items() for word in item), *words)
    assert status == 1 and err.startswith('export.py: ') and err.count('\n') == 1, err
    assert message in err
    assert files(out) == []


def test_no_head(script, tmp_path, out):
    params = npz.open_file(FIXTURES / 'vit_token.checkpoint.npz').read()
    npz.save(tmp_path / 'x.npz', {k: v for k, v in params.items() if k != 'head'})
    words = ('--model', tmp_path / 'x.npz', '--format', 'onnx', '--output', out / 'x.onnx')
    status, _, err = script(*words)
    assert status == 1 and 'no classification head' in err and err.count('\n') == 1
    status, text, err = script(*words, '--features', '--no-verify')
    assert status == 0, err
    assert [o.name for o in onnx.load(out / 'x.onnx').graph.output] == ['features']


def test_what_exists_is_kept(script, model, out):
    words = ('--model', model, '--format', 'onnx', '--output', out / 'x.onnx')
    for name in ('x.onnx', 'x.onnx.verify.json', 'x.onnx.data'):
        (out / name).write_text('mine')
        status, _, err = script(*words)
        assert status == 1 and f'{out / name} exists; remove it' in err
        assert files(out) == [name] and (out / name).read_text() == 'mine'
        (out / name).unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_that_cannot_be_written(script, model, out):
    out.chmod(0o500)
    words = ('--model', model, '--format', 'onnx', '--output', out / 'x.onnx')
    status, _, err = script(*words)
    assert status == 1 and f'cannot write {out / "x.onnx"}' in err and err.count('\n') == 1


def test_a_full_disk(script, model, out, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(formats, 'write', full)
    words = ('--model', model, '--format', 'onnx', '--output', out / 'x.onnx')
    status, _, err = script(*words)
    assert status == 1 and files(out) == []
    assert f'cannot write {out / "x.onnx"}: No space left' in err


def test_help_names_every_format():
    assert all(name in export.__doc__ for name in options.FORMATS)


@pytest.mark.skipif(bool(importlib.util.find_spec('tensorrt')), reason='TensorRT is installed')
def test_engine_builder_without_tensorrt(command, out, tmp_path):
    (tmp_path / 'x.onnx').write_bytes(b'')
    builder = ROOT / 'docs' / 'tensorrt' / 'build_engine.py'
    done = command(builder, tmp_path / 'x.onnx', out / 'x.engine')
    assert done.returncode == 1 and files(out) == []
    assert done.stderr.startswith('build_engine.py: tensorrt cannot be imported')
    assert 'pip install tensorrt onnx' in done.stderr and done.stderr.count('\n') == 1
