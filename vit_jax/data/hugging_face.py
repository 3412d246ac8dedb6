"""Image datasets of Hugging Face on disk, read by pyarrow alone.

    flowers/data/train-00000-of-00002.parquet ...     as the hub has them
    flowers/dataset_dict.json, flowers/train/*.arrow  as `datasets` saves them (`save_to_disk`)

The images of Arrow files are read where they are. In Parquet they are packed in blocks of many, so
that one alone cannot be read: they are copied once, as they are, into a file in the cache.
"""

import contextlib
import functools
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vit_jax import files
from vit_jax.data import remote
from vit_jax.data import shards as shards_lib
from vit_jax.data.columns import Columns, choose_columns, listed
from vit_jax.data.dataset import Dataset
from vit_jax.data.shards import Builder, Index, Shard
from vit_jax.data.splits import split_called
from vit_jax.errors import UserError, extra

if TYPE_CHECKING:
    import pyarrow

_BINARY = ('binary', 'large_binary', 'binary_view')
_END = b'\xff\xff\xff\xff\0\0\0\0'  # of a stream
_PACK = 'images.bin'
_ROWS = 32  # that are in memory at once

_logger = logging.getLogger(__name__)


def open_files(path: pathlib.Path, name: str, *, columns: str = '', **options: Any) -> Dataset:
    """Opens a folder of Arrow or Parquet files, or one such file.

    Args:
      path: of the folder or file.
      name: how the user spelled it.
      columns: see `columns.choose_columns`.
      **options: see `rows.make_dataset`.

    Returns:
      A dataset whose images are read from disk on access, EXIF orientation honoured.

    Raises:
      UserError: the files are damaged, of several datasets, or have no images and labels.
    """
    with extra('parquet'):
        import pyarrow  # noqa: F401
    found = shards_lib.find(path, 'hugging_face', name)
    _check_one_dataset(found, name)
    chosen, image_type, class_names = _read_schema(found[0], columns, name)
    direct = _is_direct(found[0], chosen.image, image_type)
    folder = remote.cache_folder() / 'datasets' / shards_lib.key_of(found, columns)
    make = functools.partial(_index, found, chosen, class_names, direct)
    index = shards_lib.cached(folder, make, beside=not direct)
    stored = [shard.path for shard in found] if direct else [folder / _PACK]
    images = shards_lib.Spans(index, found, stored)
    root = path if path.is_dir() else path.parent
    return shards_lib.make_dataset(name, images, chosen, root, **options)


def _check_one_dataset(shards: Sequence[Shard], name: str) -> None:
    """Several configurations of a dataset lie in folders beside each other."""
    folders = {
        os.path.join('', *(p for p in pathlib.PurePath(s.name).parent.parts if not split_called(p)))
        for s in shards
    }
    if len(folders) > 1:
        raise UserError(
            f'{name} holds several datasets, {listed(sorted(folders))}: pass the folder of one'
        )


def _read_schema(
    shard: Shard, columns: str, name: str
) -> tuple[Columns, 'pyarrow.DataType', tuple[str, ...]]:
    """Which column is what, the type of the images', and the names of the classes, if told."""
    import pyarrow

    with _reading(shard):
        if _is_parquet(shard):
            from pyarrow import parquet

            schema = parquet.read_schema(shard.path)
        else:
            with pyarrow.memory_map(os.fspath(shard.path)) as source:
                schema = _open_ipc(source.read_buffer()).schema
        features = _features(schema, shard)
        kinds = {column: feature.get('_type') for column, feature in features.items()}
        image = next((c for c in schema.names if kinds.get(c) == 'Image'), '')
        chosen = choose_columns(columns, schema.names, name, image)
        kind = schema.field(chosen.image).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
        kind = kind.field('bytes').type
    if not _is_binary(kind):
        raise UserError(
            f'{name}: the column {chosen.image} holds {kind}, and no images; paths of files are '
            'read from one table (.csv, .jsonl, .parquet)'
        )
    return chosen, kind, _class_names(features.get(chosen.labels[0]))


def _is_binary(kind: 'pyarrow.DataType') -> bool:
    import pyarrow

    return any(getattr(pyarrow.types, f'is_{of}')(kind) for of in _BINARY)


def _features(schema: 'pyarrow.Schema', shard: Shard) -> dict[str, dict[str, Any]]:
    """What Hugging Face says of the columns, in the file or beside it; {} if nothing."""
    text = (schema.metadata or {}).get(b'huggingface')
    told = files.parse_json(text) if text else {}
    beside = shard.path.parent / 'dataset_info.json'
    if not text and beside.is_file():
        told = {'info': files.read_json(beside)}
    info = told.get('info') if isinstance(told, dict) else None
    found = info.get('features') if isinstance(info, dict) else None
    found = found if isinstance(found, dict) else {}
    return {name: feature for name, feature in found.items() if isinstance(feature, dict)}


