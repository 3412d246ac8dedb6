"""The contestants that compute with JAX: ours, the original's way, and a plain matrix product."""

import collections
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import child, feed, original
from configs import common
from vit_jax import models, optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError

MATMUL_SIDE = {'cpu': 2048, 'gpu': 8192}


def build(setup: Mapping[str, Any]) -> child.Workload:
    """Makes the workload of a setup (see `interleave.Cell.setup`), compiled and run once."""
    imported = time.perf_counter() - child.BEGAN
    jax.devices()
    facts = {
        'import_s': imported,
        'device_s': time.perf_counter() - child.BEGAN - imported,
        'device': jax.devices()[0].device_kind,
        'platform': jax.default_backend(),
        'memory_limit': (jax.devices()[0].memory_stats() or {}).get('bytes_limit', 0),
    }
    if setup['contestant'] == 'matmul':
        return _Matmul(setup, facts)
    if setup['contestant'] == 'original':
        return _Original(setup, facts)
    return Ours(setup, facts)


def peak_memory() -> int:
    """See `child.Workload.peak_memory`; of JAX's first device."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get('peak_bytes_in_use') or child.process_memory()


class _Compiled:
    """What all have in common: compile once, keep count of seconds, FLOPs and memory."""

    def __init__(self, facts: Mapping[str, Any]):
        self.facts = dict(facts)
        self._began = time.perf_counter()

    def _compile(self, function: Any, *arguments: Any) -> Any:
        self.facts['init_s'] = time.perf_counter() - self._began
        start = time.perf_counter()
        lowered = function.lower(*arguments)
        middle = time.perf_counter()
        compiled = lowered.compile()
        self.facts['trace_s'] = middle - start
        self.facts['compile_s'] = time.perf_counter() - middle
        self.facts['xla_flops'] = (compiled.cost_analysis() or {}).get('flops', 0.0)
        memory = compiled.memory_analysis()
        self.facts['xla_memory'] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.hlo = compiled.as_text
        return compiled

    def _first(self) -> None:
        start = time.perf_counter()
        self.run(1)
        self.facts['first_step_s'] = time.perf_counter() - start

    def run(self, count: int) -> None:
        """See `child.Workload.run`."""
        pending = collections.deque()
        for _ in range(count):
            pending.append(self._step())
            # As the training loop does: the host does not run away from the device.
            while len(pending) > sharding.steps_ahead():
                jax.block_until_ready(pending.popleft())
        jax.block_until_ready(list(pending))

    def _step(self) -> Any:
        raise NotImplementedError

    def peak_memory(self) -> int:
        """See `child.Workload.peak_memory`."""
        return peak_memory()


class Ours(_Compiled):
    """Our training or prediction step, made by the same functions as a run's.

    Args:
      setup: see `interleave.Cell.setup`; `options` may have attention, remat, accum_steps,
        optim_dtype.
      facts: to begin with.
    """

    def __init__(self, setup: Mapping[str, Any], facts: Mapping[str, Any]):
        super().__init__(facts)
        options = dict(setup['options'])
        self._mesh = sharding.create_mesh(devices=jax.devices()[:1])
        model = models.from_config(
            setup['model_config'],
            num_classes=setup['num_classes'],
            dtype=jnp.dtype(setup['dtype']),
            attention=options.get('attention', 'auto'),
            remat=options.get('remat', ''),
        )
        params = _made_up_params(model, setup['image_size'])
        self.facts['parameters'] = sum(leaf.size for leaf in jax.tree.leaves(params))
        host, same = feed.batches(setup)
        if setup['mode'] == 'training':
            self._start_training(model, params, setup, options)
            put = functools.partial(_put_training, mesh=self._mesh)
        else:
            self._place = sharding.batch_sharding(self._mesh)
            self._params = sharding.put_tree(params, sharding.state_sharding(params, self._mesh))
            self._function = steps.make_predict_step(model)
            put = functools.partial(_put_images, place=self._place)
        self._batches = _on_device(host, put, same)
        batch = next(self._batches)
        first = self._state if setup['mode'] == 'training' else self._params
        self._function = self._compile(self._function, first, batch)
        self._first()

    def _start_training(self, model, params, setup, options) -> None:
        config = common.get_defaults()
        config.optim_dtype = options.get('optim_dtype', config.optim_dtype)
        schedule = optim.create_learning_rate_schedule(
            config.total_steps, config.base_lr, config.decay_type, config.warmup_steps
        )
        tx = optim.create_optimizer(config, schedule)
        self._state = state_lib.create_state(params, tx, self._mesh)
        accum_steps = int(options.get('accum_steps', 1))
        if accum_steps < 1 or setup['batch'] % accum_steps:
            raise UserError(f'batch {setup["batch"]} is not a multiple of accum_steps')
        self._function = steps.make_train_step(
            model,
            tx,
            schedule,
            self._mesh,
            jax.tree.map(lambda leaf: leaf.sharding, self._state),
            seed=0,
            accum_steps=accum_steps,
            flip=False,
        )

    def _step(self) -> Any:
        batch = next(self._batches)
        if hasattr(self, '_state'):
            self._state, metrics = self._function(self._state, batch)
            return metrics
        return self._function(self._params, batch)


class _Original(_Compiled):
    """The original's training or inference step, see `original`."""

    def __init__(self, setup: Mapping[str, Any], facts: Mapping[str, Any]):
        super().__init__(facts)
        model = models.from_config(
            setup['model_config'],
            num_classes=setup['num_classes'],
            encoder=original.OriginalEncoder,
        )
        params = _made_up_params(model, setup['image_size'])
        self.facts['parameters'] = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._params = jax.tree.map(lambda leaf: jax.device_put(np.array(leaf)), params)
        host, same = feed.batches(setup)
        self._training = setup['mode'] == 'training'
        classes = setup['num_classes']

        def put(batch: Mapping[str, np.ndarray]) -> list[jax.Array]:
            arrays = [normalize(batch['image'])]  # on the host, as the original's pipeline did
            if self._training:
                arrays.append(np.eye(classes, dtype=np.float32)[batch['label']])
            return jax.device_put(arrays)

        self._batches = _on_device(host, put, same)
        batch = next(self._batches)
        if self._training:
            config = common.get_defaults()
            schedule = optim.create_learning_rate_schedule(
                config.total_steps, config.base_lr, config.decay_type, config.warmup_steps
            )
            tx = optim.create_optimizer(config, schedule)
            self._opt_state = jax.jit(tx.init)(self._params)
            self._key = jax.random.key(0)
            function = original.make_train_step(model, tx, classes)
            self._function = self._compile(
                function, self._params, self._opt_state, *batch, self._key
            )
        else:
            self._function = self._compile(original.make_predict(model), self._params, *batch)
        self._first()

    def _step(self) -> Any:
        batch = next(self._batches)
        if not self._training:
            return self._function(self._params, *batch)
        self._params, self._opt_state, loss = self._function(
            self._params, self._opt_state, *batch, self._key
        )
        return loss


