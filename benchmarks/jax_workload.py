"""The contestants that compute with JAX: ours, the original's way, and a plain matrix product."""

import collections
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import batches, turns
from vit_jax import models, sharding, steps
from vit_jax import state as state_lib
from vit_jax.analysis import cost
from vit_jax.analysis.architecture import Architecture
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.models import encoder
from vit_jax.models.layers import MlpBlock

MATMUL_SIDE = {'cpu': 2048, 'gpu': 8192}


def build(setup: Mapping[str, Any]) -> turns.Workload:
    """Makes the workload of a setup (see `contestants`), compiled and run once."""
    (device, *_) = jax.devices()
    facts = {
        'device': device.device_kind,
        'platform': jax.default_backend(),
        'memory_limit': (device.memory_stats() or {}).get('bytes_limit', 0),
    }
    return {'matmul': Matmul, 'original': Original}.get(setup['contestant'], Ours)(setup, facts)


class _Compiled:
    """What all have in common; `_prepare` gives what to compile, and its first arguments.

    Args:
      setup: see `contestants`; `options` of ours may have attention, remat, accum_steps,
        optim_dtype.
      facts: to begin with; seconds of compilation and FLOPs are added.
    """

    def __init__(self, setup: Mapping[str, Any], facts: Mapping[str, Any]):
        self.facts = dict(facts)
        self._training = setup['mode'] == 'training'
        function, *arguments = self._prepare(setup)
        start = time.perf_counter()
        lowered = function.lower(*arguments)
        traced = time.perf_counter()
        self.function = lowered.compile()
        self.facts |= {
            'trace_s': traced - start,
            'compile_s': time.perf_counter() - traced,
            'xla_flops': (self.function.cost_analysis() or {}).get('flops', 0.0),
        }
        self.run(1)

    def run(self, count: int) -> None:
        """See `turns.Workload.run`."""
        pending = collections.deque[Any]()
        for _ in range(count):
            pending.append(self._step())
            # As the training loop does: the host does not run away from the device.
            while len(pending) > sharding.steps_ahead():
                jax.block_until_ready(pending.popleft())
        jax.block_until_ready(list(pending))

    def peak_memory(self) -> int:
        """See `turns.Workload.peak_memory`; of JAX's first device."""
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get('peak_bytes_in_use') or turns.process_memory()

    def _make_up_params(self, model: nn.Module, setup: Mapping[str, Any]) -> Any:
        params = made_up_params(model, setup['image_size'])
        self.facts['parameters'] = sum(leaf.size for leaf in jax.tree.leaves(params))
        return params

    def _prepare(self, setup: Mapping[str, Any]) -> tuple[Any, ...]:
        raise NotImplementedError

    def _step(self) -> Any:
        raise NotImplementedError


def made_up_params(model: Any, image_size: int) -> Any:
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


def described(setup: Mapping[str, Any]) -> tuple[Architecture, cost.Plan]:
    """The model of a setup, and how it is trained."""
    names = ('variant', 'model_config', 'num_classes', 'image_size')
    options = dict(setup['options'])
    options['accum_steps'] = int(options.get('accum_steps', 1))
    plan = cost.Plan(setup['batch'], dtype=setup['dtype'], **options)
    return Architecture(*(setup[name] for name in names)), plan


