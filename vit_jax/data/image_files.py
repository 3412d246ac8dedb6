"""Which image files are opened, and what is looked at before a decoder sees them.

The only place that opens images with Pillow. Pillow goes by the content, whatever the name, and
some of its formats start a program (PostScript), read other files, or compute pixels in Python.
Only `FORMATS` are opened. A header of some bytes can make a decoder take memory or time that has
nothing to do with the size of the picture: a tile, a scan, a comment. Those are counted first.

Everything here raises `ValueError`, whose text says what is wrong with the file.
"""

import functools
import importlib.util
import io
import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vit_jax.data import avif_files, jpeg_files, webp_files

if TYPE_CHECKING:
    from PIL import Image

# How files of each format end: the one list, for folders and messages. What a file is tells its
# content. JPEG XL is left out: its plug-in for Pillow decodes a file before it tells the size.
_SUFFIXES = {
    'PNG': ('.png',),
    'WEBP': ('.webp',),
    'BMP': ('.bmp',),
    'JPEG': ('.jpg', '.jpeg'),
    'GIF': ('.gif',),
    'TIFF': ('.tif', '.tiff'),
    'PPM': ('.ppm', '.pgm', '.pbm', '.pnm'),
    'ICO': ('.ico',),
    'JPEG2000': ('.jp2', '.j2k'),
    'AVIF': ('.avif',),
}
FORMATS = tuple(_SUFFIXES)
# The only one that a file with this first byte can be of; Pillow asks each in turn.
_FORMAT_OF = {b'B': ('BMP',), b'G': ('GIF',), b'P': ('PPM',), b'\x89': ('PNG',), b'R': ('WEBP',)}
# Read where the package pillow-heif is there, which has limits of its own.
HEIF_SUFFIXES = ('.heic', '.heif')
_INSTALL_HEIF = "they are read with pip install 'vit_jax[heif]'"
ARRAY_SUFFIX = '.npy'

_MIB = 1 << 20
_JPEG = b'\xff\xd8'
_PNG = b'\x89PNG\r\n\x1a\n'
_JPEG_2000 = b'\xff\x4f\xff\x51'  # its first two markers

_MAX_SEGMENTS = 50_000  # parts of a file before or around its picture

# Text, profiles, EXIF and other data beside the picture, where the picture is small.
_MAX_METADATA = 8 * _MIB
_MAX_COMPRESSED_TEXTS = 8  # each unpacks to a MiB at most, which Pillow sees to
_SMALL_PNG = 8192  # bytes: for that a text of a MiB takes one kB
_MAX_EXIF = 256 << 10
_MAX_COMMENTS = 1000
_MAX_ICONS = 64
_MAX_CODESTREAMS = 4
_MAX_PPM_HEADER = 4096
_PLAIN_PPM = re.compile(rb'P(4|[56]\s\d{1,9})\s\d{1,9}\s\d{1,9}\s')  # a whole header

# TIFF: type -> (bytes, code of struct where it is a whole number).
_TIFF_TYPES = {
    1: (1, 'B'), 2: (1, ''), 3: (2, 'H'), 4: (4, 'I'), 5: (8, ''), 6: (1, 'b'), 7: (1, ''),
    8: (2, 'h'), 9: (4, 'i'), 10: (8, ''), 11: (4, ''), 12: (8, ''), 13: (4, 'I'),
    16: (8, 'Q'), 17: (8, 'q'),
}  # fmt: skip
_WIDTH, _HEIGHT, _COMPRESSION, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 259, 322, 323
_TIFF_PARTS = (273, 324)  # where strips and tiles begin
_TIFF_DIRECTORIES = (34665, 34853, 40965)  # of EXIF
_MAX_PARTS = 65_536
_MAX_TAGS = 4096  # libtiff's own limit

# What Pillow decodes in Python, some tenths of a microsecond each.
_PYTHON_DECODERS = ('bmp_rle', 'ppm', 'ppm_plain')
_MAX_PYTHON_PIXELS = _MIB
_MAX_PYTHON_BYTES = 8 * _MIB


