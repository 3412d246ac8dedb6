"""AVIF files made by hand, from one that Pillow wrote (ISO/IEC 14496-12)."""

import io
import struct
from collections.abc import Iterator

from PIL import Image


def small(**options) -> bytes:
    """64 x 64 black pixels."""
    return encoded(64, **options)


def encoded(side: int, **options) -> bytes:
    """A black square."""
    file = io.BytesIO()
    Image.new('RGB', (side, side)).save(file, 'AVIF', speed=10, **options)
    return file.getvalue()


def declared(data: bytes, side: int) -> bytes:
    """The same frames in a file that says it were of this size."""
    out = bytearray(data)
    place = data.index(b'ispe') + 8
    out[place : place + 8] = struct.pack('>II', side, side)
    if (track := data.find(b'tkhd')) > 0:
        out[track + 92 : track + 100] = struct.pack('>II', side << 16, side << 16)
    return bytes(out)


def with_item(item: bytes) -> bytes:
    """A file of 64 x 64 pixels, whose picture is this."""
    data = small()
    return _joined(data, iloc=_located(data, [(0, len(item))]), mdat=item)


def in_parts(parts: int) -> bytes:
    """A file whose picture consists of so many parts, each of which is the whole file."""
    data = small()
    return _joined(data, iloc=_located(data, [(-900, len(data))] * parts))


def with_items(number: int) -> bytes:
    """A file that has so many pictures without data."""
    data = small()
    entries = (
        box(b'infe', b'\2\0\0\0', struct.pack('>HH4s', i, 0, b'av01'), b'\0')
        for i in range(1, number + 1)
    )
    return _joined(data, iinf=box(b'iinf', bytes(4), struct.pack('>H', number), *entries))


def with_properties(items: int, each: int) -> bytes:
    """A file in which so many items each have a property so often."""
    data = small()
    common, first = boxes(_meta(data)[b'iprp'][8:])
    more = (struct.pack('>HB', i, each) + b'\1' * each for i in range(2, items + 2))
    table = first[16:] + b''.join(more)
    return _joined(
        data,
        iprp=box(b'iprp', common, box(b'ipma', bytes(4), struct.pack('>I', items + 1), table)),
    )


def with_frames(number: int) -> bytes:
    """A sequence that says it has so many frames of a byte each."""
    data = bytearray(small(save_all=True, append_images=[Image.new('RGB', (64, 64), 'red')]))
    sizes, chunks = data.index(b'stsz'), data.index(b'stsc')
    data[sizes + 8 : sizes + 12] = struct.pack('>I', 1)
    data[chunks + 16 : chunks + 20] = struct.pack('>I', number)
    return bytes(data) + bytes(number)


def frame(sequence: str, header: str) -> bytes:
    """A coded frame, of the bits of its two headers."""
    return b''.join(
        bytes([kind << 3 | 2, len(bits) // 8 + 1])
        + int(bits.ljust(len(bits) // 8 * 8 + 8, '0'), 2).to_bytes(len(bits) // 8 + 1, 'big')
        for kind, bits in ((1, sequence), (6, header))
    )


def box(kind: bytes, *contents: bytes) -> bytes:
    """A box."""
    content = b''.join(contents)
    return struct.pack('>I4s', len(content) + 8, kind) + content


def boxes(data: bytes) -> Iterator[bytes]:
    """The boxes that follow each other."""
    place = 0
    while place < len(data):
        (size,) = struct.unpack_from('>I', data, place)
        yield data[place : place + size]
        place += size


def _meta(data: bytes) -> dict[bytes, bytes]:
    """The boxes in the box `meta`, by kind."""
    _, meta, _ = boxes(data)
    return {each[4:8]: each for each in boxes(meta[12:])}


def _located(data: bytes, parts: list[tuple[int, int]]) -> bytes:
    """The box `iloc` for an item of these parts, by place behind the begin of `mdat` and size."""
    head = bytes(4) + b'\x44\0' + struct.pack('>HHHH', 1, 1, 0, len(parts))
    size = 8 + len(head) + 8 * len(parts)
    begin = len(data) - len(list(boxes(data))[-1]) + size - len(_meta(data)[b'iloc']) + 8
    places = (struct.pack('>II', max(begin + place, 0), size) for place, size in parts)
    return box(b'iloc', head, *places)


def _joined(data: bytes, mdat: bytes | None = None, **new: bytes) -> bytes:
    """The file with other boxes in its box `meta`, and other data."""
    first, _, last = boxes(data)
    children = _meta(data) | {kind.encode(): each for kind, each in new.items()}
    meta = box(b'meta', bytes(4), *children.values())
    return first + meta + (last if mdat is None else box(b'mdat', mdat))
