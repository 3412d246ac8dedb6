"""Zip files of weights (`.npz`, PyTorch's `.pth`) in which every reader sees the same.

A zip file is found from its end, where readers differ in how far they look and what they believe:
what one lists is not what another unpacks. So only files that leave no choice are opened.
"""

import os
import pathlib
import struct
import zipfile

from vit_jax.errors import UserError

# APPNOTE.TXT of PKWARE, sections 4.3.14 to 4.3.16.
_END, _LOCATOR, _END_64 = b'PK\5\6', b'PK\6\7', b'PK\6\6'
_END_BYTES, _LOCATOR_BYTES, _END_64_BYTES = 22, 20, 56
_MAX_COMMENT = 65_535
_MAX_DIRECTORY = 4 << 20  # bytes: more than 40,000 arrays


def is_zip(path: pathlib.Path) -> bool:
    """Whether a file is a zip archive, perhaps a damaged one: by its first bytes, as for PyTorch.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            return file.read(4) in (b'PK\3\4', _END)
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from error


def open_zip(path: pathlib.Path) -> zipfile.ZipFile:
    """Opens a zip archive, which closes when it is no longer used.

    Raises:
        zipfile.BadZipFile: it is damaged, or another reader could find another archive in it.
        Exception: nearly any, of `zipfile`, for other damage.
    """
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        before = _LOCATOR_BYTES + _END_64_BYTES
        file.seek(max(0, size - before - _END_BYTES - _MAX_COMMENT))
        tail = file.read()
    end = tail.rfind(_END, 0, max(0, len(tail) - _END_BYTES + len(_END)))
    if end < 0:
        raise zipfile.BadZipFile('it has no list of its contents')
    directory_bytes, directory, comment = struct.unpack_from('<IIH', tail, end + 12)
    if end + _END_BYTES + comment != len(tail):
        raise zipfile.BadZipFile('it goes on after the end of the archive')
    directory_end = size - len(tail) + end
    locator = tail[max(0, end - _LOCATOR_BYTES) : end]
    if locator.startswith(_LOCATOR):
        directory_end -= before
        if struct.unpack_from('<Q', locator, 8)[0] != directory_end or (
            tail[end - before : end - before + 4] != _END_64
        ):
            raise zipfile.BadZipFile('it has two ends')
        directory_bytes, directory = struct.unpack_from('<QQ', tail, end - before + 40)
    if directory + directory_bytes != directory_end:
        raise zipfile.BadZipFile('its contents are not where its list says')
    if directory_bytes > _MAX_DIRECTORY:
        raise zipfile.BadZipFile(f'the list of its contents has {directory_bytes:,} bytes')
    return zipfile.ZipFile(path)


def check_stored(members: list[zipfile.ZipInfo], path: pathlib.Path) -> None:
    """Checks that an archive unpacks to no more than its own size.

    Raises:
        UserError: a member is compressed, which PyTorch never does, or they share their bytes.
    """
    for info in members:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise UserError(
                f'{path}: {info.filename[:200]!r} is compressed, which PyTorch does not do and '
                'which may take any amount of memory. Save the file again with torch.save'
            )
    if sum(info.file_size for info in members) > path.stat().st_size:
        raise UserError(f'{path}: its members are larger than the file: download it again')