class _Matmul(_Compiled):
    """A square matrix product: what the device reaches without a model around it."""

    def __init__(self, setup: Mapping[str, Any], facts: Mapping[str, Any]):
        super().__init__(facts)
        side = MATMUL_SIDE['cpu' if jax.default_backend() == 'cpu' else 'gpu']
        values = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
        self._factors = [jnp.asarray(v, jnp.dtype(setup['dtype'])) for v in values]
        self.facts['flops'] = 2 * side**3
        self._function = self._compile(jax.jit(jnp.matmul), *self._factors)
        self._first()

    def _step(self) -> jax.Array:
        return self._function(*self._factors)


def _made_up_params(model: Any, image_size: int) -> Any:
    """Parameters as good as initial ones, but on the host and with nothing to compile.

    Most runs read theirs from a file; and the peers' initial values are not compiled, either.
    """
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False)['params'], images
    )
    rng = np.random.default_rng(0)

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key in ('scale', 'bias'):
            return np.full(leaf.shape, path[-1].key == 'scale', leaf.dtype)
        return 0.02 * rng.standard_normal(leaf.shape, leaf.dtype)

    return jax.tree.map_with_path(value, shapes)


def _on_device(host: Iterator[dict], put: Any, same: bool) -> Iterator[Any]:
    """Batches on the device; made-up ones stay there."""
    batch = put(next(host))
    while True:
        yield batch
        if not same:
            batch = put(next(host))


def _put_training(batch: dict[str, np.ndarray], mesh: Any) -> dict[str, jax.Array]:
    return sharding.put_batch(batch | {'stop': np.zeros_like(batch['label'])}, mesh)


def _put_images(batch: dict[str, np.ndarray], place: Any) -> jax.Array:
    return jax.device_put(batch['image'], place)
