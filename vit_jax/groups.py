"""Groups of parameters, by their names: 'Transformer/encoderblock_0/LayerNorm_0/scale'.

A pattern is a regular expression that fits a whole name, as in big_vision. Of several, the first
that fits counts.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from vit_jax.errors import UserError

Patterns = Sequence[tuple[str, float]]

_BLOCK = re.compile(r'(?:.*/)?(?:encoderblock|MixerBlock)_(\d+)/.*')
_STEM = re.compile(
    r'(?:.*/)?(?:embedding|stem|cls|dist|registers|posembed_input|pre_norm|conv_root|gn_root|block\d)(?:/.*)?'
)
# The layers that give the logits: those that a new set of classes gets new.
HEAD = r'head(?:_dist|_hidden)?/.*'


def name_of(path: Any) -> str:
    """The name of a parameter from its path in the tree: 'head/kernel'."""
    return '/'.join(str(key.key) for key in path)


def names_of(params: Any) -> list[str]:
    """Names of all parameters, in the order of the tree's leaves."""
    return [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def map_names(function: Callable[[str], Any], params: Any) -> Any:
    """The tree of what `function` gives for each name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function(name_of(path)), params)


def factor_of(patterns: Patterns, default: float) -> Callable[[str], float]:
    """The number that goes with the first pattern that fits a name, or `default`."""
    compiled = [(re.compile(pattern), float(factor)) for pattern, factor in patterns]

    def factor(name: str) -> float:
        return next((f for pattern, f in compiled if pattern.fullmatch(name)), default)

    return factor


def layer_decay(decay: float, names: Iterable[str]) -> Callable[[str], float]:
    """Layer-wise decay of the learning rate: decay^(L + 1 - i) for layer i of L blocks.

    As in BEiT (https://arxiv.org/abs/2106.08254) and timm: patch embedding, tokens and position
    embeddings (and a hybrid's ResNet) are layer 0, blocks are 1 to L, all that follows is L + 1.

    Args:
      decay: in (0, 1].
      names: of all parameters.

    Returns:
      A function from the name of a parameter to the factor of its rate.

    Raises:
      UserError: no parameter is in a block.
    """
    blocks = {int(found[1]) for name in names if (found := _BLOCK.fullmatch(name))}
    if not blocks:
        raise UserError(
            'config.layer_decay goes from block to block, and this model has no encoderblock_0 or '
            'MixerBlock_0: leave it out'
        )
    last = max(blocks) + 2

    def factor(name: str) -> float:
        if found := _BLOCK.fullmatch(name):
            return decay ** (last - 1 - int(found[1]))
        return decay**last if _STEM.fullmatch(name) else 1.0

    return factor


def all_but(*patterns: str) -> str:
    """The pattern of all names that none of these patterns fits."""
    return rf'(?!(?:{"|".join(f"(?:{pattern})" for pattern in patterns)})\Z).*'


def norms(names: Iterable[str]) -> str:
    """The pattern of scales and biases of normalisations; '' where there are none.

    They are the layers that have a scale, but for LayerScale.
    """
    layers = dict.fromkeys(name.split('/')[-2] for name in names if name.endswith('/scale'))
    found = [re.escape(layer) for layer in layers if not layer.startswith('LayerScale')]
    return rf'(?:.*/)?(?:{"|".join(found)})/(?:scale|bias)' if found else ''


def below_last(words: str, names: Iterable[str]) -> str:
    """The pattern of what is below the last blocks: the other blocks, and what comes before them.

    What follows the blocks (norm, pooling, head) is not in it.

    Args:
      words: 'last:3' for three blocks.
      names: of all parameters.

    Raises:
      UserError: these are no number, or there are not so many blocks.
    """
    blocks = {int(found[1]) for name in names if (found := _BLOCK.fullmatch(name))}
    number = words.removeprefix('last:')
    last = int(number) if number.isascii() and number.isdecimal() and len(number) < 9 else 0
    if not 1 <= last <= len(blocks):
        has = f'from last:1 to last:{len(blocks)}' if blocks else 'none here, which has no blocks'
        raise UserError(
            f'config.train_only={words!r} is no number of last blocks of this model: it is {has}'
        )
    lower = '|'.join(map(str, range(len(blocks) - last)))
    lower = rf'|(?:.*/)?(?:encoderblock|MixerBlock)_(?:{lower})/.*' if lower else ''
    return _STEM.pattern + lower


def lowest_block(frozen: str, names: Iterable[str]) -> int:
    """The number of the lowest block of which something is trained; beyond the last, if none is.

    Args:
      frozen: pattern of the names that are not trained; '' for none.
      names: of all parameters.
    """
    blocks = [(int(found[1]), name) for name in names if (found := _BLOCK.fullmatch(name))]
    trained = [number for number, name in blocks if not (frozen and re.fullmatch(frozen, name))]
    return min(trained, default=max((number for number, _ in blocks), default=-1) + 1)


def check_patterns(knob: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Checks that each pattern fits a parameter.

    Args:
      knob: that has the patterns, for the message.
      patterns: regular expressions.
      names: of all parameters.

    Raises:
      UserError: one is no regular expression, or fits none.
    """
    for pattern in patterns:
        try:
            fits = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f'{knob}: {pattern!r} is no regular expression: {error}') from error
        if not fits:
            shown = ', '.join(dict.fromkeys(name.split('/')[0] + '/...' for name in names))
            raise UserError(
                f'{knob}: {pattern!r} fits no parameter. It has to fit a whole name, such as '
                f'{names[0]}; names begin with {shown}'
            )


def partition(params: Any, frozen: str) -> tuple[Any, Any]:
    """Splits parameters into those that are trained and those that stay as they are.

    Args:
      params: nested dict of arrays (or anything else).
      frozen: pattern of the names that are not trained; '' for none.

    Returns:
      Two trees like `params`, each with None in the places of the other's; without a pattern
      `params` and None. None has no leaves for JAX, so that the first has neither gradients nor a
      state of the optimizer for what is frozen.
    """
    if not frozen:
        return params, None
    fits = re.compile(frozen).fullmatch
    is_frozen = map_names(lambda name: bool(fits(name)), params)
    return (
        jax.tree.map(lambda frozen, leaf: None if frozen else leaf, is_frozen, params),
        jax.tree.map(lambda frozen, leaf: leaf if frozen else None, is_frozen, params),
    )


def combine(trained: Any, frozen: Any) -> Any:
    """The whole of what `partition` gave."""
    if frozen is None:
        return trained
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None
    )
