"""scripts/benchmark.py, benchmark_data.py and profile_step.py, and what they measure with."""

import argparse
import json
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import (
    contestants,
    input_stages,
    jax_workload,
    largest,
    onnx_files,
    steps,
    trace,
    turns,
)
from vit_jax import models, variants
from vit_jax.analysis import counts
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'benchmarks' / 'results'

# A contestant that needs neither JAX nor PyTorch, and has memory for 6 images.
SLEEPER = """
import os
import time
class Sleeper:
    facts = {'platform': 'cpu', 'flops': 100}
    def __init__(self, setup):
        print('a library prints to stdout')
        self.name = setup['contestant']
        if setup['batch'] > 6:
            raise MemoryError
        if self.name == 'broken':
            raise ValueError('no such thing')
    def run(self, steps):
        time.sleep(0.01 * steps)
        with open(os.environ['ORDER_FILE'], 'a') as file:
            file.write(self.name)
    def peak_memory(self):
        return 7
build = Sleeper
"""


class Sleeper(contestants.Contestant):
    module = 'sleeper'


@pytest.fixture
def sleepers(tmp_path, monkeypatch):
    (tmp_path / 'sleeper.py').write_text(SLEEPER)
    (tmp_path / 'dies.py').write_text('import sys; sys.exit("out of memory")')
    (tmp_path / 'hangs.py').write_text('import time; time.sleep(60)')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setenv('ORDER_FILE', str(tmp_path / 'order'))
    return tmp_path


def small_config(layers=1):
    config = variants.get_config('ViT-Ti_16').to_dict()
    config['hidden_size'] = 24
    config['transformer'] |= {'num_layers': layers, 'mlp_dim': 32}
    return config


def cell(**changes):
    return {
        'variant': 'small', 'model_config': small_config(), 'num_classes': 5, 'image_size': 32,
        'dtype': 'float32', 'batch': 2, 'mode': 'inference', 'data': '', 'cores': 1,
    } | changes  # fmt: skip


def test_the_originals_way_gives_the_same_logits():
    config, rng = small_config(layers=2), np.random.default_rng(0)
    ours = models.from_config(config, num_classes=5)
    theirs = models.from_config(config, num_classes=5, encoder=jax_workload.OriginalEncoder)
    images = rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda x: ours.init(jax.random.key(0), x, train=False), images)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    logits, others = (
        jax.jit(lambda p, x, m=m: m.apply(p, x, train=False))(params, images)
        for m in (ours, theirs)
    )
    assert np.abs(logits).max() > 0.1
    np.testing.assert_allclose(others, logits, rtol=1e-5, atol=1e-5)


def test_rounds_time_each_contestant_once_in_rotated_order(sleepers):
    people = [Sleeper(name) for name in ('a', 'broken', 'b')]
    timing = argparse.Namespace(rounds=3, steps=2, warmup=0, warm_start=True, timeout=60)
    a, broken, b = steps.time_cell(cell(), people, timing)
    assert broken == {'contestant': 'broken', 'error': 'ValueError: no such thing'}
    for row in (a, b):
        assert len(row['seconds']) == 3 and row['steps'] == 2 and row['peak_memory'] == 7
        assert min(row['seconds']) >= 0.01
        assert row['ready_s'] > 0 and row['ready_warm_s'] > 0
    assert (sleepers / 'order').read_text() == 'ab' + 'ba' + 'ab'


def test_a_contestant_that_dies_or_hangs_is_an_error(sleepers):
    with pytest.raises(turns.ContestantError, match='ended with status 1: out of memory'):
        turns.Child('dies', {}, timeout=60)
    with pytest.raises(turns.ContestantError, match='no answer within 0.5 s'):
        turns.Child('hangs', {}, timeout=0.5)


