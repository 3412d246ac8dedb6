"""Images made to harm: what may be opened, and what is refused before it takes memory or time."""

import functools
import gzip
import io
import pathlib
import re
import resource
import struct
import subprocess
import time
import zlib

import numpy as np
import pytest
from fuzzing import avif, webp
from PIL import Image

from vit_jax.data import avif_files, webp_files
from vit_jax.data.decode import BadImageError, decode, size_of_jpeg

SHARED = pathlib.Path(__file__).parents[3] / 'shared' / 'cases' / 'hostile'
MIB = 1 << 20
SMALL = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


def encode(image, format, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def refused(data: bytes, words: str, exif: bool = False) -> None:
    """It ends in one error, within half a second and 40 MiB."""
    decode(encode(SMALL, 'PNG'), key='first')  # imports what there is to import
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # the peak begins anew
    before, start = status('VmRSS'), time.process_time()
    with pytest.raises(BadImageError, match=words) as caught:
        decode(data, key='x', exif=exif)
    assert time.process_time() - start < 0.5
    assert status('VmHWM') - before < 40 * MIB
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def status(name: str) -> int:
    text = pathlib.Path('/proc/self/status').read_text()
    return int(re.search(rf'{name}:\s+(\d+) kB', text)[1]) << 10


@pytest.mark.parametrize('start', [b'%!PS-Adobe-3.0 EPSF-3.0', b'\xc5\xd0\xd3\xc6\x20\0\0\0'])
def test_no_image_starts_a_program(start, monkeypatch):
    """Pillow gives PostScript, whatever the file is called, to Ghostscript."""
    monkeypatch.setattr(subprocess, 'check_call', lambda *_, **__: pytest.fail('it was started'))
    monkeypatch.setattr(subprocess, 'run', lambda *_, **__: pytest.fail('it was started'))
    drawing = b'\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n'
    refused(start + drawing, 'no known format')
    eps = Image.open(io.BytesIO(b'%!PS-Adobe-3.0 EPSF-3.0' + drawing))
    with pytest.raises(BadImageError, match='EPS files are not read'):
        decode(eps, key='opened elsewhere')


OTHERS = {
    'fits': b'SIMPLE  =                    T'.ljust(80)
    + b'BITPIX  =                    8'.ljust(80),
    'gzip': gzip.compress(bytes(1000)),
    'qoi': b'qoif' + struct.pack('>IIBB', 5000, 5000, 3, 0) + bytes(30),
    'xpm': b'/* XPM */\nstatic char *x[] = {"9 9 1 1",',
    'psd': b'8BPS\0\1' + bytes(50),
    'dds': b'DDS ' + bytes(200),
    'xv': b'P7 332\n#END_OF_COMMENTS\n8 8 255\n' + bytes(64),
}


@pytest.mark.parametrize('name', OTHERS)
def test_formats_that_are_not_read(name):
    refused(OTHERS[name], 'not an image that can be read')


@pytest.mark.parametrize('format', ['AVIF', 'BMP', 'GIF', 'ICO', 'JPEG2000', 'PPM', 'TIFF', 'WEBP'])
def test_formats_that_are_read(format):
    big = SMALL.resize((64, 64))
    data = encode(big, format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
    assert np.array_equal(decode(data, key='x'), expected)


def tiff(tags, body=b'', order='<') -> bytes:
    """A file of one directory; tags are {tag: (type, count, value or bytes)}."""
    start, texts, entries = 14 + 12 * len(tags), b'', b''
    for tag, (kind, count, value) in sorted(tags.items()):
        entries += struct.pack(f'{order}HHI', tag, kind, count)
        if isinstance(value, bytes):
            entries += struct.pack(f'{order}I', start + len(texts))
            texts += value
        elif kind == 3:
            entries += struct.pack(f'{order}HH', value, 0)
        else:
            entries += struct.pack(f'{order}I', value)
    mark = b'II*\0' if order == '<' else b'MM\0*'
    return mark + struct.pack(f'{order}IH', 8, len(tags)) + entries + bytes(4) + texts + body


GREY = {
    256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1),
    277: (3, 1, 1),
}  # fmt: skip
STRIPS = {273: (4, 1, 8), 278: (4, 1, 64), 279: (4, 1, 4096)}


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('compression', [1, 4, 8])
def test_tiles_of_a_tiff_larger_than_the_picture(order, compression):
    tiles = {322: (4, 1, 65520), 323: (4, 1, 65520), 324: (4, 1, 8), 325: (4, 1, 90)}
    data = tiff(GREY | tiles | {259: (3, 1, compression)}, bytes(100), order)
    refused(data, 'its tiles are 65520 x 65520')


def test_tags_of_a_tiff():
    many = {282: (5, 100_000, bytes(800_000))}
    refused(tiff(GREY | STRIPS | many), 'its tags hold')
    refused(tiff(GREY | STRIPS | {273: (4, 99_000, bytes(396_000))}), 'its tags hold')
    refused(tiff(GREY | STRIPS | {700: (1, 9 * MIB, bytes(9 * MIB))}), 'beside the picture')
    assert decode(tiff(GREY | STRIPS, bytes(4096)), key='x').shape == (64, 64, 3)


def test_scans_of_a_jpeg_in_a_tiff():
    picture = jpeg_of_scans(99)
    start = 14 + 12 * (len(GREY) + len(STRIPS))
    strips = {273: (4, 1, start), 279: (4, 1, len(picture))}
    refused(tiff(GREY | STRIPS | strips | {259: (3, 1, 7)}, picture), 'more scans')
    data = encode(SMALL.resize((200, 200)), 'TIFF', compression='jpeg')
    expected = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
    assert np.array_equal(decode(data, key='x'), expected)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    header, *rest = re.split(b'(?=....IDAT)', encode(SMALL, 'PNG'), maxsplit=1, flags=re.S)
    return header + b''.join(chunks) + b''.join(rest)


def test_what_a_png_holds_beside_the_picture():
    text = zlib.compress(bytes(MIB))
    refused(png(*[chunk(b'zTXt', b'%d\0\0' % i + text) for i in range(60)]), '9 compressed texts')
    refused(png(*[chunk(b'iTXt', b'%d\0\1\0\0\0' % i + text) for i in range(60)]), '9 compressed')
    refused(png(chunk(b'iTXt', b'a\0\0\0\0\0' + bytes(9 * MIB))), 'beside the picture')
    refused(png(*[chunk(b'IDAT', b'')] * 60_000), 'more chunks')
    orientation = struct.pack('<4sIHHHII', b'II*\0', 8, 1, 0x112, 5, 40_000, 26) + bytes(4)
    refused(png(chunk(b'eXIf', orientation + bytes(320_000))), 'EXIF data have', exif=True)
    # What editors write is read.
    texts = [chunk(b'iTXt', b'Comment\0\0\0\0\0' + b'x' * 1000)] * 20
    assert np.array_equal(decode(png(*texts), key='x'), np.asarray(SMALL))


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack('>H', len(data) + 2) + data


def jpeg_of_scans(scans: int, side: int = 2000, between: bytes = b'') -> bytes:
    """Progressive and arithmetic-coded, where a scan without any data is a right one."""
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0]))
    more = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + between
    frame = segment(0xCA, struct.pack('>BHHB', 8, side, side, 1) + bytes([1, 0x11, 0]))
    table = segment(0xDB, bytes(1) + bytes([1] * 64))
    return b'\xff\xd8' + table + frame + first + more * scans + b'\xff\xd9'


