"""ArrayRecord files of one's own: each record a `tf.train.Example`, read without TensorFlow.

    flowers/train.array_record    features image/encoded (bytes), image/class/label (integer)
    flowers/test.array_record

The features are columns as those of a table; `image` and `label` are found as well, and
`image/class/text` gives names. Sets that TensorFlow Datasets has prepared are `tfds_sets`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.data import remote
from vit_jax.data import shards as shards_lib
from vit_jax.data.columns import choose_columns
from vit_jax.data.dataset import Dataset
from vit_jax.data.decode import BadImageError
from vit_jax.data.shards import Builder, Index, Shard
from vit_jax.errors import UserError, extra

_OPEN_FILES = 64
_ROWS = 32  # that are in memory at once
# A record is read alone, without those that follow.
_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
# What the library raises of damaged files.
_ERRORS = (RuntimeError, ValueError, IndexError, OSError)


def open_files(path: pathlib.Path, name: str, *, columns: str = '', **options: Any) -> Dataset:
    """Opens a folder of ArrayRecord files, or one such file.

    Args:
      path: of the folder or file.
      name: how the user spelled it.
      columns: see `columns.choose_columns`; the columns are the features of the examples.
      **options: see `rows.make_dataset`.

    Returns:
      A dataset whose images are read from disk on access, EXIF orientation honoured.

    Raises:
      UserError: a file is damaged, or its records are no examples with images and labels.
    """
    with extra('train'):
        from array_record.python import array_record_module  # noqa: F401
    found = shards_lib.find(path, 'array_record', name)
    first = next((features for _, features in _records(found[0])), None)
    if first is None:
        raise UserError(f'{found[0].path}: the first record is no tf.train.Example')
    chosen = choose_columns(columns, sorted(first), name)
    key = shards_lib.key_of(found, columns)
    folder = remote.cache_folder() / 'datasets' / key
    index = shards_lib.cached(folder, lambda _: _index(found, chosen.image, chosen.others()))
    images = _Images(index, found, chosen.image, key)
    root = path if path.is_dir() else path.parent
    return shards_lib.make_dataset(name, images, chosen, root, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class _Images(shards_lib.Images):
    """Images that are features of records, whose numbers are the offsets of the index.

    Attributes:
      column: of the image.
      key: of the files as they are.
    """

    column: str
    key: str

    def read(self, row: int) -> tuple[bytes, str]:
        key = self.called(row)
        reader = _reader(self.shards[int(self.index.shard[row])].path, self.key)
        try:
            features = _parse(reader.read([int(self.index.offset[row])])[0])
        except _ERRORS as error:
            raise BadImageError(key, f'its record is damaged ({error})') from error
        image = (features or {}).get(self.column)
        if not isinstance(image, bytes) or not image:
            raise BadImageError(key, 'its record holds no image')
        return image, key


def _index(shards: Sequence[Shard], image: str, columns: Sequence[str]) -> Index:
    """Reads all records, for what stands beside their images."""
    builder = Builder(columns)
    for number, shard in enumerate(shards):
        for row, features in _records(shard):
            fault = 'it is no tf.train.Example' if features is None else ''
            data = (features or {}).get(image)
            size = len(data) if isinstance(data, bytes) else 0
            builder.add(number, str(row), row, size, _texts(features or {}, columns), fault)
    return builder.index()


def _texts(features: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """What stands beside an image, bytes as text."""
    found = {column: features.get(column) for column in columns}
    return {
        column: value.decode('utf-8', 'replace') if isinstance(value, bytes) else value
        for column, value in found.items()
    }


def _records(shard: Shard) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The records of a file as features, None for what is no example.

    Raises:
      UserError: the file is damaged.
    """
    try:
        reader = _open(shard.path)
        count = reader.num_records()
        for first in range(0, count, _ROWS):
            rows = range(first, min(first + _ROWS, count))
            yield from zip(rows, map(_parse, reader.read(list(rows))), strict=True)
    except _ERRORS as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{shard.path} is damaged: {reason or type(error).__name__}') from error
    if not count:  # which the library says of a file that is cut, too
        raise UserError(f'{shard.path} holds no records: it is empty, cut or no ArrayRecord file')


@functools.lru_cache(_OPEN_FILES)
def _reader(path: pathlib.Path, key: str) -> Any:
    """A reader that stays open; of files with another key, another one."""
    del key
    return _open(path)


def _open(path: pathlib.Path) -> Any:
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(str(path), _OPTIONS)


def _parse(record: bytes) -> dict[str, Any] | None:
    """The features of a `tf.train.Example`, a value or a list each; None of anything else."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # Not TensorFlow.

    try:
        example = tf_example_pb2.Example.FromString(record)
    except DecodeError:
        return None
    found: dict[str, Any] = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof('kind')
        values = list(getattr(feature, kind).value) if kind else []
        found[name] = values[0] if len(values) == 1 else values or None
    return found or None