@functools.cache
def suffixes(arrays: bool = False) -> frozenset[str]:
    """How the names of image files end, in lower case, with the dot.

    Args:
      arrays: whether .npy files are images.
    """
    found = {suffix for suffixes in _SUFFIXES.values() for suffix in suffixes}
    if importlib.util.find_spec('pillow_heif'):
        found.update(HEIF_SUFFIXES)
    return frozenset(found | {ARRAY_SUFFIX} if arrays else found)


def in_words(arrays: bool = False) -> str:
    """The suffixes, for messages: 'avif, bmp, ...'."""
    return ', '.join(sorted(suffix[1:] for suffix in suffixes(arrays)))


def is_image_name(name: str, arrays: bool = False) -> bool:
    """Whether a file of a folder is an image by its name; hidden ones are none."""
    return not name.startswith('.') and suffix_of(name) in suffixes(arrays)


def suffix_of(name: str) -> str:
    """How the name of a file ends, in lower case, with the dot."""
    return os.path.splitext(name)[1].lower()


def hint_of(ignored: Mapping[str, int]) -> str:
    """What could be read if a package were there, as an addition to a sentence; or ''.

    Args:
      ignored: how many files of each suffix were left out.
    """
    count = sum(ignored.get(suffix, 0) for suffix in HEIF_SUFFIXES if suffix not in suffixes())
    return f' ({count:,} are HEIC: {_INSTALL_HEIF})' if count else ''


def looks_like_image(content: bytes) -> bool:
    """Whether bytes begin as an image file, and not as a list of paths."""
    return (
        content.startswith((b'\xff\xd8\xff', b'\x89PNG\r\n', b'\x93NUMPY', b'\0\0', b'\xff\x4f'))
        or (content.startswith(b'BM') and content[6:10] == b'\0\0\0\0')  # BMW/1.jpg is a path
        or (content.startswith(b'RIFF') and content[8:12] == b'WEBP')
        or (content.startswith((b'GIF87a', b'GIF89a')) and b'\0' in content[6:13])
        or (content.startswith((b'II*\0', b'MM\0*')) and b'\0\0' in content[4:8])
        or bool(re.match(rb'P[1-6]\s+(#.*\s+)*[0-9]+\s+[0-9]+\s', content))
    )


def open_image(data: bytes) -> 'Image.Image':
    """Opens an image file; its pixels are not decoded yet.

    Args:
      data: the file.

    Raises:
      ValueError: it is of no format in `FORMATS`, or claims what no picture of its size needs.
      Exception: nearly any, of Pillow, for damage.
    """
    from PIL import Image  # here, because sets of JPEG files do not need it

    has_boxes = data[4:8] == b'ftyp'
    if has_boxes and _is_heif(data):
        return _open_heif(data)
    frames = check(data)
    formats = ('AVIF',) if has_boxes else _FORMAT_OF.get(data[:1], FORMATS)
    try:
        picture = Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError:  # whose text is the address of our buffer
        raise ValueError(f'no known format; read are {", ".join(sorted(FORMATS))}') from None
    _check_opened(picture, len(data), frames)
    return picture


def _is_heif(data: bytes) -> bool:
    """Whether the first box of a file (ISO 23008-12) names a brand of HEVC pictures."""
    brands = data[8 : min(int.from_bytes(data[:4], 'big'), 256)]
    return data[4:8] == b'ftyp' and any(
        brands[i : i + 4] in (b'heic', b'heix', b'heim', b'heis') for i in range(0, len(brands), 4)
    )


def _open_heif(data: bytes) -> 'Image.Image':
    """HEIF: libheif refuses what decodes to more than the file's own header says."""
    try:
        from pillow_heif import HeifImageFile, options
    except ModuleNotFoundError:
        raise ValueError(f'HEIC files need the package pillow-heif; {_INSTALL_HEIF}') from None
    options.DECODE_THREADS = 1  # of each of our threads
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
    return HeifImageFile(io.BytesIO(data))


