"""Ways to damage an image: the fields of its format, and what makes decoders work."""

import gzip
import random
import struct
import zlib

from fuzzing import avif, webp
from fuzzing.mutate import NUMBERS, damage

# What no reader may take for an image, whatever the name.
OTHERS = (
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n%%EOF\n',
    b'SIMPLE  =                    T'.ljust(80) + b'NAXIS   =                    0'.ljust(2800),
    gzip.compress(bytes(5000)),
    b'qoif' + struct.pack('>IIBB', 5000, 5000, 3, 0) + bytes(30),
    b'/* XPM */\nstatic char *x[] = {"9 9 1 1",',
    b'P7 332\n#END_OF_COMMENTS\n8 8 255\n' + bytes(64),
    b'\x89HDF\r\n\x1a\n',
    b'8BPS\0\1' + bytes(50),
    b'\xd7\xcd\xc6\x9a' + bytes(50),
)


def damage_image(rng: random.Random, suffix: str, data: bytes) -> bytes:
    """An image of the format of this suffix with its fields changed, or another kind of file."""
    choice = rng.random()
    if choice < 0.02:
        return rng.choice(OTHERS) + (data if rng.random() < 0.5 else b'')
    if choice < 0.1:
        return repeat_often(rng, data)
    return _FORMATS.get(suffix, damage)(rng, data)


