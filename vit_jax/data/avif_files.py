"""The sizes of the frames in an AVIF file, looked at before they are decoded.

The container declares a size, and each coded frame has its own, for which the decoder takes memory.
From ISO/IEC 14496-12 (boxes, items, tracks) and sections 5.3 to 5.9 of the AV1 bitstream
specification.
"""

import dataclasses
import struct
from collections.abc import Iterator

_MIB = 1 << 20
_MAX_BOXES = 4000  # or parts of items; an item takes 1.5 kB of memory
_MAX_TABLES = 48 << 10  # bytes, that name items and their properties: 70 bytes of memory each
_MAX_SAMPLES = 100_000  # of a track, 140 bytes of memory each
_MAX_UNITS = 1000  # in which the frames of one item or sample lie
_SEQUENCE_BYTES, _FRAME_BYTES = 512, 16  # in which ends what is read of a header
_CONTAINERS = (b'moov', b'trak', b'mdia', b'minf', b'iprp', b'ipco')
_SEQUENCE, _FRAMES = 1, (3, 6, 7)  # kinds of units; a header alone, with its tiles, repeated
_SWITCH_FRAME = 3
_CHOICE = 2  # in a sequence header: what each frame says itself


def areas(data: bytes) -> list[int]:
    """The sizes of the frames that are decoded for the first picture of an AVIF file.

    Returns:
      Height times width of each frame, twice that where it has more than 8 bits; where it has a
      size of its own, the most that this can be.

    Raises:
      ValueError: the file has more boxes, items or frames than any encoder writes; for each the
        decoder takes memory when it opens the file.
    """
    return [area for stream in _streams(memoryview(data)) for area in _areas(stream)]


def check(frames: list[int], pixels: int) -> None:
    """Compares the frames of a file with what it declares.

    Args:
      frames: as by `areas`.
      pixels: height times width, as the file declares them.

    Raises:
      ValueError: its frames are larger, or more, than such a picture has.
    """
    if max(frames, default=0) > 4 * pixels + 2 * _MIB or sum(frames) > 8 * (pixels + _MIB):
        raise ValueError(f'it declares {pixels:,} pixels, and its frames have {sum(frames):,}')


def _streams(data: memoryview) -> Iterator[memoryview]:
    """What is coded as AV1: such items, and the first sample of each track."""
    try:
        for kind, begin, end in _boxes(data, 0, len(data)):
            if kind == b'meta':
                yield from _items(data, begin + 4, end)
            elif kind == b'stbl':
                yield _first_sample(data, begin, end)
    except (struct.error, IndexError):
        return  # damaged; the decoder tells


