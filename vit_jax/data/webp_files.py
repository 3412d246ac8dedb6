"""WebP files: the codes of a lossless stream, counted before it is decoded, and the decoder.

A lossless stream (RFC 9649, section 3) may divide its picture into blocks, each of which uses one
of up to 65,536 groups of prefix codes. For each group the decoder takes up to 20 kB of memory, and
the file needs 3 bytes. How many there are stands behind the transforms, whose own small pictures
have to be gone through.
"""

import ctypes
import functools
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# libwebp, the encoder of nearly all files, makes at most 2,600 blocks. So many groups take 66 MB.
MAX_GROUPS = 3200
_FREE = 28_000  # bytes: of less than 20 bits for a group, the decoder makes at most 64 MB
_MAX_COPIES = 1 << 18  # in the small pictures; an encoder writes some thousand

_MAX_CHUNKS = 50_000  # of a file
_METADATA = b'ICCP', b'EXIF', b'XMP '  # chunks that are copied when the file is opened
_MAX_METADATA = 8 << 20

_PREDICTOR, _COLOUR, _PALETTE = 0, 1, 3  # transforms with a picture
_LENGTHS = 256  # first symbol of the green code that is the length of a copy
_CACHED = 280  # first one that is an entry of the colour cache
_CODE_LENGTH_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
_REPEATS = {16: (2, 3), 17: (3, 3), 18: (7, 11)}  # symbol: (extra bits, least number)

_BLOCKS = 256, 4096  # bytes that are looked at together: at first, and at most
_PADDING = 16  # bytes; more than a pixel takes
_COPY = 255  # in place of the bits of a pixel


def decode(data: bytes, width: int, height: int) -> np.ndarray | None:
    """The pixels of a file of one picture, by the decoder that Pillow has.

    Pillow itself decodes every picture as if more came after it, which takes twice the time and
    four times the memory.

    Args:
      data: the file; `check` has seen it.
      width: as its header says.
      height: as its header says.

    Returns:
      uint8 [height, width, 3]; None where the decoder is not within reach or refuses the file.
    """
    library = _libwebp()
    if library is None:
        return None
    pixels = np.zeros((height, width, 3), np.uint8)
    size = min(len(data), 8 + int.from_bytes(data[4:8], 'little'))  # where the file says it ends
    done = library.WebPDecodeRGBInto(data, size, pixels.ctypes, pixels.nbytes, 3 * width)
    return pixels if done else None


@functools.cache
def _libwebp() -> ctypes.CDLL | None:
    """The library that belongs to Pillow, if its functions can be called."""
    from PIL import _webp

    try:
        library = ctypes.CDLL(_webp.__file__)
        function = library.WebPDecodeRGBInto
    except (OSError, AttributeError):
        return None
    size = ctypes.c_size_t
    function.argtypes = [ctypes.c_char_p, size, ctypes.c_void_p, size, ctypes.c_int]
    function.restype = ctypes.c_void_p
    return library


def check(data: bytes) -> None:
    """Checks a WebP file and its first picture.

    Raises:
      ValueError: it has more chunks or metadata, or a lossless stream, of colours or of
        transparency, more groups of prefix codes than any encoder writes.
    """
    _check_chunks(data)
    for stream, place, width, height in _lossless_streams(data):
        try:
            groups = _Stream(stream, place).count_groups(width, height)
        except _DamagedError:
            continue  # the decoder tells
        if groups > MAX_GROUPS:
            raise ValueError(f'it has {groups:,} groups of codes, more than any encoder writes')


def _check_chunks(data: bytes) -> None:
    place, metadata = 12, 0
    for _ in range(_MAX_CHUNKS):
        if place + 8 > len(data):
            return
        kind, size = struct.unpack_from('<4sI', data, place)
        place += 8 + size + size % 2
        if kind in _METADATA:
            metadata += size
            if metadata > _MAX_METADATA:
                raise ValueError(f'it has {metadata:,} bytes of data beside the picture')
    raise ValueError(f'it has more than {_MAX_CHUNKS:,} chunks')


