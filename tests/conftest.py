"""Strict settings for all tests, and what they share."""

import gc
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import forked
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def pytest_configure(config):
    """Four virtual CPU devices, exact matrix products, no silent broadcasting; GPU only if asked
    for.
    """
    if 'gpu' not in config.getoption('markexpr'):
        os.environ['JAX_PLATFORMS'] = 'cpu'
        os.environ['JAX_NUM_CPU_DEVICES'] = '4'
        # LLVM's optimisation takes a third of the time of compiling, and few tests run for long;
        # XLA's newer code for fused operations takes two thirds of the rest (without a meaning in
        # JAX 0.12). Virtual devices wait for each other; on a busy machine for longer than 40 s.
        # Flags that are set already win: the last of a name counts.
        os.environ['XLA_FLAGS'] = (
            '--xla_backend_optimization_level=0 '
            '--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true '
            '--xla_cpu_parallel_codegen_split_count=1 '
            '--xla_cpu_collective_call_terminate_timeout_seconds=600 '
            + os.environ.get('XLA_FLAGS', '')
        ).strip()
    # Tracing makes many objects that stay: to look for cycles among them as often as Python does
    # takes a quarter of the time.
    gc.set_threshold(50_000, 20, 20)
    # A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What one test has compiled, others need not, in any worker, child process or later run.
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = config.rootpath / '.pytest_cache' / 'compiled'
        if sum(path.stat().st_size for path in folder.glob('*')) > 2**30:
            shutil.rmtree(folder)
        os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
        os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    import jax

    # JAX has read the environment already if the conftest of a folder imported it before this one.
    for name in ('JAX_PLATFORMS', 'JAX_COMPILATION_CACHE_DIR'):
        if name in os.environ:
            jax.config.update(name.lower(), os.environ[name])
    for name in ('JAX_NUM_CPU_DEVICES', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
        if name in os.environ:
            jax.config.update(name.lower(), json.loads(os.environ[name]))
    jax.config.update('jax_cpu_enable_async_dispatch', False)  # as `sharding.steps_ahead` says
    jax.config.update('jax_numpy_rank_promotion', 'raise')
    jax.config.update('jax_default_matmul_precision', 'highest')


# Files that take half a minute or more, in the order in which they are given to the workers.
LONG = (
    'test_scripts.py', 'test_kill.py', 'test_several_processes.py', 'test_steps.py',
    'test_docs.py', 'test_resources.py', 'test_train.py', 'test_train_faults.py',
    'test_train_families.py', 'test_preemption.py', 'test_vit.py', 'test_cost.py',
    'test_compare.py', 'test_families.py', 'test_cpu.py', 'test_verify.py', 'test_report.py',
    'test_train_own.py', 'test_steps_library.py', 'test_telemetry.py', 'test_attention.py',
    'test_prepare.py', 'test_main.py', 'test_fuzz.py',
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files come first, so that no worker is left alone with one at the end. Skips what needs
    a GPU where there is none, saying so.
    """
    place = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))
    if any(item.get_closest_marker('gpu') for item in items):
        import jax

        if jax.default_backend() != 'gpu':
            for item in items:
                if item.get_closest_marker('gpu'):
                    item.add_marker(pytest.mark.skip(reason='needs an NVIDIA GPU: pytest -m gpu'))


def pytest_collection_finish():
    """What is imported by now stays: no later collection looks through it."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Says how the process of a worker died: which signal killed it (-9: often for memory)."""
    if error == 'Not properly terminated':
        status = node.gateway._io.popen.wait(60)
        print(f'\nThe process of worker {node.gateway.id} ended with status {status}')


@pytest.fixture(scope='session')
def shared_dir() -> pathlib.Path:
    """The folder `shared` beside the project: flowers, weights, the original's answers."""
    folder = ROOT.parent / 'shared'
    if not (folder / 'conformance').is_dir():
        pytest.skip('the folder ../shared (real data and weights) is not there')
    return folder


@pytest.fixture
def command(tmp_path):
    """Runs a command line of the project as a user would, on one CPU device, and returns what it
    gave. `fresh` starts a Python for it; else it is forked, with the slow imports done.
    """

    def run(*words, env=None, timeout=300, fresh=False) -> subprocess.CompletedProcess:
        words = [str(word) for word in words]
        env = {
            **os.environ,
            'JAX_PLATFORMS': 'cpu',
            'JAX_NUM_CPU_DEVICES': '1',
            'VIT_JAX_CACHE': str(tmp_path / 'cache'),
            **(env or {}),
        }
        if not fresh:
            return forked.run(words, folder=tmp_path / 'output', cwd=ROOT, env=env, timeout=timeout)
        return subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs `main` of a command in scripts/ in this process, where JAX has started already, and
    returns what it gave.
    """

    def run(script, *words) -> subprocess.CompletedProcess:
        spec = importlib.util.spec_from_file_location(script[:-3], ROOT / 'scripts' / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, 'argv', [script, *map(str, words)])
        capsys.readouterr()
        status = module.main()
        return subprocess.CompletedProcess(sys.argv, status, *capsys.readouterr())

    return run


@pytest.fixture(scope='session')
def tiny_model():
    """Makes models of one small layer, for images of 16 x 16, with random weights, the head's too:
    every image gets its own answer.
    """
    import jax
    import modules
    import numpy as np

    from vit_jax import models
    from vit_jax.data.preprocess import Preprocess
    from vit_jax.inference import model_folder

    config = {
        'model_name': None,
        'patches': {'size': (8, 8)},
        'hidden_size': 8,
        'transformer': {
            'mlp_dim': 16,
            'num_heads': 2,
            'num_layers': 1,
            'attention_dropout_rate': 0.0,
            'dropout_rate': 0.0,
        },
        'classifier': 'token',
        'representation_size': None,
    }

    def make(class_names, source=None, folder=None) -> model_folder.Model:
        """Also writes its model folder, if `folder` says where."""
        module = models.from_config(config, num_classes=len(class_names))
        image = np.zeros((1, 16, 16, 3), np.float32)
        shapes = modules.shapes(module, image, train=False)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
        model = model_folder.Model(
            module, params, config, tuple(class_names), Preprocess(crop=16), source or {}
        )
        if folder:
            model_folder.save(
                folder,
                params,
                model_config=config,
                class_names=class_names,
                preprocess=model.preprocess,
                source=model.source,
            )
        return model

    return make
