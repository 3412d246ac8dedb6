"""Names of splits; specifications: the grammar of TensorFlow Datasets, and shares to hold out."""

import re
from collections.abc import Mapping

from vit_jax.errors import UserError, extra

# What folders and files of splits, and cells of tables, are called.
_NAMES = {
    'train': 'train',
    'training': 'train',
    'validation': 'validation',
    'val': 'validation',
    'valid': 'validation',
    'test': 'test',
    'testing': 'test',
}
SPLITS = tuple(dict.fromkeys(_NAMES.values()))


def split_called(name: str) -> str | None:
    """The split that a name is for, one of `SPLITS`; None if it is none. Case does not count."""
    return _NAMES.get(name.lower())


def is_share(spec: str) -> bool:
    """Whether this is a share, such as `10%`, and no split."""
    return bool(re.fullmatch(r'\s*[\d.]+\s*%\s*', spec))


def share_of(text: str) -> float:
    """`10%` as 0.1.

    Raises:
      UserError: it is no share from above 0 to 50 %.
    """
    try:
        share = float(text.strip().removesuffix('%')) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 0.5:
        raise UserError(f'{text!r} is no share to hold out: write 10%, or another from 0.1% to 50%')
    return share


def fold_of(text: str) -> tuple[int, int]:
    """`2/5` as (2, 5): the second of five folds.

    Raises:
      UserError: it is none.
    """
    found = re.fullmatch(r'\s*(\d{1,4})/(\d{1,4})\s*', text)
    fold, number = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (1 <= fold <= number and number > 1):
        raise UserError(f'{text!r} is no fold: write 2/5 for the second of five')
    return fold, number


def parse(spec: str, lengths: Mapping[str, int], dataset: str) -> list[tuple[str, int, int]]:
    """A split specification as [(split name, first, end)], by TFDS's own parser and rounding."""
    with extra('train'):
        from tensorflow_datasets.core import splits  # Not TensorFlow; half a second.

    infos = {
        name: splits.SplitInfo(name=name, shard_lengths=[n], num_bytes=0)
        for name, n in lengths.items()
    }
    have = ', '.join(f'{name} ({n:,} examples)' for name, n in lengths.items())
    advice = (
        f'{dataset} has: {have}. '
        'Examples: train, train[:90%], train[90%:], train[:1000], train[:10%]+test[:50]'
    )
    try:
        instructions = splits.AbstractSplit.from_spec(spec.strip()).to_absolute(infos)
    except Exception as error:  # noqa: BLE001  (TFDS raises several kinds for what the user wrote)
        reason = str(error).splitlines()[-1].split(' See format at')[0]
        raise UserError(
            f'split {spec!r} of {dataset} cannot be used: {reason.rstrip(".")}. {advice}'
        ) from error
    ranges = []
    for part in instructions:
        end = lengths[part.splitname] if part.to is None else part.to
        ranges.append((str(part.splitname), part.from_ or 0, end))
    ranges = [part for part in ranges if part[1] < part[2]]
    if not ranges:
        raise UserError(f'split {spec!r} of {dataset} has no examples. {advice}')
    return ranges