def _lossless_streams(data: bytes) -> Iterator[tuple[memoryview, int, int, int]]:
    """(stream, its first bit, width, height) of what the first picture consists of."""
    view = memoryview(data)
    place, alpha = 12, view[:0]
    while place + 8 <= len(data):
        kind, size = struct.unpack_from('<4sI', data, place)
        body = place + 8
        if kind == b'ANMF':  # a frame, which consists of chunks
            place = body + 16
            continue
        if kind == b'ALPH' and not alpha:
            alpha = view[body : body + size]
        elif kind == b'VP8L':
            sides = int.from_bytes(data[body + 1 : body + 5], 'little')
            yield view[body : body + size], 40, (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
            return
        elif kind == b'VP8 ':
            if alpha and alpha[0] & 3 == 1:  # compressed without loss
                width, height = struct.unpack('<HH', data[body + 6 : body + 10].ljust(4, b'\0'))
                yield alpha, 8, width & 0x3FFF, height & 0x3FFF
            return
        place = body + size + size % 2


class _DamagedError(Exception):
    """A decoder refuses this stream."""


class _Code(NamedTuple):
    """A prefix code.

    Attributes:
      table: uint16, for each value of the next bits, 16 x symbol + its number of bits.
      mask: for these bits; 0 where there is only one symbol, which takes none.
      entries: the same as the table, for single ones.
    """

    table: np.ndarray
    mask: int
    entries: memoryview


class _Stream:
    """Reads a stream up to its groups of codes.

    Args:
      data: the stream.
      place: its first bit.
    """

    def __init__(self, data: memoryview, place: int):
        self._data = data
        self._place = place
        self._copies = 0

    def count_groups(self, width: int, height: int) -> int:
        """The number of groups of a picture; where it is up to `MAX_GROUPS`, perhaps a bound.

        Args:
          width: of the picture, pixels.
          height: of the picture, pixels.
        """
        if len(self._data) <= _FREE or _blocks(width, height, 2) <= MAX_GROUPS:
            return MAX_GROUPS  # no block is smaller
        width = self._skip_transforms(width, height)
        self._take_cache()
        if not self._take(1):
            return 1
        blocks = _blocks(width, height, self._take(3) + 2)
        if blocks <= MAX_GROUPS:
            return MAX_GROUPS
        groups = {0}
        self._skip_picture(blocks, groups)
        return len(groups)

    def _take(self, bits: int) -> int:
        """The next bits, at most 32, as a number; behind the end they are 0."""
        place = self._place
        self._place = place + bits
        word = int.from_bytes(self._data[place >> 3 : (place >> 3) + 5], 'little')
        return word >> (place & 7) & ((1 << bits) - 1)

    def _take_cache(self) -> int:
        """The number of entries of the colour cache."""
        bits = self._take(4) if self._take(1) else 0
        if bits > 11:
            raise _DamagedError
        return 1 << bits if bits else 0

    def _skip_transforms(self, width: int, height: int) -> int:
        """Goes to behind them; returns the width of the picture that is stored."""
        seen = set()
        while self._take(1):
            kind = self._take(2)
            if kind in seen:
                raise _DamagedError
            seen.add(kind)
            if kind in (_PREDICTOR, _COLOUR):
                self._skip_picture(_blocks(width, height, self._take(3) + 2))
            elif kind == _PALETTE:
                colours = self._take(8) + 1
                self._skip_picture(colours)
                width = _blocks(width, 1, (colours <= 16) + (colours <= 4) + (colours <= 2))
        return width

    def _skip_picture(self, pixels: int, groups: set[int] | None = None) -> None:
        """Goes to behind a picture of the header.

        Args:
          pixels: its width times height.
          groups: gets the numbers that are stored in red and green.
        """
        green = self._take_code(_CACHED + self._take_cache())
        others = [self._take_code(256) for _ in range(3)]
        distance = self._take_code(40)
        sole = green.table[0] >> 4 if not green.mask else _LENGTHS
        if sole >= _CACHED or (sole < _LENGTHS and not any(code.mask for code in others)):
            return  # all pixels are equal and take no bits
        size, most = _BLOCKS
        while pixels > 0:
            begin = self._place >> 3
            if begin >= len(self._data):
                raise _DamagedError
            windows = _windows(self._data[begin : begin + size + _PADDING], size + _PADDING)
            entries, steps = _steps(windows, 8 * size, green, others)
            at, end, literals = self._place & 7, 8 * size, []
            while pixels > 0 and at < end:
                step = steps[at]
                if step == _COPY:
                    self._place = 8 * begin + at
                    pixels -= self._skip_copy(green, distance)
                    at = self._place - 8 * begin
                    continue
                if groups is not None:
                    literals.append(at)
                at += step
                pixels -= 1
            self._place = 8 * begin + at
            size = min(2 * size, most)
            if literals and groups is not None:
                groups |= _groups(windows, np.array(literals), entries, others[0])

    def _skip_copy(self, green: _Code, distance: _Code) -> int:
        """Goes to behind a copy of pixels; returns how many."""
        self._copies += 1
        if self._copies > _MAX_COPIES:
            raise ValueError('it copies pixels more often than any encoder writes')
        begin = self._place >> 3
        word = int.from_bytes(self._data[begin : begin + _PADDING], 'little')
        at = self._place & 7
        entry = green.entries[word >> at & green.mask]
        at += entry & 15
        length, bits = _copied((entry >> 4) - _LENGTHS)
        length += word >> at & ((1 << bits) - 1)
        at += bits
        entry = distance.entries[word >> at & distance.mask]
        self._place = 8 * begin + at + (entry & 15) + _copied(entry >> 4)[1]
        return length

    def _take_code(self, size: int) -> _Code:
        """The prefix code of an alphabet of this size."""
        if self._take(1):
            two = self._take(1)
            first = self._take(8 if self._take(1) else 1)
            return _simple_code(first, self._take(8) if two else first, size)
        of_lengths = [0] * len(_CODE_LENGTH_ORDER)
        number = self._take(4) + 4
        for place in _CODE_LENGTH_ORDER[:number]:
            of_lengths[place] = self._take(3)
        return _code(self._take_lengths(size, _code(of_lengths)))

    def _take_lengths(self, size: int, code: _Code) -> list[int]:
        """How long the codes of so many symbols are, which itself is in a code."""
        lengths = [0] * size
        left = 2 + self._take(2 + 2 * self._take(3)) if self._take(1) else size
        if left > size:
            raise _DamagedError
        table, mask = code.entries, code.mask
        begin = self._place >> 3
        word = int.from_bytes(self._data[begin : begin + 2 * size + 2], 'little')
        at, symbol, before = self._place & 7, 0, 8
        while symbol < size and left:
            left -= 1
            entry = table[word >> at & mask]
            at += entry & 15
            length = entry >> 4
            if length < 16:
                lengths[symbol] = length
                before = length or before
                symbol += 1
                continue
            bits, number = _REPEATS[length]
            number += word >> at & ((1 << bits) - 1)
            at += bits
            if symbol + number > size:
                raise _DamagedError
            if length == 16:
                lengths[symbol : symbol + number] = [before] * number
            symbol += number
        self._place = 8 * begin + at
        return lengths


def _copied(symbol: int) -> tuple[int, int]:
    """(the least length or distance with this symbol, extra bits, which are added)."""
    if symbol < 4:
        return symbol + 1, 0
    bits = (symbol - 2) >> 1
    return ((2 + symbol % 2) << bits) + 1, bits


def _blocks(width: int, height: int, bits: int) -> int:
    """How many squares of 2**bits pixels a side cover a picture."""
    return (-(-width >> bits)) * (-(-height >> bits))


@functools.lru_cache(1024)
def _simple_code(first: int, second: int, size: int) -> _Code:
    """Of one symbol or two, of an alphabet of this size."""
    return _code([int(symbol in (first, second)) for symbol in range(size)])


def _code(lengths: list[int]) -> _Code:
    """The canonical prefix code of symbols with these lengths, of which 0 is no code."""
    array = np.array(lengths, np.uint16)
    symbols = np.flatnonzero(array)
    if len(symbols) == 1:
        return _new_code((symbols * 16).astype(np.uint16))
    used = array[symbols]
    longest = int(used.max(initial=0))
    order = np.argsort(used, kind='stable')
    entries = (symbols[order] * 16 + used[order]).astype(np.uint16)
    table = np.repeat(entries, 1 << (longest - used[order]))  # by codes whose first bit is highest
    if len(table) != 1 << longest or not longest:
        raise _DamagedError
    return _new_code(table[_reversed(longest)])


def _new_code(table: np.ndarray) -> _Code:
    return _Code(table, len(table) - 1, table.data)


@functools.cache
def _reversed(bits: int) -> np.ndarray:
    """The numbers of so many bits, each read backwards."""
    numbers = np.zeros(1, np.intp)
    for _ in range(bits):
        numbers = np.concatenate([2 * numbers, 2 * numbers + 1])
    return numbers


def _windows(data: memoryview, size: int) -> np.ndarray:
    """uint16 [8 x size]: the 16 bits from each bit of the data on, which end in zeros."""
    octets = np.frombuffer(bytes(data).ljust(size + 2, b'\0'), np.uint8).astype(np.uint32)
    words = octets[:-2] | octets[1:-1] << 8 | octets[2:] << 16
    return (words[:, None] >> np.arange(8, dtype=np.uint32)).astype(np.uint16).ravel()


def _steps(
    windows: np.ndarray, size: int, green: _Code, others: list[_Code]
) -> tuple[np.ndarray, bytes]:
    """(entries of the green code, bits of the pixel or `_COPY`), at each of `size` bits."""
    entries = green.table.take(windows[:size] & green.mask)
    of_green = entries & 15
    place = np.arange(size) + of_green
    for code in others:
        if code.mask:
            place += code.table.take(windows.take(place) & code.mask) & 15
    steps = place - np.arange(size)
    if entries.max() >= 16 * _LENGTHS:
        of_others = np.where(entries < 16 * _CACHED, _COPY, of_green)
        steps = np.where(entries < 16 * _LENGTHS, steps, of_others)
    return entries, steps.astype(np.uint8).tobytes()


def _groups(windows: np.ndarray, places: np.ndarray, entries: np.ndarray, red: _Code) -> set[int]:
    """The numbers in red and green of the pixels at these bits."""
    entry = entries[places]
    places, entry = places[entry < 16 * _LENGTHS], entry[entry < 16 * _LENGTHS]
    reds = red.table[windows[places + (entry & 15)] & red.mask] >> 4
    return set(np.unique(256 * reds + (entry >> 4)).tolist())