def _boxes(data: memoryview, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin, end) of what is in the boxes between two places, and in containers there."""
    parts, boxes = [(begin, end)], 0
    for begin, end in parts:
        while begin + 8 <= end:
            size, kind = struct.unpack_from('>I4s', data, begin)
            header = 8
            if size == 1:
                (size,) = struct.unpack_from('>Q', data, begin + 8)
                header = 16
            after = min(begin + size, end) if size else end
            if after < begin + header:
                return
            yield kind, begin + header, after
            if kind in _CONTAINERS:
                parts.append((begin + header, after))
            begin = after
            boxes += 1
            if boxes > _MAX_BOXES:
                raise ValueError(f'it has more than {_MAX_BOXES:,} boxes')


def _first_sample(data: memoryview, begin: int, end: int) -> memoryview:
    place = size = chunks = most = 0
    kinds = set()
    for kind, at, after in _boxes(data, begin, end):
        if kind in kinds:
            raise ValueError('it has a table of its frames twice')
        kinds.add(kind)
        if kind == b'stsz':
            size, _, first = struct.unpack_from('>3I', data, at + 4)
            size = size or first
        elif kind in (b'stco', b'co64'):
            form = '>II' if kind == b'stco' else '>IQ'
            chunks, place = struct.unpack_from(form, data, at + 4)
        elif kind == b'stsc':
            entries = data[at + 8 : after]
            each = (struct.unpack_from('>4xI', entries, i) for i in range(0, len(entries) - 11, 12))
            most = max((samples for (samples,) in each), default=0)
    if chunks * most > _MAX_SAMPLES + len(data) // 64:
        raise ValueError(f'it has {chunks * most:,} frames')
    return data[place : place + size]


def _items(data: memoryview, begin: int, end: int) -> Iterator[memoryview]:
    """The items of a meta box that are coded as AV1."""
    coded: list[int] = []
    parts: dict[int, list[tuple[bool, int, int]]] = {}
    own = tables = 0  # where data of the box itself begin; bytes of tables
    for kind, at, after in _boxes(data, begin, end):
        if kind == b'iinf':
            for name, entry, _ in _boxes(data, at + (8 if data[at] else 6), after):
                if name == b'infe':
                    form = '>IH4s' if data[entry] > 2 else '>HH4s'
                    item, _, what = struct.unpack_from(form, data, entry + 4)
                    coded += [item] if what == b'av01' else []
        elif kind == b'iloc':
            parts |= _locations(data, at)
        elif kind == b'idat':
            own = at
        elif kind in (b'ipma', b'iref'):
            tables += after - at
            if tables > _MAX_TABLES:
                raise ValueError(f'it has {tables:,} bytes of properties and references')
    lengths = (size or len(data) - place for each in parts.values() for _, place, size in each)
    if sum(lengths) > 4 * len(data):
        raise ValueError('its items have more bytes than the file')
    for item in coded:
        pieces = []
        for inside, place, size in parts.get(item, ()):
            place += own * inside
            pieces.append(data[place : place + size if size else end if inside else None])
        yield pieces[0] if len(pieces) == 1 else memoryview(b''.join(pieces))


def _locations(data: memoryview, at: int) -> dict[int, list[tuple[bool, int, int]]]:
    """For each item its parts: (whether in the box itself, place, size or 0 for all that follows).

    Args:
      data: the file.
      at: where the contents of its box `iloc` begin.
    """
    version, sizes = data[at], data[at + 4] << 8 | data[at + 5]
    offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_size = sizes & 15 if version else 0
    at += 6

    def take(size: int) -> int:
        nonlocal at
        at += size
        if at > len(data):
            raise IndexError
        return int.from_bytes(data[at - size : at], 'big')

    found: dict[int, list[tuple[bool, int, int]]] = {}
    number = 0
    for _ in range(take(4 if version == 2 else 2)):
        item = take(4 if version == 2 else 2)
        inside = bool(version) and take(2) & 15 == 1
        take(2)
        base = take(base_size)
        for _ in range(take(2)):
            take(index_size)
            place = base + take(offset_size)
            found.setdefault(item, []).append((inside, place, take(length_size)))
            number += 1
            if number > _MAX_BOXES:
                raise ValueError(f'its items are in more than {_MAX_BOXES:,} parts')
    return found


def _areas(stream: memoryview) -> Iterator[int]:
    """The sizes of the frames of a stream, as of `areas`."""
    sequence, place = None, 0
    for _ in range(_MAX_UNITS):
        if place >= len(stream):
            return
        head = stream[place]
        place += 2 if head & 4 else 1
        size = len(stream) - place
        if head & 2:
            size, place = _leb128(stream, place)
        unit, kind = stream[place : place + size], head >> 3 & 15
        place += size
        if kind == _SEQUENCE:
            sequence = _sequence(_Bits(unit[:_SEQUENCE_BYTES]))
        elif kind in _FRAMES and sequence:
            changes = _changes_size(_Bits(unit[:_FRAME_BYTES]), sequence)
            yield sequence.most if changes else sequence.area
    raise ValueError(f'a frame of it is in more than {_MAX_UNITS:,} parts')


def _leb128(data: memoryview, place: int) -> tuple[int, int]:
    """(a number of seven bits in each byte, the place behind it)."""
    number = 0
    for i in range(8):
        byte = data[place + i] if place + i < len(data) else 0
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, place + i + 1
    return number, place + 8


class _Bits:
    """Reads bits from the highest on; behind the end they are 0."""

    def __init__(self, data: memoryview):
        self._number = int.from_bytes(data, 'big')
        self._left = 8 * len(data)

    def take(self, bits: int) -> int:
        self.skip(bits)
        return self._number >> self._left & ((1 << bits) - 1)

    def skip(self, bits: int) -> None:
        self._left -= bits
        if self._left < 0:
            self._number <<= -self._left
            self._left = 0


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """What a sequence header says of its frames.

    Attributes:
      area: height times width, twice that for more than 8 bits.
      most: the largest area that a frame can have that changes it.
      still: whether it is a still picture with short headers.
      time_bits: of the time that is in the header of a frame that is shown.
      screen: whether frames have tools for screen content.
      whole_vectors: whether their motion vectors are whole; both may be `_CHOICE`.
      id_bits: of the number of a frame.
    """

    area: int
    most: int
    still: bool
    time_bits: int
    screen: int
    whole_vectors: int
    id_bits: int


def _sequence(bits: _Bits) -> _Sequence:
    """Reads a sequence header (section 5.5)."""
    bits.skip(4)
    still = bool(bits.take(1))
    time_bits = 0
    if still:
        bits.skip(5)
    else:
        time_bits = _skip_operating_points(bits)
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    area = (bits.take(width_bits) + 1) * (bits.take(height_bits) + 1)
    screen = whole_vectors = _CHOICE
    id_bits = 0
    if not still:
        if bits.take(1):
            less = bits.take(4) + 2
            id_bits = less + bits.take(3) + 1
        bits.skip(3 + 4)
        if bits.take(1):  # the order of frames
            bits.skip(2)
        if not bits.take(1):
            screen = bits.take(1)
        if screen and not bits.take(1):
            whole_vectors = bits.take(1)
    else:
        bits.skip(3)
    bits.skip(3)
    depth = 1 + bits.take(1)
    most = depth << (width_bits + height_bits)
    return _Sequence(area * depth, most, still, time_bits, screen, whole_vectors, id_bits)


def _skip_operating_points(bits: _Bits) -> int:
    """Goes to behind times and operating points; returns the bits of a frame's time."""
    time_bits = delay_bits = 0
    same_intervals = False
    if bits.take(1):  # timing
        bits.skip(64)
        same_intervals = bool(bits.take(1))
        if same_intervals:
            zeros = 0
            while zeros < 32 and not bits.take(1):
                zeros += 1
            bits.skip(zeros if zeros < 32 else 0)
        if bits.take(1):  # model of the decoder
            delay_bits = bits.take(5) + 1
            bits.skip(32 + 5)
            time_bits = bits.take(5) + 1
    has_delay = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.skip(12)
        if bits.take(5) > 7:
            bits.skip(1)
        if delay_bits and bits.take(1):
            bits.skip(2 * delay_bits + 1)
        if has_delay and bits.take(1):
            bits.skip(4)
    return 0 if same_intervals else time_bits


def _changes_size(bits: _Bits, sequence: _Sequence) -> bool:
    """Whether a frame header (section 5.9.2) gives the frame a size of its own."""
    if sequence.still or bits.take(1):  # or is shown again
        return False
    kind, shown = bits.take(2), bits.take(1)
    if shown:
        bits.skip(sequence.time_bits)
    else:
        bits.skip(1)
    if kind == _SWITCH_FRAME:
        return True
    if kind or not shown:
        bits.skip(1)
    bits.skip(1)
    screen = bits.take(1) if sequence.screen == _CHOICE else sequence.screen
    if screen and sequence.whole_vectors == _CHOICE:
        bits.skip(1)
    bits.skip(sequence.id_bits)
    return bool(bits.take(1))
