"""vit_jax summary and vit_jax cost, as a user runs them."""

import csv
import importlib.util
import pathlib
import re
import sys
import types

import pytest

from vit_jax import variants

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script's `main` in this process: starting JAX for each would take most of the time."""

    def run(script, *arguments):
        spec = importlib.util.spec_from_file_location(script[:-3], ROOT / 'scripts' / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, 'argv', [script, *arguments])
        code = module.main()
        out, err = capsys.readouterr()
        return types.SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def test_summary_as_torchsummary(run):
    done = run(
        'summary.py', '--variant', 'ViT-B_16', '--num_classes', '5', '--style', 'torchsummary'
    )
    assert (done.returncode, done.stderr) == (0, '')
    for line in ('Forward/backward pass size (MB): 408.54', 'Estimated Total Size (MB): 735.84'):
        assert line in done.stdout


def test_summary_of_the_module_for_programs(run):
    done = run('summary.py', '--variant', 'ViT-Ti_16', '--num_classes', '5', '--format', 'csv')
    assert (done.returncode, done.stderr) == (0, '')
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert rows[0]['layer'] == ''
    assert rows[0]['parameters'] == '5525381'
    assert rows[-1]['layer'] == 'head'
    assert rows[-1]['output_shape'] == '[1,5]'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--variant', 'ViT-B_61'), "unknown model 'ViT-B_61'"),
        (('--variant', 'ViT-B_16', '--image_size', '230'), 'use 224 or 240'),
        (('--variant', 'Mixer-B_16', '--style', 'torchsummary'), 'use --style jax'),
        (('--model', '/nowhere'), '/nowhere'),
    ],
)
def test_summary_says_what_is_wrong_in_a_line(run, arguments, message):
    done = run('summary.py', *arguments)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('summary.py: ') and message in done.stderr
    assert done.stderr.count('\n') == 1


def test_cost_of_a_model(run):
    done = run('cost.py', '--variant', 'ViT-L_16', '--batch', '256', '--optimizer', 'adamw')
    assert (done.returncode, done.stderr) == (0, '')
    assert '61.555 G multiply-accumulates' in done.stdout
    assert '12 h^2 + 13 h = 12,596,224' in done.stdout
    assert re.search(r'largest batch +\d+', done.stdout)
    assert 'Published figures: NVIDIA H200 datasheet' in done.stdout


def test_cost_of_all_variants(run):
    done = run(
        'cost.py', '--all', '--device', 'l4', '--image_size', '224', '384', '--format', 'csv'
    )
    assert (done.returncode, done.stderr) == (0, '')
    rows = {
        (row['Variant'], row['Pixels']): row for row in csv.DictReader(done.stdout.splitlines())
    }
    plain, full = (
        int(rows['ViT-B_16', '384'][key].replace(',', '')) for key in ('Batch', 'remat full')
    )
    assert 0 < plain < full
    assert ('ViT-H_14', '384') not in rows  # 384 is no multiple of 14


def test_cost_beside_xla(run, monkeypatch):
    config = variants.get_config('ViT-Ti_16').to_dict()
    config['transformer']['num_layers'] = 1  # The smallest of the table takes a minute to compile.
    monkeypatch.setitem(variants.VARIANTS, 'one-block', config)
    arguments = ('--variant', 'one-block', '--image_size', '32', '--batch', '32')
    done = run('cost.py', *arguments, '--dtype', 'float32', '--xla', '--num_classes', '5')
    assert (done.returncode, done.stderr) == (0, '')
    assert 'formula beside XLA' in done.stdout
    assert re.search(r'TFLOPs, batch 32 +\d', done.stdout)
    assert re.search(r'GiB, batch 32 +\d', done.stdout)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--variant', 'ViT-B_16', '--device', 'h20'), "nearest: 'h200'"),
        (('--variant', 'ViT-B_16', '--batch', '30', '--accum_steps', '8'), 'use 32'),
        (('--variant', 'ViT-B_16', '--utilisation', '40'), 'expected a share'),
        (('--variant', 'ViT-B_16', '--memory_gib', '8'), 'give both'),
    ],
)
def test_cost_says_what_is_wrong_in_a_line(run, arguments, message):
    done = run('cost.py', *arguments)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('cost.py: ') and message in done.stderr
    assert done.stderr.count('\n') == 1