def test_contestants_of_a_command_line():
    (ours,) = contestants.parse(['vit_jax:remat=full,accum_steps=4'])
    assert (ours.name, ours.options) == ('vit_jax', {'remat': 'full', 'accum_steps': '4'})
    for wrong in (['tim'], ['vit_jax:speed=9'], ['timm:remat=full'], ['timm', 'timm']):
        with pytest.raises(UserError):
            contestants.parse(wrong)
    mixer = variants.get_config('Mixer-B_16').to_dict()
    peer = contestants.Contestant('transformers')
    assert peer.reason_to_leave_out(mixer, 'float32')
    (way,) = contestants.parse(['original'])
    assert way.reason_to_leave_out(small_config(), 'bfloat16') == 'computes in float32 only'
    assert way.reason_to_leave_out(small_config(), 'float32') == ''


def test_published_peaks_by_the_names_that_devices_give_themselves():
    assert steps.published_peak('NVIDIA H200', 'bfloat16')['flops'] == 989e12
    assert steps.published_peak('NVIDIA GeForce RTX 4090', 'float32')['flops'] == 82.6e12
    assert steps.published_peak('some other card', 'float32') is None


def test_benchmark_measures_in_a_process_of_its_own_and_writes_tables(
    run_script, tmp_path, monkeypatch
):
    monkeypatch.setitem(variants.VARIANTS, 'small', small_config() | {'model_name': 'small'})
    # The children are to compute as ours does for users: on one device.
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
    # The products of matrices are large, and other contestants' are alike.
    monkeypatch.setattr(contestants, 'MATMULS', ())
    file = tmp_path / 'result.json'
    done = run_script(
        'benchmark.py', '--variants', 'small', '--image_size', 32, '--batch', 2, '--rounds', 3,
        '--num_classes', 5, '--modes', 'inference', '--contestants', 'vit_jax',
        '--steps', 1, '--skip_warm_start', '--peak_tflops', 1, '--output', file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text()
    (row,) = result['cells'][0]['results']
    formula = result['cells'][0]['flops_per_image'] * 2
    formula -= 2 * 2 * counts.unused_macs(small_config(), 32)
    # A model this small is mostly what the formula leaves out; the same order of size.
    assert 1 <= row['facts']['xla_flops'] / formula < 3
    assert len(row['seconds']) == 3 and row['peak_memory'] > 0
    table = run_script('benchmark.py', '--table', file)
    assert table.returncode == 0
    assert '| small | 32 | float32 | 2 | vit_jax' in ' '.join(table.stdout.split())
    page = tmp_path / 'page.md'
    page.write_text('a\n<!-- benchmark -->\nbefore\n<!-- /benchmark -->\nb\n')
    assert run_script('benchmark.py', '--table', file, '--update', page).returncode == 0
    assert page.read_text().splitlines()[:3] == ['a', '<!-- benchmark -->', '']
    assert page.read_text().endswith('\n\n<!-- /benchmark -->\nb\n')
    assert table.stdout.strip() in page.read_text() and 'before\n' not in page.read_text()
    turned = 'a\n<!-- /benchmark -->\n<!-- benchmark -->\n'
    page.write_text(turned)
    wrong = run_script('benchmark.py', '--table', file, '--update', page)
    assert wrong.returncode == 1 and 'expected a line <!-- benchmark -->' in wrong.stderr
    assert page.read_text() == turned
    file.write_text('{}')
    wrong = run_script('benchmark.py', '--table', file)
    assert wrong.returncode == 1 and 'is not a result' in wrong.stderr


def test_a_training_step_in_the_originals_way():
    way = contestants.Contestant('original')
    workload = jax_workload.build(way.setup(cell(mode='training')))
    workload.run(2)
    # The first update has a learning rate of 0; then the warm-up begins.
    assert np.abs(workload.params['head']['bias']).max() > 0
    expected = sum(p.parameters for p in counts.parts(small_config(), 5, 32))
    assert workload.facts['parameters'] == expected


@pytest.mark.parametrize('limit', [0, 1, 5, 77, 100, 1000])
def test_search_for_the_largest_batch(limit):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = largest.search(fits, 8)
    assert limit * 0.93 <= found <= limit
    assert len(tried) == len(set(tried)) <= 12


def test_running_out_of_memory_ends_a_try_and_no_more(sleepers):
    people = [Sleeper(name) for name in ('a', 'broken')]
    arguments = (cell(batch=4), people, 60)
    a, broken = largest.measure(*arguments, memory_gib=8, say=lambda text: None)
    assert a['largest'] == 6 and a['facts']['platform'] == 'cpu'
    assert broken['error'] == 'ValueError: no such thing'
    with pytest.raises(UserError, match='needs --memory_gib'):
        largest.measure(*arguments, memory_gib=0, say=lambda text: None)


def test_results_that_documents_show_can_be_read(run_script, tmp_path):
    files, page = sorted(RESULTS.glob('*.json')), tmp_path / 'performance.md'
    text = (ROOT / 'docs' / 'performance.md').read_text()
    first, _, rest = text.partition('<!-- benchmark -->')
    page.write_text(f'{first}<!-- benchmark -->\n{rest[rest.index("<!-- /benchmark -->") :]}')
    done = run_script('benchmark.py', '--table', *files, '--update', page)
    assert done.returncode == 0 and page.read_text() == text
    assert text.count('**Training: AMD EPYC, 2 cores**') == len(files) == 6
    files = sorted((RESULTS / 'data').glob('*.json'))
    done = run_script('benchmark_data.py', '--table', *files)
    assert done.returncode == 0 and done.stdout.count('**Whole pipeline**') == len(files) > 0
    done = run_script('benchmark_export.py', '--table', *files)
    assert done.returncode == 1 and 'is not a result of scripts/benchmark_export' in done.stderr


def test_tables_of_exports():
    rows = [
        {'contestant': name, 'batch': 2, 'nodes': nodes, 'seconds': seconds}
        for name, nodes, seconds in (
            ('vit_jax', 10, [0.1, 0.2, 0.3]),
            ('transformers', 30, [0.5, 0.4, 0.3]),
        )
    ]
    hardware = {'processor': 'x', 'cores': 2, 'load_average': 0.5}
    result = {
        'model': 'm', 'image_size': 224, 'threads': 2, 'results': rows, 'left_out': [],
        'largest_difference_of_logits': {'2': 1e-6}, 'hardware': hardware, 'versions': {},
        'command': 'c', 'date': 'd',
    }  # fmt: skip
    (table,) = onnx_files.tables(result)
    assert table.rows[0] == ['vit_jax', '10', '2', '200.0', '150 - 250', '100', '10.0', '2.00']
    assert table.rows[1][-1] == '1.00' and 'logits 1.0e-06; x, 2 cores' in table.notes[0]
    logits = np.ones((2, 5), np.float32)
    assert onnx_files._compare({'vit_jax': logits, 'transformers': logits}) == 0
    with pytest.raises(UserError, match='not the same model'):
        onnx_files._compare({'vit_jax': logits, 'transformers': logits + 0.01})


def test_parts_of_a_model_in_the_names_of_operations():
    start = 'jit(train_step)/transpose(jvp(VisionTransformer))/Transformer/'
    name = start + 'encoderblock_11/MlpBlock_0/Dense_0/dot_general'
    assert trace.part_of(name) == 'backward Transformer/encoderblock_*/MlpBlock_0/Dense_0'
    assert trace.part_of('jit(train_step)/mul') == 'optimizer, loss and the rest'
    known = trace.operations(
        '  %dot.3 = (f32[2,3]{1,0}, f32[4]{0}) fusion(%a), metadata={op_name="jit(f)/head/add"}\n'
        '  ROOT %while.1 = f32[] while(%b)\n'
    )
    assert known['dot.3'] == trace.Operation('fusion', 'head', 'biases')
    assert known['while.1'].kind == 'while'


PROGRAM = """
%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %e = f32[2]{0} exponential(%p), metadata={op_name="jit(f)/jvp(V)/block_0/Attention_0/exp"}
  ROOT %b = f32[2]{0} broadcast(%e), metadata={op_name="jit(f)/jvp(V)/block_0/LayerNorm_0/x"}
}

%product (q: f32[2]) -> f32[2] {
  %q = f32[2]{0} parameter(0)
  %dot.1 = f32[2]{0} dot(%q, %q)
  ROOT %t = f32[2]{0} tanh(%dot.1), metadata={op_name="jit(f)/jvp(V)/block_0/MlpBlock_0/tanh"}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %fusion.1 = f32[2]{0} fusion(%a), kind=kLoop, calls=%fused
  %fusion.2 = f32[2]{0} fusion(%a), kind=kCustom, calls=%product
  %custom.3 = f32[2]{0} custom-call(%a), custom_call_target="__cublas$gemm"
  %copy.4 = f32[2]{0} copy(%fusion.1), metadata={op_name="jit(f)/jvp(V)/block_0/MlpBlock_0/x"}
  %mul.5 = f32[2]{0} multiply(%a, %a), metadata={op_name="jit(f)/mul"}
  ROOT %add.6 = f32[2]{0} add(%a, %a), metadata={op_name="jit(f)/jvp(V)/block_0/add"}
}
"""


def test_kinds_of_work_of_a_program():
    known = trace.operations(PROGRAM)
    found = {name: known[name].work for name in known if '.' in name}
    assert found == {
        'dot.1': 'matrix products',
        'fusion.1': 'softmax',
        'fusion.2': 'matrix products',
        'custom.3': 'matrix products',
        'copy.4': 'copies, transposes, broadcasts',
        'mul.5': 'optimizer and loss',
        'add.6': 'others',
    }


def test_profile_of_a_step(run_script, monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, 'small', small_config() | {'model_name': 'small'})
    done = run_script(
        'profile_step.py', '--variant', 'small', '--image_size', 32, '--batch', 2, '--steps', 2,
        '--num_classes', 5, '--mode', 'training', '--format', 'csv',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'part of the model,ms a step' in done.stdout
    assert 'encoderblock_*' in done.stdout
    assert 'backward ' in done.stdout
    assert 'branch_' not in done.stdout  # of what depends on the platform, see `models.cpu`
    kinds = {line.split(',')[0] for line in done.stdout.splitlines()}
    assert kinds >= {'matrix products', 'softmax', 'layer norm', 'GELU', 'optimizer and loss'}


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{index}.jpg')
    return tmp_path


def test_input_pipeline_by_stage_and_by_threads(run_script, photos):
    file = photos / 'result.json'
    done = run_script(
        'benchmark_data.py', '--folder', photos, '--image_size', 32, '--batch', 2, '--rounds', 2,
        '--workers', 1, '--contestants', 'vit_jax', '--output', file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result['images'] == 4
    assert str(photos) not in file.read_text()
    (row,) = result['stages']
    assert len(row['timed']) == 2
    for timed in row['timed']:
        assert list(timed) == ['read', 'decode', 'crop', 'resize', 'batch', 'transfer']
        assert all(seconds > 0 for seconds in timed.values())
    ((whole,),) = (part['results'] for part in result['whole'])
    assert [list(timed) for timed in whole['timed']] == [['all'], ['all']]
    assert 'Whole pipeline' in done.stdout
    table = run_script('benchmark_data.py', '--table', file)
    assert table.returncode == 0 and '| vit_jax ' in table.stdout
    assert f'{4 / np.median([t["all"] for t in whole["timed"]]):.0f} |' in table.stdout
    file.write_text('{"kind": "vit_jax benchmark of data", "format": 1}')
    old = run_script('benchmark_data.py', '--table', file)
    assert old.returncode == 1 and 'measure again' in old.stderr
    file.write_text('{}')
    wrong = run_script('benchmark_data.py', '--table', file)
    assert wrong.returncode == 1 and 'is not a result' in wrong.stderr


@pytest.mark.parametrize('name', ['exact=False', 'cache'])
def test_ways_of_our_input_pipeline(name, photos):
    files = [str(path) for path in sorted(photos.glob('*.jpg'))]
    setup = {'files': files, 'crop': 8, 'batch': 2, 'workers': 1}
    setup |= {'contestant': f'vit_jax:{name}'}
    workload = input_stages.build(setup)
    try:
        assert workload.run(1)['timed']['all'] > 0
        batch = next(workload._stream)
        assert batch['image'].shape == (2, 8, 8, 3)
        assert batch['image'].dtype == (np.uint8 if name == 'exact=False' else np.float32)
    finally:
        workload._stream.close()
    if name == 'exact=False':
        timed = input_stages.build(setup | {'workers': 0}).run(1)['timed']
        assert timed['decode'] > 0 and timed['resize'] > 0