def repeat_often(rng: random.Random, data: bytes) -> bytes:
    """Some bytes of a header so often that whoever takes each for something gets tired."""
    place, size = rng.randrange(min(len(data), 600)), rng.choice((1, 2, 4, 12, 14, 16, 40))
    piece = data[place : place + size]
    times = rng.choice((1000, 100_000, 2_000_000 // size))
    return data[:place] + piece * times + data[place:]


def damage_png(rng: random.Random, data: bytes) -> bytes:
    """Its chunks changed, with right checksums."""
    chunks, place = [], 8
    while place + 8 <= len(data):
        size = struct.unpack('>I', data[place : place + 4])[0]
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + size]])
        place += 12 + size
    for _ in range(rng.choice((1, 1, 3))):
        chunk = rng.choice(chunks)
        action = rng.randrange(6)
        if action == 0:  # width, height, depth, colour type
            header = bytearray(chunks[0][1])
            field = rng.choice((0, 0, 4, 4, 8, 9, 10, 11, 12))
            value = rng.choice(NUMBERS[:17])
            packed = struct.pack('>I', value % 2**32) if field < 8 else bytes([value % 256])
            header[field : field + len(packed)] = packed
            chunks[0][1] = bytes(header)
        elif action == 1:
            chunk[1] = damage(rng, chunk[1])
        elif action == 2:
            rng.shuffle(chunks)
        elif action == 3:
            chunks.insert(rng.randrange(len(chunks)), list(chunk))
        elif action == 4:
            bomb = zlib.compress(bytes(1 << 24))
            kind = rng.choice((b'zTXt', b'iCCP', b'iTXt', b'eXIf', b'acTL', b'fcTL', b'PLTE'))
            chunks.insert(1, [kind, b'a\0\0' + bomb])
        else:
            chunk[0] = rng.choice((b'IDAT', b'IEND', b'PLTE', b'tRNS', b'IHDR', b'fdAT'))
    body = b''.join(
        struct.pack('>I', len(content))
        + kind
        + content
        + struct.pack('>I', zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return data[:8] + body


def damage_jpeg(rng: random.Random, data: bytes) -> bytes:
    """Its segments changed: sizes, tables, order."""
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        size = struct.unpack('>H', data[place + 2 : place + 4])[0]
        segments.append(bytearray(data[place : place + 2 + size]))
        place += 2 + size
    rest = data[place:]
    if not segments:
        return damage(rng, data)
    for _ in range(rng.choice((1, 1, 3))):
        action = rng.randrange(6)
        segment = rng.choice(segments)
        frames = [s for s in segments if s[1] in (0xC0, 0xC1, 0xC2)]
        if action == 0 and frames:  # precision, height, width, components
            field = rng.choice((4, 5, 7, 9))
            value = struct.pack('>H', rng.choice((0, 1, 7, 65535, 30000, 4, 255)))
            frames[0][field : field + 2] = value
        elif action == 1:
            segment[2:4] = struct.pack('>H', rng.choice((0, 1, 2, 65535)))
        elif action == 2:
            rng.shuffle(segments)
        elif action == 3:
            segments.insert(rng.randrange(len(segments)), bytearray(segment))
        elif action == 4:
            segment[4:] = damage(rng, bytes(segment[4:]))
        else:
            segment[1] = rng.choice((0xC0, 0xC2, 0xC4, 0xDB, 0xE1, 0xEE, 0xDD, 0xD9, 0xDA))
    out = b'\xff\xd8' + b''.join(map(bytes, segments)) + rest
    return damage(rng, out) if rng.random() < 0.2 else out


def damage_scans(rng: random.Random, data: bytes) -> bytes:
    """A JPEG with the header of a scan, or a whole one, many times."""
    start = data.rfind(b'\xff\xda')
    if start < 0:
        return damage(rng, data)
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], 'big')
    scan = data[start : rng.choice((end, end, max(end, len(data) - 2)))]
    times = min(rng.choice((5, 30, 150, 5000)), 2_000_000 // len(scan))
    out = data[:start] + scan * times + data[start:]
    if rng.random() < 0.5:  # arithmetic coding, where a scan needs no data; a large picture
        for old, new in ((b'\xff\xc0', b'\xff\xc9'), (b'\xff\xc2', b'\xff\xca')):
            out = out.replace(old, new, 1)
    frame = next(
        (place for kind in b'\xc0\xc2\xc9\xca' if (place := out.find(bytes([255, kind]))) > 0), 0
    )
    if frame and rng.random() < 0.5:
        side = rng.choice((500, 2000, 5000))
        out = out[: frame + 5] + struct.pack('>HH', side, side) + out[frame + 9 :]
    return out


def many_segments(rng: random.Random, data: bytes) -> bytes:
    """Very many parts before the picture: empty ones, comments, padding, other markers."""
    piece = rng.choice(
        (b'\xff\xe5\0\2', b'\xff\xfe\0\2', b'\xff\xe2\0\x10ICC_PROFILE\0\1\1', b'\xff', b'\xff\xd0')
    )
    tables = max(data.find(b'\xff\xdb'), 2)
    times = rng.choice((100, 40_000, 10_000_000 // len(piece)))
    return data[:tables] + piece * times + data[tables:]


def damage_tiff(rng: random.Random, data: bytes) -> bytes:
    """Its tags changed, added and repeated: sizes of tiles and strips, counts, places, types."""
    order = '<' if data[:2] == b'II' else '>'
    (place,) = struct.unpack_from(f'{order}I', data, 4)
    if place + 2 > len(data):
        return damage(rng, data)
    (count,) = struct.unpack_from(f'{order}H', data, place)
    tags = [
        list(struct.unpack_from(f'{order}HHII', data, at))
        for at in range(place + 2, min(place + 2 + 12 * count, len(data) - 11), 12)
    ]
    for _ in range(rng.choice((1, 1, 2, 4))):
        tag = rng.choice(tags)
        action = rng.randrange(6)
        if action == 0:
            tag[3] = int(rng.choice(NUMBERS)) % 2**32
        elif action == 1:
            tag[2] = rng.choice((0, 1, 2, 1000, 100_000, 2**31, 2**32 - 1))
        elif action == 2:
            tag[1] = rng.randrange(20)
        elif action == 3:
            side = rng.choice((1, 16, 100, 4096, 65520, 2**31 - 1))
            tags += [[322, 4, 1, side], [323, 4, 1, side], [324, 4, 1, 8], [325, 4, 1, len(data)]]
        elif action == 4:
            tags.append([rng.choice((259, 262, 277, 284, 317, 339)), 3, 1, rng.randrange(9)])
        else:  # many that share one place
            size = rng.choice((100, 10_000, len(data) // 8))
            kind = rng.choice((1, 3, 5, 7))
            tags += [
                [rng.randrange(300, 60_000), kind, size, 8] for _ in range(rng.choice((1, 500)))
            ]
    if rng.random() < 0.7:
        tags.sort(key=lambda tag: tag[0])
    directory = struct.pack(f'{order}H', len(tags) % 65536)
    directory += b''.join(struct.pack(f'{order}HHII', *tag) for tag in tags) + bytes(4)
    data += bytes(rng.choice((0, 0, 300_000)))
    return data[:4] + struct.pack(f'{order}I', len(data)) + data[8:] + directory


def damage_jpeg_2000(rng: random.Random, data: bytes) -> bytes:
    """The sizes of picture and tiles, layers, blocks and precincts changed."""
    out = bytearray(data)
    size, coding = data.find(b'\xff\x4f\xff\x51') + 2, data.find(b'\xff\x52')
    if size < 2 or coding < 0:
        return damage(rng, data)
    for _ in range(rng.choice((1, 1, 3))):
        if rng.random() < 0.5:
            place = size + 6 + 4 * rng.randrange(8)
            value = rng.choice((0, 1, 4, 16, 64, 3000, 9000, 2**31 - 1, 2**32 - 1))
            out[place : place + 4] = struct.pack('>I', value)
            if rng.random() < 0.5:
                out[place + 4 : place + 8] = struct.pack('>I', value)
        else:
            out[coding + 4 + rng.randrange(10)] = rng.choice((0, 1, 2, 4, 33, 255))
    return bytes(out)


def damage_webp(rng: random.Random, data: bytes) -> bytes:
    """Its header changed, or a lossless stream made by hand, with many groups of codes."""
    if rng.random() < 0.5:
        return damage_header(rng, data)
    if rng.random() < 0.1:
        piece = rng.choice((b'abcd\0\0\0\0', b'EXIF\0\0\4\0' + bytes(1 << 18)))
        chunks = piece * (rng.choice((100_000, 10_000_000)) // len(piece))
        size = min(len(data) + len(chunks) - 8, 2**32 - 1)
        return data[:4] + struct.pack('<I', size) + data[8:] + chunks
    width, height = rng.choice(((1024, 1024), (512, 300), (3000, 900), (100, 16383)))
    stream = webp.lossless(
        width,
        height,
        rng.choice((1, 100, 3300, 20_000, 65_536)),
        block=rng.choice((2, 2, 3, 6)),
        transforms=rng.sample(range(4), rng.randrange(5)),
        copies=rng.random() < 0.5,
        long=rng.random() < 0.1,
        seed=rng.randrange(100),
    )
    out = webp.file_of(stream, width, height, alpha=rng.random() < 0.3, animated=rng.random() < 0.3)
    return damage(rng, out) if rng.random() < 0.3 else out


def damage_avif(rng: random.Random, data: bytes) -> bytes:
    """Its header changed, or frames, items and tables that nobody writes."""
    action = rng.randrange(8)
    if action == 0:
        out = avif.declared(avif.encoded(rng.choice((1500, 3000))), rng.choice((1, 64, 2000)))
    elif action == 1:
        side = rng.choice((65535, 9000, 70))
        bits = ''.join(rng.choice('01') for _ in range(rng.randrange(60)))
        sequence = '0' * 29 + '1' * 8 + format(side, '016b') * 2 + bits
        out = avif.with_item(avif.frame(sequence, '0001001' + bits) * rng.choice((1, 1, 900)))
    elif action == 2:
        out = avif.with_items(rng.choice((10, 3000, 65_000)))
    elif action == 3:
        out = avif.with_properties(rng.choice((10, 180, 20_000)), rng.choice((0, 1, 255)))
    elif action == 4:
        out = avif.with_frames(rng.choice((2, 90_000, 2_500_000)))
    elif action == 5:
        out = avif.in_parts(rng.choice((2, 1000, 65_535)))
    else:
        return damage_header(rng, data)
    return damage(rng, out) if rng.random() < 0.3 else out


def damage_header(rng: random.Random, data: bytes) -> bytes:
    """Numbers in the first bytes, which tell sizes in most formats."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 4))):
        code = rng.choice('<B <H >H <I >I'.split())
        size = struct.calcsize(code)
        place = rng.randrange(max(1, min(len(out) - size, 64)))
        number = rng.choice((*(int(n) for n in NUMBERS[:17]), 500, 3000, 9000))
        out[place : place + size] = struct.pack(code, number % 2 ** (8 * size))
    return bytes(out)


def _jpeg(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((damage_jpeg, damage_jpeg, damage_scans, many_segments))(rng, data)


_FORMATS = {
    '.jpg': _jpeg,
    '.png': damage_png,
    '.tiff': damage_tiff,
    '.jp2': damage_jpeg_2000,
    '.webp': damage_webp,
    '.avif': damage_avif,
    **dict.fromkeys(('.gif', '.bmp', '.ico', '.ppm', '.heic'), damage_header),
}