class Ours(_Compiled):
    """Our training or prediction step, made by the same functions as a run's."""

    def _prepare(self, setup: Mapping[str, Any]) -> tuple[Any, ...]:
        of, plan = described(setup)
        if plan.accum_steps < 1 or plan.batch % plan.accum_steps:
            raise UserError(f'batch {plan.batch} is not a multiple of accum_steps')
        model, tx, schedule, mesh = cost.training_parts(of, plan)
        params = self._make_up_params(model, setup)
        if not self._training:
            place = sharding.batch_sharding(mesh)
            self._batches = batches.on_device(
                setup, lambda batch: jax.device_put(batch['image'], place)
            )
            self._state = sharding.put_tree(params, sharding.state_sharding(params, mesh))
            return steps.make_predict_step(model), self._state, next(self._batches)
        self._batches = batches.on_device(setup, lambda batch: sharding.put_batch(batch, mesh))
        self._state = state_lib.create_state(params, tx, mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        step = steps.make_train_step(
            model, tx, schedule, mesh, places, seed=0, accum_steps=plan.accum_steps, flip=False
        )
        return step, self._state, next(self._batches)

    def _step(self) -> Any:
        result = self.function(self._state, next(self._batches))
        if self._training:
            self._state, result = result
        return result


class OriginalBlock(encoder.Encoder1DBlock):
    """The block with Flax's own attention: tokens as [B, N, H, K], softmax over [B, H, N, N]."""

    @nn.compact
    def __call__(  # type: ignore[override]  # it takes no mask
        self, inputs: jax.Array, deterministic: bool
    ) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] out."""
        x = nn.LayerNorm(epsilon=1e-6, name='LayerNorm_0')(inputs)
        x = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            kernel_init=nn.initializers.xavier_uniform(),
            broadcast_dropout=False,
            deterministic=deterministic,
            dropout_rate=self.attention_dropout_rate,
            name='MultiHeadDotProductAttention_0',
        )(x, x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic) + inputs
        y = nn.LayerNorm(epsilon=1e-6, name='LayerNorm_1')(x)
        mlp = MlpBlock(self.mlp_dim, self.dropout_rate, name='MlpBlock_0')
        return x + mlp(y, deterministic=deterministic)


class OriginalEncoder(encoder.Encoder):
    """The encoder of such blocks, in float32 throughout; same parameter tree and same logits."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # type: ignore[override]
        """Tokens [B, N, D] in, normalised tokens [B, N, D] out."""
        if self.add_position_embedding:
            x = encoder.AddPositionEmbs(name='posembed_input')(x)
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        for layer in range(self.num_layers):
            x = OriginalBlock(
                mlp_dim=self.mlp_dim,
                num_heads=self.num_heads,
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                name=f'encoderblock_{layer}',
            )(x, not train)
        return nn.LayerNorm(epsilon=1e-6, name='encoder_norm')(x)


class Original(_Compiled):
    """The original release's way of computing, as the point that all else is compared with.

    As google-research/vision_transformer did: `OriginalEncoder`, images normalised on the host,
    labels as one-hot vectors over all classes; of the training state only the parameters are
    donated, the optimizer's state is copied; programs are not kept on disk.
    """

    def _prepare(self, setup: Mapping[str, Any]) -> tuple[Any, ...]:
        classes = setup['num_classes']
        model = models.from_config(
            setup['model_config'], num_classes=classes, encoder=OriginalEncoder
        )
        params = self._make_up_params(model, setup)
        self.params = jax.tree.map(lambda leaf: jax.device_put(np.array(leaf)), params)

        def put(batch: Mapping[str, np.ndarray]) -> list[jax.Array]:
            arrays = [normalize(batch['image'])]
            if self._training:
                arrays.append(np.eye(classes, dtype=np.float32)[batch['label']])
            return jax.device_put(arrays)

        def predict(params, images):
            return model.apply({'params': params}, images, train=False)

        def update(params, opt_state, images, labels, key):
            def loss_fn(params):
                logits = model.apply({'params': params}, images, train=True, rngs={'dropout': key})
                return -jnp.mean(jnp.sum(nn.log_softmax(logits) * labels, axis=-1))

            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        self._batches = batches.on_device(setup, put)
        batch = next(self._batches)
        if not self._training:
            return jax.jit(predict), self.params, *batch
        _, tx, _, _ = cost.training_parts(*described(setup))
        self._opt_state = jax.jit(tx.init)(self.params)
        self._key = jax.random.key(0)
        step = jax.jit(update, donate_argnums=0)
        return step, self.params, self._opt_state, *batch, self._key

    def _step(self) -> Any:
        batch = next(self._batches)
        if not self._training:
            return self.function(self.params, *batch)
        self.params, self._opt_state, loss = self.function(
            self.params, self._opt_state, *batch, self._key
        )
        return loss


class Matmul(_Compiled):
    """A square matrix product: what the device reaches without a model around it."""

    def _prepare(self, setup: Mapping[str, Any]) -> tuple[Any, ...]:
        side = MATMUL_SIDE['cpu' if jax.default_backend() == 'cpu' else 'gpu']
        values = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
        self._factors = [jnp.asarray(v, jnp.dtype(setup['dtype'])) for v in values]
        self.facts['flops'] = 2 * side**3
        return jax.jit(jnp.matmul), *self._factors

    def _step(self) -> jax.Array:
        return self.function(*self._factors)