def test_scans_of_a_jpeg_are_counted_first():
    refused(jpeg_of_scans(5000), 'more scans than any picture needs')
    refused(jpeg_of_scans(200, between=segment(0xFE, b'\xff\xd9')), 'more scans')
    refused(jpeg_of_scans(30, side=9000), 'more scans')
    # Markers without a length, after which another reader would skip what follows.
    for lone in (b'\xff\x01', b'\xff\xd0'):
        refused(jpeg_of_scans(5000, between=lone), 'more scans')
        one = jpeg_of_scans(0).replace(b'\xff\xca', b'\xff\xc0')[2:]
        hidden = jpeg_of_scans(5000)[2:]
        refused(b'\xff\xd8' + lone + hidden.ljust(65_700, b'\0') + one, 'more scans')
    opened = Image.open(io.BytesIO(jpeg_of_scans(5000)))
    with pytest.raises(BadImageError, match='more scans'):
        decode(opened, key='opened elsewhere')


@pytest.mark.parametrize(
    'pieces',
    [
        b'\xff\xe5\0\2' * 2_000_000,  # 139 MB for 4 MB
        b'\xff\xe2\0\x10ICC_PROFILE\0\1\1' * 500_000,
        b'\xff' * 10_000_000,  # 3 seconds
        b'\xff\xd0' * 3_000_000,
    ],
)
def test_segments_of_a_jpeg(pieces):
    exif = Image.Exif()
    exif[0x112] = 6
    photo = encode(SMALL.resize((16, 8)), 'JPEG', exif=exif)
    tables = photo.index(b'\xff\xdb')
    file = photo[:tables] + pieces + photo[tables:]
    refused(file, 'more than 50,000 segments', exif=True)
    assert size_of_jpeg(file, exif=True) is None
    # Where they are fewer, the picture is read, and is not turned if they are many.
    if b'ICC' not in pieces:
        for size, shape in ((240_000, (8, 16, 3)), (4000, (16, 8, 3))):
            few = photo[:tables] + pieces[:size] + photo[tables:]
            assert decode(few, key='x', exif=True).shape == shape


