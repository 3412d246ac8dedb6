"""WebDataset: images in tar files (shards), what belongs to one under one name.

    flowers/train-000.tar     a01.jpg a01.cls   a02.jpg a02.cls   ...
    flowers/val-000.tar       b01.jpg b01.json  ...

An example is what follows each other under one name up to the first dot. The class stands in
`.cls` (a number), in `.json` (an object, whose fields are columns as those of a table), or in
`.txt`. Each tar is read once, for the index.
"""

import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from vit_jax import files
from vit_jax.data import image_files, remote
from vit_jax.data import shards as shards_lib
from vit_jax.data.columns import Columns, choose_columns
from vit_jax.data.dataset import Dataset
from vit_jax.data.shards import Builder, Index, Shard
from vit_jax.errors import UserError

# The most that is read of a file beside an image, bytes.
_MAX_BYTES = {'cls': 1 << 10, 'txt': 1 << 16, 'json': 1 << 20}
_BLOCK = 512
_AFTER = 1 << 20  # bytes after the end that are looked at; zeros, if it is the end


class _Example(NamedTuple):
    """What is in a tar under one name.

    Attributes:
      name: of the image in the tar; without one, of the example.
      offset: where the image begins, bytes.
      size: of the image; 0 for none.
      values: of the other files, by their suffix, and of the fields of .json.
      fault: why it cannot be used.
    """

    name: str
    offset: int
    size: int
    values: dict[str, Any]
    fault: str


def open_files(path: pathlib.Path, name: str, *, columns: str = '', **options: Any) -> Dataset:
    """Opens a folder of tar files, or one such file.

    Args:
      path: of the folder or file.
      name: how the user spelled it.
      columns: see `columns.choose_columns`; the columns are `cls`, `txt` and the fields of `.json`.
      **options: see `rows.make_dataset`.

    Returns:
      A dataset whose images are read from disk on access, EXIF orientation honoured.

    Raises:
      UserError: a tar is damaged or compressed, or holds no images with labels.
    """
    found = shards_lib.find(path, 'webdataset', name)
    for shard in found:
        if shard.path.suffix.lower() != '.tar':
            raise UserError(
                f'{shard.path} is compressed, so that no image in it can be read alone: unpack it '
                f'(gunzip), and pack what is in it again as .tar'
            )
    chosen = _columns_of(found, columns, name)
    folder = remote.cache_folder() / 'datasets' / shards_lib.key_of(found, columns)
    index = shards_lib.cached(folder, lambda _: _index(found, chosen))
    images = shards_lib.Spans(index, found, [shard.path for shard in found])
    root = path if path.is_dir() else path.parent
    return shards_lib.make_dataset(name, images, chosen, root, **options)


def _columns_of(shards: list[Shard], columns: str, name: str) -> Columns:
    """Which column is what, as the first example tells."""
    for shard in shards:
        for example in _examples(shard):
            if not example.values:
                raise UserError(
                    f'{shard.path}: no label stands beside {example.name}. The files of an example '
                    'follow each other, as `tar --sort=name -cf` packs them'
                )
            return choose_columns(columns, ('image', *example.values), name, 'image')
    raise UserError(f'{name} holds no images')


def _index(shards: list[Shard], columns: Columns) -> Index:
    builder = Builder(columns.others())
    for number, shard in enumerate(shards):
        for example in _examples(shard):
            builder.add(number, *example)
    return builder.index()


def _examples(shard: Shard) -> Iterator[_Example]:
    """The examples of a tar, in its order.

    Raises:
      UserError: it is damaged; says where.
    """
    with open(shard.path, 'rb') as file:
        name, parts = '', dict[str, tarfile.TarInfo]()
        for member in _members(shard, file):
            folder, base = os.path.split(member.name)
            stem, _, suffix = base.partition('.')
            key = os.path.join(folder, stem)
            if key != name:
                yield from _example(name, parts, file)
                name, parts = key, {}
            parts[suffix.lower()] = member
        yield from _example(name, parts, file)


def _members(shard: Shard, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The files in a tar; an end that is not marked as such is an error."""
    try:
        with tarfile.open(fileobj=file, mode='r:') as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else all stay in memory
                if member.isreg() and not os.path.basename(member.name).startswith('.'):
                    yield member
            end = archive.offset
        rest = os.pread(file.fileno(), _AFTER, end)
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f'{shard.path} is damaged: {error or type(error).__name__}') from error
    if len(rest) >= _BLOCK and not any(rest[:_BLOCK]) and any(rest):
        raise UserError(
            f'{shard.path} goes on after its end at byte {end:,}: are several joined in it?'
        )
    if rest[:_BLOCK] != bytes(_BLOCK):
        raise UserError(
            f'{shard.path} is damaged or cut at byte {end:,}: the mark of its end is missing'
        )


def _example(name: str, parts: dict[str, tarfile.TarInfo], file: BinaryIO) -> Iterator[_Example]:
    """The example that files of one name are; none if neither image nor label is among them."""
    values: dict[str, Any] = {}
    fault, image = '', None
    for suffix, member in parts.items():
        kind = suffix.rpartition('.')[2]
        if image is None and image_files.is_image_name(f'x.{kind}'):
            image = member
        elif kind in _MAX_BYTES:
            if not 0 <= member.size <= _MAX_BYTES[kind]:
                fault = f'its .{suffix} has {member.size:,} bytes'
                continue
            text = os.pread(file.fileno(), member.size, member.offset_data)
            if kind != 'json':
                values[suffix] = text.decode('utf-8', 'replace').strip()
                continue
            try:
                fields = files.parse_json(text)
            except ValueError as error:
                fault = f'its .json is not JSON ({error})'
                continue
            values |= fields if isinstance(fields, dict) else {}
    if image is not None:
        yield _Example(image.name, image.offset_data, image.size, values, fault)
    elif values or fault:
        yield _Example(name, 0, 0, values, fault or 'it has no image')