def check_picture(picture: 'Image.Image') -> None:
    """Checks a PIL image that somebody else opened, before its pixels are decoded.

    Args:
      picture: which may be one that was never a file; then there is nothing to check.

    Raises:
      ValueError: as `open_image`.
    """
    file = getattr(picture, 'fp', None)
    if not getattr(picture, 'tile', None) or file is None:
        return  # decoded already
    if picture.format not in (*FORMATS, 'MPO'):  # a JPEG file with several pictures
        raise ValueError(f'{picture.format} files are not read, only {", ".join(sorted(FORMATS))}')
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    frames = check(data)
    if data.startswith(_JPEG) and jpeg_files.has_too_many_scans(
        data, picture.width * picture.height
    ):
        raise ValueError('it has more scans than any picture needs')
    _check_opened(picture, len(data), frames)


def check(data: bytes) -> list[int]:
    """Checks an image file, by its content, before it is opened.

    Returns:
      The sizes of the frames of an AVIF file, to be compared with what it declares; else nothing.

    Raises:
      ValueError: as `open_image`.
    """
    if data[4:8] == b'ftyp':
        return avif_files.areas(data)
    if check_format := _CHECKS.get(data[:1]):
        check_format(data)
    return []


def exif_of(picture: 'Image.Image') -> 'Image.Exif':
    """The EXIF data of an opened image.

    Raises:
      ValueError: they are larger than a file needs, and would take many times as much.
    """
    size = len(picture.info.get('exif') or b'')
    if size > _MAX_EXIF:
        raise ValueError(f'its EXIF data have {size:,} bytes, more than {_MAX_EXIF:,}')
    return picture.getexif()


def _check_opened(picture: 'Image.Image', size: int, frames: list[int]) -> None:
    """Limits what Pillow decodes in Python, and the frames of AVIF files."""
    pixels = picture.width * picture.height
    if picture.format == 'AVIF':
        avif_files.check(frames, pixels)
    elif (pixels > _MAX_PYTHON_PIXELS or size > _MAX_PYTHON_BYTES) and any(
        tile[0] in _PYTHON_DECODERS for tile in getattr(picture, 'tile', ())
    ):
        raise ValueError(
            f'{picture.width} x {picture.height} is more than this kind of {picture.format} is '
            'read for, because that takes long: save it as PNG'
        )


def _check_metadata(size: int, pixels: int) -> None:
    if size > _MAX_METADATA + 2 * pixels:
        raise ValueError(f'it has {size:,} bytes of data beside the picture')


