"""Names of a state dict as training scripts leave them: wrappers, prefixes, parts of other models.

What is taken off or left out is said. Which library's names are below is for `key_tables`.
"""

import re
from collections.abc import Mapping
from typing import Any

from vit_jax.checkpoint import key_tables
from vit_jax.errors import UserError

# Buffers that the modules of PyTorch count or look up with; they are whole numbers, no weights.
BUFFERS = re.compile(r'(?:.*\.)?(?:position_ids|num_batches_tracked)')
# The first layer of an image model, whatever stands before its name.
_FIRST_LAYER = re.compile(
    r'(.*\.)?(?:patch_embed\.(?:proj|backbone\.(?:stem\.)?conv)|conv_proj|stem\.proj'
    r'|embeddings\.patch_embeddings\.projection|embeddings\.patch_embeddings?)\.weight'
)
# Of several copies of a model: averaged weights first, what was trained next.
_COPIES = ('teacher', 'ema', 'target_encoder', 'student', 'base_encoder')
# Of the models of Hugging Face, in which they have a head: nothing to talk of.
_BASE_MODELS = ('vit.', 'deit.', 'ijepa.', 'dinov2.', 'dinov2_with_registers.', 'dinov3_vit.')
_DECODER = re.compile(r'decoder[._].*')
_POOLER = re.compile(r'(?:.*\.)?pooler\.dense\.(?:weight|bias)')
_CLASSIFIER = re.compile(r'(?:cls_)?classifier\.weight')


def clean(tensors: Mapping[str, Any], path: Any) -> tuple[dict[str, Any], list[str]]:
    """Leaves of a training script's tensors those of the image model, under its own names.

    Args:
        tensors: name -> array.
        path: where they come from, for errors.

    Returns:
        (the tensors, what was done: a sentence each).

    Raises:
        UserError: there are several models, and nothing tells which one is meant.
    """
    found, notes = dict(tensors), []
    common = ''
    while len(found) > 1 and len(first := {name.partition('.')[0] for name in found}) == 1:
        (word,) = first
        if not all(name.startswith(f'{word}.') for name in found):
            break
        common += f'{word}.'
        found = {name[len(word) + 1 :]: array for name, array in found.items()}
    if common:
        notes.append(f'{common} was taken off all names')

    left_out = {name for name in found if _DECODER.fullmatch(name)}
    if any(map(_CLASSIFIER.fullmatch, found)):  # which does not read it
        left_out |= {name for name in found if _POOLER.fullmatch(name)}
    prefix = _prefix(found, path)
    if prefix:
        inside = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        outside = {name for name in found if not name.startswith(prefix)} - left_out
        kept = {name: array for name, array in found.items() if name not in left_out}
        table = key_tables.recognise({n.removeprefix(prefix): a for n, a in kept.items()})
        known = outside - set(key_tables.unknown(outside, table)) if table else set()
        if known != outside or inside & outside:  # of more than the model and its head
            left_out |= outside
        if prefix not in _BASE_MODELS:
            notes.append(f'the weights are those under {prefix}')
    if left_out:
        groups = dict.fromkeys('.'.join(n.split('.')[:2]) for n in found if n in left_out)
        shown = ', '.join(list(groups)[:4]) + (', ...' if len(groups) > 4 else '')
        notes.append(f'{len(left_out)} other tensors are left out ({shown})')
    kept = {name: array for name, array in found.items() if name not in left_out}
    return {name.removeprefix(prefix): array for name, array in kept.items()}, notes


def _prefix(tensors: Mapping[str, Any], path: Any) -> str:
    """What stands before the names of the image model."""
    matches = filter(None, map(_FIRST_LAYER.fullmatch, tensors))
    prefixes = sorted({match[1] or '' for match in matches})
    for word in _COPIES:
        if len(prefixes) > 1:
            chosen = [prefix for prefix in prefixes if word in prefix.split('.')]
            prefixes = chosen or prefixes
    if '' in prefixes or not prefixes or 'vision_model.' in prefixes[0]:
        return ''
    if len(prefixes) > 1:
        raise UserError(
            f'{path} holds several models, under {", ".join(prefixes)}: save the state dict of one'
        )
    return prefixes[0]