def test_jpegs_of_few_scans_with_a_film_behind_are_read():
    assert decode(jpeg_of_scans(20, side=64), key='x').shape == (64, 64, 3)
    photo = encode(SMALL.resize((64, 64)), 'JPEG', progressive=True)
    assert photo.count(b'\xff\xda') > 3
    pixels = decode(photo, key='x')
    assert np.array_equal(decode(photo + b'\xff\xda\0\4ab' * 5000, key='x'), pixels)


def test_jpeg_2000():
    data = encode(Image.new('RGB', (1024, 1024)), 'JPEG2000', no_jp2=True)
    coding = data.index(b'\xff\x52')
    # Precincts of one pixel: memory is taken for each.
    style = bytearray(data[coding + 4 : coding + 14])
    style[0] |= 1
    small = segment(0x52, bytes(style) + bytes([0x11] + [0] * style[5]))
    refused(data[:coding] + small + data[coding + 14 :], 'precincts')
    style[0], style[6:8] = 0, b'\0\0'  # code blocks of 4 x 4
    refused(data[:coding] + segment(0x52, bytes(style)) + data[coding + 14 :], 'blocks')
    refused(data[:24] + struct.pack('>II', 8, 8) + data[32:], 'its tiles are 8 x 8')
    refused(data + b'\xff\x4f\xff\x51' * 10_000, '10001 pictures')


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'transforms': (2, 0, 1)},
        {'transforms': (0, 1, 2, 3), 'copies': True},
        {'long': True},
    ],
)
@pytest.mark.parametrize('chunks', [{}, {'alpha': True}, {'animated': True}])
def test_groups_of_codes_of_a_webp(options, chunks):
    """300 kB took 355 MB; they are behind any transforms, in colours and in transparency."""
    sides = 1024, 1024
    for groups in (3201, 20_000):
        stream = webp.lossless(*sides, groups, **options)
        refused(webp.file_of(stream, *sides, **chunks), f'it has {groups:,} groups of codes')
    if 'long' not in options:  # these have no pixels
        file = webp.file_of(webp.lossless(*sides, 3200, **options), *sides, **chunks)
        assert decode(file, key='x').shape == (*sides, 3)


def test_groups_of_codes_of_encoders(monkeypatch):
    """What libwebp writes is gone through to the end, and is little."""
    monkeypatch.setattr(webp_files, '_FREE', 0)
    real = webp_files.MAX_GROUPS
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC)
    for image in (picture, picture.quantize(16), picture.convert('L')):
        for method in (0, 4, 6):
            file = encode(image, 'WEBP', lossless=True, method=method)
            monkeypatch.setattr(webp_files, 'MAX_GROUPS', real)
            webp_files.check(file)
            monkeypatch.setattr(webp_files, 'MAX_GROUPS', 0)
            with pytest.raises(ValueError, match=r'it has (\d|\d\d|\d\d\d) groups'):
                webp_files.check(file)


def test_chunks_of_a_webp():
    file = webp.file_of(webp.lossless(8, 8, 1), 8, 8, animated=True)
    many = file[:4] + (len(file) + 800_000).to_bytes(4, 'little') + file[8:]
    refused(many + b'abcd\0\0\0\0' * 100_000, 'more than 50,000 chunks')
    icc = b'ICCP' + (9 * MIB).to_bytes(4, 'little') + bytes(9 * MIB)
    refused(file[:12] + icc + file[12:], 'beside the picture')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L'])