def _class_names(feature: Any) -> tuple[str, ...]:
    """Names of a `ClassLabel`, or of a list of them; () of anything else."""
    if isinstance(feature, dict) and feature.get('_type') in ('Sequence', 'List', 'LargeList'):
        feature = feature.get('feature')
    names = feature.get('names') if isinstance(feature, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _is_parquet(shard: Shard) -> bool:
    return shard.path.suffix.lower() == '.parquet'


def _is_direct(shard: Shard, image: str, kind: 'pyarrow.DataType') -> bool:
    """Whether the images stand in the files as they are."""
    import pyarrow

    if _is_parquet(shard) or not (
        pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    ):
        return False
    with _reading(shard):
        for batch, source in _batches(shard, [image]):
            if batch.num_rows:
                return _spans(_bytes_of(batch.column(image)), source) is not None
    return True


def _index(
    shards: Sequence[Shard],
    columns: Columns,
    class_names: tuple[str, ...],
    direct: bool,
    folder: pathlib.Path,
) -> Index:
    """Finds all images, and copies them into the folder if they cannot be read where they are."""
    builder = Builder(columns.others())
    builder.class_names = class_names
    with contextlib.ExitStack() as stack:
        pack = None if direct else stack.enter_context(_open_pack(shards, folder))
        for number, shard in enumerate(shards):
            row = 0
            with _reading(shard):
                for batch, source in _batches(shard, (columns.image, *columns.others())):
                    images = _bytes_of(batch.column(columns.image))
                    spans = _write(images, pack) if pack else _spans(images, source)
                    if spans is None:
                        raise ValueError('its images are compressed, others are not')
                    values = {c: batch.column(c).to_pylist() for c in columns.others()}
                    for place, (offset, size) in enumerate(zip(*spans, strict=True)):
                        told = {c: cells[place] for c, cells in values.items()}
                        builder.add(number, str(row), int(offset), int(size), told)
                        row += 1
    return builder.index()


@contextlib.contextmanager
def _open_pack(shards: Sequence[Shard], folder: pathlib.Path) -> Iterator[BinaryIO]:
    """The file for copies of the images; refuses a disk that has no room for them."""
    need = sum(shard.path.stat().st_size for shard in shards)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f'images of Parquet files are copied once, so that each can be read alone: '
            f'{need / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB free in {folder.parent}; '
            'VIT_JAX_CACHE names another folder'
        )
    _logger.warning('Note: %.3g GB of images are copied to %s, once', need / 1e9, folder.parent)
    with open(folder / _PACK, 'wb') as file:
        yield file


def _write(images: 'pyarrow.Array', file: BinaryIO) -> tuple[list[int], list[int]]:
    """Appends images to a file; where each begins, and its size."""
    offsets, sizes = [], []
    for image in images:
        data = image.as_py() or b''
        offsets.append(file.tell())
        sizes.append(len(data))
        file.write(data)
    return offsets, sizes


def _batches(
    shard: Shard, columns: Sequence[str]
) -> Iterator[tuple['pyarrow.RecordBatch', 'pyarrow.Buffer | None']]:
    """The rows of a file, some at a time, checked; and its bytes, where they are in memory."""
    import pyarrow

    if _is_parquet(shard):
        from pyarrow import parquet

        with parquet.ParquetFile(shard.path, pre_buffer=False) as file:
            for batch in file.iter_batches(_ROWS, columns=list(columns)):
                batch.validate(full=True)
                yield batch, None
        return
    with pyarrow.memory_map(os.fspath(shard.path)) as source:
        buffer = source.read_buffer()
        reader = _open_ipc(buffer)
        count = getattr(reader, 'num_record_batches', None)  # of the format with random access
        if count is None and buffer.slice(buffer.size - len(_END)).to_pybytes() != _END:
            raise ValueError('the mark of its end is missing')  # cut between two batches
        batches = reader if count is None else (reader.get_batch(i) for i in range(count))
        for batch in batches:
            batch = batch.select(list(columns))
            batch.validate(full=True)
            yield batch, buffer


def _open_ipc(buffer: 'pyarrow.Buffer') -> Any:
    """The reader of either format of Arrow files."""
    from pyarrow import ipc

    if buffer.size > 6 and buffer.slice(0, 6).to_pybytes() == b'ARROW1':
        return ipc.open_file(buffer)
    return ipc.open_stream(buffer)


def _bytes_of(array: 'pyarrow.Array') -> 'pyarrow.Array':
    """The column of the bytes, which for Hugging Face is a part of the images' column."""
    import pyarrow

    array = getattr(array, 'storage', array)
    if pyarrow.types.is_struct(array.type) and array.type.get_field_index('bytes') >= 0:
        array = array.flatten()[array.type.get_field_index('bytes')]
    if not _is_binary(array.type):
        raise ValueError(f'its images are {array.type}, and no bytes')
    return array


def _spans(
    images: 'pyarrow.Array', file: 'pyarrow.Buffer | None'
) -> tuple[np.ndarray, np.ndarray] | None:
    """Where images begin in their file, and their sizes; None if they are not in it as they are."""
    import pyarrow

    count = len(images)
    _, offsets, data = images.buffers()
    if file is None or data is None or offsets is None:
        return np.zeros(count, np.int64), np.zeros(count, np.int64)
    start = data.address - file.address
    if not 0 <= start <= file.size - data.size:
        return None
    kind = np.int64 if pyarrow.types.is_large_binary(images.type) else np.int32
    places = np.frombuffer(offsets, kind)[images.offset : images.offset + count + 1]
    sizes = np.diff(places.astype(np.int64))
    sizes[~images.is_valid().to_numpy(zero_copy_only=False)] = 0
    return start + places[:-1].astype(np.int64), sizes


@contextlib.contextmanager
def _reading(shard: Shard) -> Iterator[None]:
    """Turns what pyarrow raises of a damaged file into words."""
    import pyarrow

    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, RecursionError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{shard.path} cannot be read: {reason or type(error).__name__}') from error
