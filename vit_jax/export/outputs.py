"""The function that an exported model computes, and the names of what it gives.

Names and shapes of the outputs (B batch, C classes, D width, L blocks, H heads, N tokens):

    logits         [B, C] float32 ([B, N, C] where the tokens are not pooled)
    probabilities  softmax of the logits over classes; of a multi-label model, sigmoids
    features       [B, D]: what the encoder gives, pooled, before the head and its hidden layer; the
                   output of `pre_logits` where there is one; of a distilled model the mean of both
                   tokens ([B, N, D] where the tokens are not pooled)
    attention      [B, L, H, N, N]: the attention weights of every block, after the softmax
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax import models
from vit_jax.errors import UserError


def check_outputs(module: Any, outputs: Sequence[str]) -> None:
    """Raises `UserError` if a model of this package does not have these outputs."""
    if not module.num_classes and {'logits', 'probabilities'} & set(outputs):
        raise UserError(
            'this model has no classification head, so it has no logits. Fine-tune it first, or '
            'export its features'
        )
    if 'probabilities' in outputs and getattr(module, 'regression', False):
        raise UserError('this model gives numbers, which have no probabilities: export them as is')
    if 'attention' in outputs and isinstance(module, models.MlpMixer):
        raise UserError('an MLP-Mixer has no attention')


def forward(
    module: Any, outputs: Sequence[str]
) -> Callable[[Mapping[str, Any], jax.Array], dict[str, jax.Array]]:
    """The function that an export stands for.

    Args:
        module: a model of this package; computed in float32, attention by plain XLA operations,
            whatever it says itself, so that the result runs on any device.
        outputs: names of outputs, see above.

    Returns:
        A pure function of (parameters, images [B, S, S, 3] float32 in [-1, 1]) that gives a dict of
        float32 arrays in the order of `outputs`.

    Raises:
        UserError: see `check_outputs`.
    """
    check_outputs(module, outputs)
    module = module.clone(dtype=jnp.float32, remat='')
    if not isinstance(module, models.MlpMixer):
        module = module.clone(attention='xla')
    if 'attention' not in outputs:  # whose last block has weights for every token
        module = models.for_inference(module)

    def run(params: Mapping[str, Any], images: jax.Array) -> dict[str, jax.Array]:
        logits, found = models.apply_with_intermediates(
            module, params, images, attention_weights='attention' in outputs
        )
        values = {'logits': logits, 'features': found['pre_logits']}
        if getattr(module, 'distilled', False):
            values['features'] = values['features'].mean(axis=1)
        if 'probabilities' in outputs:
            many = getattr(module, 'multi_label', False)
            values['probabilities'] = jax.nn.sigmoid(logits) if many else jax.nn.softmax(logits)
        if 'attention' in outputs:
            blocks = [
                f'Transformer/encoderblock_{i}' for i in range(module.transformer['num_layers'])
            ]
            weights = [found[f'{block}/attention_weights'] for block in blocks]
            values['attention'] = jnp.stack(weights, axis=1)
        return {name: values[name] for name in outputs}

    return run
