"""Names of EVA, EVA-02 and DINOv3 in bare files: those of timm, and of the authors.

The authors' files are told by their arrays' names, and read under timm's.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint.arrays import derive
from vit_jax.errors import UserError

# Keys of `key_tables.TABLES` that have timm's names.
TABLES = ('timm DINOv3', 'timm DINOv3 gated', 'timm EVA', 'timm EVA-02')
# What only these models have, of which each has one.
SIGNS = (
    *('storage_tokens', 'blocks.0.gamma_1', 'blocks.0.attn.q_bias'),
    *('blocks.0.attn.q_proj.weight', 'blocks.0.mlp.fc1_g.weight', 'blocks.0.mlp.w1.weight'),
    'blocks.0.mlp.w12.weight',
)
# The authors' names -> timm's: of DINOv3 (https://github.com/facebookresearch/dinov3), of EVA-02
# (https://github.com/baaivision/EVA).
_RENAMED = (
    (re.compile(r'storage_tokens'), 'reg_token'),
    (re.compile(r'(blocks\.\d+)\.ls([12])\.gamma'), r'\1.gamma_\2'),
    (re.compile(r'(blocks\.\d+\.mlp)\.w12\.(.*)'), r'\1.fc1.\2'),
    (re.compile(r'(blocks\.\d+\.mlp)\.w1\.(.*)'), r'\1.fc1_g.\2'),
    (re.compile(r'(blocks\.\d+\.mlp)\.w2\.(.*)'), r'\1.fc1_x.\2'),
    (re.compile(r'(blocks\.\d+\.mlp)\.w3\.(.*)'), r'\1.fc2.\2'),
    (re.compile(r'(blocks\.\d+\.mlp)\.ffn_ln\.(.*)'), r'\1.norm.\2'),
    (re.compile(r'(blocks\.\d+\.attn)\.inner_attn_ln\.(.*)'), r'\1.norm.\2'),
    (re.compile(r'(blocks\.\d+\.attn\.[qv])_proj_bias'), r'\1_proj.bias'),
)
_PERIODS = 'rope_embed.periods'  # of DINOv3
_LEFT_OUT = {
    'tables of rotary positions, which are computed here': re.compile(r'(.*\.)?rope\.freqs_\w+'),
    'a norm of small crops, for pre-training': re.compile(r'local_cls_norm\..*'),
    'a head for masked pre-training': re.compile(r'lm_head\..*'),
}


def table(tensors: Mapping[str, Any], packed: bool) -> str:
    """Which of `TABLES` has the names of these tensors.

    Args:
        tensors: name -> array; has one of `SIGNS`.
        packed: whether gate and first layer of the MLP are one matrix.
    """
    gated = packed or any(
        f'blocks.0.mlp.{name}.weight' in tensors for name in ('fc1_g', 'w1', 'w12')
    )
    registers = 'storage_tokens' in tensors or 'reg_token' in tensors
    if registers and 'cls_token' in tensors and 'pos_embed' not in tensors:
        return 'timm DINOv3 gated' if gated else 'timm DINOv3'
    return 'timm EVA-02' if gated else 'timm EVA'


def num_heads(tensors: Mapping[str, Any]) -> int:
    """The number of heads, if a file of DINOv3's authors tells it; else 0."""
    if _PERIODS not in tensors or 'cls_token' not in tensors:
        return 0
    return tensors['cls_token'].shape[-1] // (4 * tensors[_PERIODS].shape[0])


def as_in_timm(tensors: Mapping[str, Any], path: Any) -> tuple[dict[str, Any], list[str]]:
    """The tensors under timm's names.

    Args:
        tensors: name -> array.
        path: where they come from, for errors.

    Returns:
        (the tensors, what was done: a sentence each).

    Raises:
        UserError: rotary positions or biases of another kind than the models here have.
    """
    notes, found = [], {}
    for name, array in tensors.items():
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name) if pattern.fullmatch(name) else name
        found[name] = array
    if _PERIODS in found:
        _check_periods(np.asarray(found.pop(_PERIODS)), path)
        notes.append(
            'rotary positions are computed in float32, as by timm and transformers; the authors '
            'rounded them to bfloat16'
        )
    if 'lm_head.weight' in found:  # EVA-02 after pre-training
        found = {re.sub(r'^norm\.', 'fc_norm.', name): array for name, array in found.items()}
        notes.append('the norm in front of its pre-training head is taken for fc_norm, as by timm')
    for words, pattern in _LEFT_OUT.items():
        unused = [name for name in found if pattern.fullmatch(name)]
        notes += [f'{words}: {len(unused)} tensors are left out'] if unused else []
        found = {name: array for name, array in found.items() if name not in unused}
    masks = [name for name in found if name.endswith('.qkv.bias_mask')]
    for name in masks:
        _split_bias(found, name.removesuffix('qkv.bias_mask'), path)
    if masks:
        notes.append('keys have no bias: the file masks it')
    return found, notes


def _check_periods(periods: np.ndarray, path: Any) -> None:
    """Refuses other periods than those of theta 100, 2 pi of which are one; they are bfloat16."""
    expected = 100.0 ** (np.arange(periods.size) / periods.size)
    if not np.allclose(periods, expected, rtol=2**-8):
        raise UserError(f'{path} has rotary positions of other periods than theta 100 gives')


def _split_bias(tensors: dict[str, Any], attention: str, path: Any) -> None:
    """Biases of queries and values, from one of all three and the mask of that of the keys."""
    masks = np.split(np.asarray(tensors.pop(f'{attention}qkv.bias_mask')), 3)
    if [np.unique(mask).tolist() for mask in masks] != [[1], [0], [1]]:
        raise UserError(f'{path}: {attention}qkv.bias_mask masks other biases than that of keys')
    bias = tensors.pop(f'{attention}qkv.bias')
    for index, name in ((0, 'q_bias'), (2, 'v_bias')):
        tensors[attention + name] = derive(lambda x, i=index: np.split(x, 3)[i], bias)
