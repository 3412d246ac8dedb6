"""What an exported model computes, as JAX computes it: one definition for exporting and checking.

Names and shapes of the outputs (B batch, C classes, D width, L blocks, H heads, N tokens):

    logits         [B, C] float32 ([B, N, C] where the tokens are not pooled)
    probabilities  softmax of the logits over classes
    features       [B, D]: what the encoder gives, pooled, before the head and its hidden layer; the
                   output of `pre_logits` where there is one; of a distilled model the mean of both
                   tokens ([B, N, D] where the tokens are not pooled)
    attention      [B, L, H, N, N]: the attention weights of every block, after the softmax
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.errors import UserError

OUTPUTS = ('logits', 'probabilities', 'features', 'attention')

_NO_HEAD = (
    'this model has no classification head, so it has no logits. Fine-tune it first, or export '
    'its features'
)


def check(module: nn.Module, outputs: Sequence[str]) -> None:
    """Raises `UserError` if a model does not have these outputs.

    Args:
        module: a model of this package.
        outputs: names among `OUTPUTS`.
    """
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise UserError(f'unknown output {unknown[0]!r}: of {", ".join(OUTPUTS)}')
    if not module.num_classes and {'logits', 'probabilities'} & set(outputs):
        raise UserError(_NO_HEAD)
    if 'attention' in outputs and isinstance(module, models.MlpMixer):
        raise UserError('an MLP-Mixer has no attention')


def forward(
    module: nn.Module, outputs: Sequence[str]
) -> Callable[[Mapping[str, Any], jax.Array], dict[str, jax.Array]]:
    """The function that an export stands for.

    Args:
        module: a model of this package; computed in float32, attention by plain XLA operations,
            whatever it says itself, so that the result runs on any device.
        outputs: names among `OUTPUTS`.

    Returns:
        A pure function of (parameters, images [B, S, S, 3] float32 in [-1, 1]) that gives a dict of
        float32 arrays in the order of `outputs`.

    Raises:
        UserError: see `check`.
    """
    check(module, outputs)
    module = module.clone(dtype=jnp.float32, remat='')
    if not isinstance(module, models.MlpMixer):
        module = module.clone(attention='xla')

    def run(params: Mapping[str, Any], images: jax.Array) -> dict[str, jax.Array]:
        logits, found = models.apply_with_intermediates(
            module, params, images, attention_weights='attention' in outputs
        )
        compute = {
            'logits': lambda: logits,
            'probabilities': lambda: jax.nn.softmax(logits, axis=-1),
            'features': lambda: _features(module, found['pre_logits']),
            'attention': lambda: _attention(found),
        }
        return {name: compute[name]() for name in outputs}

    return run


def runner(
    module: nn.Module, params: Mapping[str, Any], outputs: Sequence[str]
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """`forward`, compiled, with matrix products in exact float32 (no TF32 or bfloat16).

    Args:
        module: see `forward`.
        params: its parameters.
        outputs: see `forward`.

    Returns:
        A function of images [B, S, S, 3] float32 in [-1, 1].
    """
    params = jax.device_put(params)
    compiled = jax.jit(forward(module, outputs))

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with jax.default_matmul_precision('highest'):
            return jax.device_get(compiled(params, images))

    return run


def _features(module: nn.Module, features: jax.Array) -> jax.Array:
    return features.mean(axis=1) if getattr(module, 'distilled', False) else features


def _attention(found: Mapping[str, jax.Array]) -> jax.Array:
    blocks: list[jax.Array] = []
    while (name := f'Transformer/encoderblock_{len(blocks)}/attention_weights') in found:
        blocks.append(found[name])
    return jnp.stack(blocks, axis=1)