def _check_png(data: bytes) -> None:
    """PNG (https://www.w3.org/TR/png-3/): counts chunks, and what is no part of the picture."""
    if not data.startswith(_PNG) or len(data) < _SMALL_PNG:
        return
    place, metadata, compressed = 8, 0, 0
    pixels = int.from_bytes(data[16:20], 'big') * int.from_bytes(data[20:24], 'big')
    # Encoders write chunks of kilobytes.
    for _ in range(_MAX_SEGMENTS + len(data) // 4096):
        kind, size = data[place + 4 : place + 8], int.from_bytes(data[place : place + 4], 'big')
        place += 12 + size
        if kind == b'IDAT':
            continue
        if len(kind) < 4 or kind == b'IEND':
            return
        if kind != b'fdAT':
            metadata += min(size, len(data))
            _check_metadata(metadata, pixels)
        if kind in (b'zTXt', b'iCCP') or (
            kind == b'iTXt' and data[data.find(b'\0', place - 4 - size) + 1] == 1
        ):
            compressed += 1
        if compressed > _MAX_COMPRESSED_TEXTS + pixels // _MIB:
            raise ValueError(f'it has {compressed} compressed texts')
    raise ValueError('it has more chunks than any encoder writes')


def _check_tiff(data: bytes) -> None:
    """TIFF 6.0 and BigTIFF: the size of tiles, and how much the tags of the first picture hold."""
    if data.startswith(b'MM\0+'):
        raise ValueError('BigTIFF files of this byte order are not read')
    if data[:4] not in (b'II*\0', b'II+\0', b'MM\0*', b'MM*\0'):
        return
    sides: dict[int, int] = {}
    parts = numbers = texts = 0
    jpeg = False
    for tag, kind, length, value in _tiff_tags(data):
        if tag in (_WIDTH, _HEIGHT):
            sides.setdefault(tag, value)  # the first one counts
        elif tag in (_TILE_WIDTH, _TILE_HEIGHT):
            sides[tag] = max(value, sides.get(tag, 0))
        if tag in _TIFF_PARTS:
            parts = max(parts, length)
        jpeg |= tag == _COMPRESSION and value in (6, 7)
        if kind in (1, 2, 7):
            texts += length
        else:
            numbers += 8 * length if kind in (5, 10) else length
    pixels = sides.get(_WIDTH, 0) * sides.get(_HEIGHT, 0)
    if parts > _MAX_PARTS + pixels // 256 or numbers > 2 * _MAX_PARTS + pixels // 64:
        raise ValueError(f'its tags hold {numbers:,} numbers')
    if sides.get(_TILE_WIDTH, 0) * sides.get(_TILE_HEIGHT, 0) > _MIB + 2 * pixels:
        raise ValueError(f'its tiles are {sides[_TILE_WIDTH]} x {sides[_TILE_HEIGHT]}')
    _check_metadata(texts, 4 * pixels)
    if (
        jpeg
        and len(re.findall(b'\xff\xda', data))
        > jpeg_files.MAX_SCANS + 4 * parts + len(data) // 9999
    ):
        raise ValueError('it has more scans than any picture needs')


def _tiff_tags(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(tag, type, length, value) of each tag of the first directory and of those of EXIF in it.

    The value is 0 where it is not one whole number. What is cut off, or claims more than the file
    has, is left out, as Pillow does.
    """
    order, big = '<' if data.startswith(b'II') else '>', data[2:3] == b'+'
    count_code, entry, value_at, size = ('Q', 'HHQ', 12, 20) if big else ('H', 'HHI', 8, 12)
    try:
        directories = [struct.unpack_from(order + entry[-1], data, 8 if big else 4)[0]]
        for directory in directories:
            (count,) = struct.unpack_from(order + count_code, data, directory)
            if count > _MAX_TAGS:
                raise ValueError(f'it has {count:,} tags')
            first = directory + struct.calcsize(count_code)
            for place in range(first, first + count * size, size):
                tag, kind, length = struct.unpack_from(order + entry, data, place)
                unit, code = _TIFF_TYPES.get(kind, (0, ''))
                value = 0
                if length == 1 and code:
                    (value,) = struct.unpack_from(order + code, data, place + value_at)
                if unit * length <= len(data):
                    yield tag, kind, length, value
                if tag in _TIFF_DIRECTORIES and len(directories) <= len(_TIFF_DIRECTORIES):
                    directories.append(value)
    except (struct.error, OverflowError):
        return


def _check_gif(data: bytes) -> None:
    """GIF: the blocks before the first picture, which Pillow reads one by one."""
    if not data.startswith(b'GIF8'):
        return
    place = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    for _ in range(_MAX_SEGMENTS):
        kind = data[place : place + 1]
        if kind == b',' or place >= len(data):
            return
        if kind != b'!':
            place += 1
            continue
        place += 2
        for _ in range(_MAX_SEGMENTS):
            size = data[place] if place < len(data) else 0
            place += 1 + size
            if not size:
                break
        _check_metadata(place, 0)
    raise ValueError('it has more blocks before its first picture than any encoder writes')


def _check_ppm(data: bytes) -> None:
    """PPM: its header is read byte by byte, and comments are cut out one by one."""
    if _PLAIN_PPM.match(data):
        return
    from PIL import PpmImagePlugin

    if data[1:2] in b'123' and data.count(b'#') > _MAX_COMMENTS:
        raise ValueError(f'it has more than {_MAX_COMMENTS} comments')
    if data[1:2] in b'0123456fy':
        PpmImagePlugin.PpmImageFile(io.BytesIO(data[:_MAX_PPM_HEADER]))  # fails where that ends


def _check_ico(data: bytes) -> None:
    """ICO: Pillow decodes its largest picture at once, whatever size that has."""
    if not data.startswith(b'\0\0\1\0'):
        return
    entries = data[6 : 6 + 16 * int.from_bytes(data[4:6], 'little')]
    places = {int.from_bytes(entries[i : i + 4], 'little') for i in range(12, len(entries), 16)}
    if len(places) > _MAX_ICONS:
        raise ValueError(f'it holds {len(places)} icons')
    for place in places:
        head = data[place : place + 24]
        if head.startswith(_PNG):
            width, height = struct.unpack('>II', head[16:24].ljust(8, b'\0'))
            _check_png(data[place:])
        else:
            width, height = struct.unpack('<ii', head[4:12].ljust(8, b'\0'))
        if abs(width * height) > 2 * _MIB:
            raise ValueError(f'it holds an icon of {width} x {abs(height)}')


def _check_jpeg_2000(data: bytes) -> None:
    """JPEG 2000 (ITU T.800, annex A): tiles and precincts, for each of which memory is taken."""
    starts = [found.end() for found in re.finditer(_JPEG_2000, data)]
    if len(starts) > _MAX_CODESTREAMS:
        raise ValueError(f'it holds {len(starts)} pictures')
    for start in starts:
        if start + 36 > len(data):
            return
        right, bottom, left, top, *tile = struct.unpack_from('>6I', data, start + 4)
        pixels = max(right - left, 0) * max(bottom - top, 0)
        if pixels > (_MAX_PARTS // 16 + pixels // 4096) * tile[0] * tile[1]:
            raise ValueError(f'its tiles are {tile[0]} x {tile[1]}')
        if len(data) > 16 * _MIB + pixels * 3 // 4:  # a second takes 7 MB
            raise ValueError(f'it has {len(data):,} bytes, which take too long')
        for coding in _jpeg_2000_codings(data, start - 2):
            levels, width, height, _, _, *precincts = coding
            blocks = pixels / 2 ** ((width & 15) + (height & 15) + 4)
            precincts = sum(
                pixels / 4 ** (levels - level) / 2 ** ((size & 15) + (size >> 4))
                for level, size in enumerate(precincts[: levels + 1])
            )
            if max(blocks / 4, precincts) > _MAX_PARTS / 16 + pixels / 1024:
                raise ValueError(f'it has {blocks:,.0f} blocks in {precincts:,.0f} precincts')


def _jpeg_2000_codings(data: bytes, place: int) -> Iterator[bytes]:
    """What the headers of a codestream and its tiles say of the coding, from the levels on."""
    many_components = data[place + 38 : place + 40] > b'\1\0'
    tile = -1  # where the tile begins
    for _ in range(_MAX_SEGMENTS):
        marker, size = data[place : place + 2], int.from_bytes(data[place + 2 : place + 4], 'big')
        if marker == b'\xff\x90':
            tile = place
        elif marker == b'\xff\x93' and tile >= 0:  # the tile's data
            place = tile
            size = int.from_bytes(data[tile + 6 : tile + 10], 'big') - 2
            tile = -1
        elif marker == b'\xff\x52':
            yield data[place + 9 : place + 2 + size].ljust(5, b'\xff')
        elif marker == b'\xff\x53':
            yield data[place + 6 + many_components : place + 2 + size].ljust(5, b'\xff')
        if size < 2 or place >= len(data):
            return
        place += 2 + size
    raise ValueError(f'it has more than {_MAX_SEGMENTS:,} tiles and markers')


_CHECKS = {
    b'\x89': _check_png,
    b'G': _check_gif,
    b'P': _check_ppm,
    b'\0': lambda data: (_check_jpeg_2000 if data[4:6] == b'jP' else _check_ico)(data),
    b'\xff': _check_jpeg_2000,
    b'I': _check_tiff,
    b'M': _check_tiff,
    b'R': webp_files.check,
}