@pytest.mark.parametrize('lossless', [False, True])
def test_webp_as_by_pillow(mode, lossless, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 4)).astype(np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    file = encode(picture, 'WEBP', lossless=lossless, exact=True)
    expected = np.asarray(Image.open(io.BytesIO(file)).convert('RGB'))
    loaded = []
    monkeypatch.setattr(Image.Image, 'load', lambda _: loaded.append(1))
    assert np.array_equal(decode(file, key='x'), expected)
    assert not loaded  # the decoder was called
    monkeypatch.undo()
    with pytest.raises(BadImageError):
        decode(file[:-100], key='x')
    monkeypatch.setattr(webp_files, '_libwebp', lambda: None)  # where it cannot be
    assert np.array_equal(decode(file, key='x'), expected)


# An AV1 sequence header up to its sizes, of 16 bits, and beyond; a frame's, up to its own size.
SEQUENCE = '0' * 29 + '1' * 8 + format(63, '016b') * 2 + '0' * 9 + '11' + '0' * 4
FRAME = '0001001'


def test_frames_of_an_avif_larger_than_the_picture():
    """A file of 1 kB took 250 MB."""
    more = {'save_all': True, 'append_images': [Image.new('RGB', (3000, 3000))]}
    for options in ({}, more):
        file = avif.encoded(3000, **options)
        refused(avif.declared(file, 64), 'it declares 4,096 pixels, and its frames have')
        refused(avif.declared(file, 1), 'it declares 1 pixels')
        assert decode(avif.declared(file, 2900), key='x').shape == (2900, 2900, 3)  # as libavif
    own_size = avif.frame(SEQUENCE, FRAME)
    refused(avif.with_item(own_size), 'its frames have 4,294,967,296')
    same_size = avif.frame(SEQUENCE, FRAME[:-1] + '0')
    assert avif_files.areas(avif.with_item(same_size * 9)) == [64 * 64] * 9
    refused(avif.with_item(avif.frame(SEQUENCE, FRAME[:-1] + '0') * 999), 'in more than 1,000')


@pytest.mark.parametrize(
    'make',
    [
        functools.partial(avif.with_items, 65_000),
        functools.partial(avif.with_properties, 20_000, 0),
        functools.partial(avif.with_properties, 9000, 255),
        functools.partial(avif.with_frames, 2_500_000),
        functools.partial(avif.in_parts, 1000),
        functools.partial(avif.in_parts, 65_535),
    ],
)
def test_tables_of_an_avif(make):
    """Of each entry the decoder makes more, as soon as it opens the file: up to 1.1 GB."""
    refused(make(), 'more than 4,000|bytes of properties|2,500,000 frames|bytes than the file')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L'])
@pytest.mark.parametrize('frames', [1, 3])
def test_avif_of_encoders(mode, frames):
    picture = SMALL.resize((90, 70)).convert(mode)
    more = {'save_all': True, 'append_images': [picture.rotate(180)] * (frames - 1)}
    file = encode(picture, 'AVIF', **more)
    assert set(avif_files.areas(file)) == {90 * 70}
    expected = np.asarray(Image.open(io.BytesIO(file)).convert('RGB'))
    assert np.array_equal(decode(file, key='x'), expected)


def bmp_rle(width: int, height: int) -> bytes:
    sizes = struct.pack('<IiiHHIIiiII', 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    start = 14 + len(sizes) + 1024
    return b'BM' + struct.pack('<IHHI', 0, 0, 0, start) + sizes + bytes(range(256)) * 4


PYTHON = {
    'bmp': bmp_rle(5000, 5000) + b'\1\5' * 2_500_000,
    'ppm': b'P6\n5000 5000\n254\n' + bytes(7_500_000),
    'plain': b'P3\n5000 5000\n255\n' + b'1 ' * 2_500_000,
    'comments': b'P3\n8 8\n255\n' + b'#\n' * 100_000 + b'1 ' * 192,
    'header': b'P6\n#' + b'x' * MIB + b'\n8 8\n255\n' + bytes(192),
    'gif': encode(SMALL.convert('P'), 'GIF')[:13] + bytes(768) + b'!\xfe' + b'\1x' * 90_000,
    'icon': b'\0\0\1\0\1\0' + struct.pack('<BBBBHHII', 16, 16, 0, 0, 1, 32, 99, 22)
    + b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>II5B', 9000, 9000, 8, 2, 0, 0, 0)),
    'icons': b'\0\0\1\0\xff\xff' + b''.join(
        struct.pack('<BBBBHHII', 16, 16, 0, 0, 1, 32, 99, place) for place in range(65_535)
    ) + bytes(3 * MIB),
}  # fmt: skip


@pytest.mark.parametrize('name', PYTHON)
def test_what_pillow_reads_in_python_is_limited(name):
    refused(PYTHON[name], 'takes long|comments|header|more blocks|icons?')


def test_nothing_else_opens_images():
    root = pathlib.Path(__file__).parents[2]
    files = [path for folder in ('vit_jax', 'scripts') for path in (root / folder).rglob('*.py')]
    opening = re.compile(r'Image\.open\((?!buffer, formats=)|imread|imdecode')
    found = {path.name for path in files if opening.search(path.read_text())}
    assert found == {'image_files.py'}


@pytest.mark.skipif(not SHARED.is_dir(), reason='the cases are not here')
@pytest.mark.parametrize('name', ['eps.jpg', 'tile_small.tiff', 'fits_gz_empty.jpg'])
def test_cases(name):
    refused((SHARED / name).read_bytes(), 'not an image that can be read')
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_nsignals == 0
