"""WebP files made by hand, with what no encoder writes (RFC 9649)."""

import io
import struct
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
_SOLE = '1000'  # a code of the one symbol 0
# Green: 256 literals, and the lengths 1 to 4 and their like for copies.
_GREEN = [9] * 256 + [5] * 16 + [0] * 8


def lossless(
    width: int,
    height: int,
    groups: int,
    *,
    block: int = 2,
    transforms: Sequence[int] = (),
    copies: bool = False,
    long: bool = False,
    seed: int = 0,
) -> bytes:
    """A stream (without its header) whose blocks use so many groups of prefix codes, all of them.

    Args:
      width: of the picture, pixels.
      height: of the picture, pixels.
      groups: at most one for each block, and 65,536.
      block: its side is 2**block pixels.
      transforms: that come before; of 0 predictor, 1 colour, 2 green, 3 palette.
      copies: whether their pictures and that of the blocks copy pixels.
      long: whether each group has a colour cache and codes of 11 bits, not of one symbol.
      seed: of what the pictures show.

    Returns:
      What decodes to one colour, where there are no transforms and short codes.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for kind in transforms:
        parts += ['1', _number(kind, 2)]
        if kind == 3:
            parts += [_number(15, 8), _picture(rng.integers(0, 65536, 16), copies)]
            width = -(-width // 2)
        elif kind != 2:
            blocks = -(-width // 8) * -(-height // 8)
            parts += [_number(1, 3), _picture(rng.integers(0, 65536, blocks), copies)]
    cache = 11 if long else 0
    parts += ['0', '1' + _number(cache, 4) if cache else '0', '1', _number(block - 2, 3)]
    blocks = -(-width >> block) * -(-height >> block)
    parts.append(_picture(np.minimum(np.arange(blocks), groups - 1), copies))
    green = _code([11] * 2048 + [0] * 280) if long else _SOLE
    parts += [green + _SOLE * 4] * groups
    return _packed(parts)


def file_of(
    stream: bytes, width: int, height: int, *, alpha: bool = False, animated: bool = False
) -> bytes:
    """A file with this stream as colours, or as the transparency of a black lossy picture."""
    if alpha:
        lossy = io.BytesIO()
        Image.new('RGB', (width, height)).save(lossy, 'WEBP')
        chunks = _chunk(b'ALPH', b'\1' + stream) + lossy.getvalue()[12:]
    else:
        header = struct.pack('<BI', 0x2F, width - 1 | height - 1 << 14)
        chunks = _chunk(b'VP8L', header + stream)
    sides = (width - 1).to_bytes(3, 'little') + (height - 1).to_bytes(3, 'little')
    if animated:
        frame = _chunk(b'ANMF', bytes(6) + sides + bytes(4) + chunks)
        chunks = _chunk(b'ANIM', bytes(6)) + frame * 2
    if alpha or animated:
        chunks = _chunk(b'VP8X', bytes([0x10 * alpha | 2 * animated, 0, 0, 0]) + sides) + chunks
    return b'RIFF' + struct.pack('<I', len(chunks) + 4) + b'WEBP' + chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack('<I', len(data)) + data + bytes(len(data) % 2)


def _number(value: int, bits: int) -> str:
    return format(value, f'0{bits}b')[::-1]


def _packed(parts: Iterable[str]) -> bytes:
    bits = np.frombuffer(''.join(parts).encode(), np.uint8) - ord('0')
    return np.packbits(bits, bitorder='little').tobytes()


def _picture(numbers: np.ndarray, copies: bool) -> str:
    """A small picture with 16-bit numbers in red and green; a number again may be a copy."""
    codes = [_code(_GREEN), _code([8] * 256), _SOLE, _SOLE, _code([3] * 8 + [0] * 32)]
    before, parts = None, []
    for number in numbers.tolist():
        if copies and number == before:  # of length 1, from a pixel to the left
            parts.append('00000' + '001')
            continue
        parts.append(_literal(number))
        before = number
    return '0' + ''.join(codes) + ''.join(parts)


def _literal(number: int) -> str:
    return format(256 + (number & 255), '09b') + format(number >> 8, '08b')


def _code(lengths: Sequence[int]) -> str:
    """A prefix code by the lengths of its symbols, which are themselves in a code."""
    used = sorted(set(lengths))
    of_lengths = {1: (1,), 2: (1, 1), 3: (1, 2, 2)}[len(used)]
    words = {1: ('',), 2: ('0', '1'), 3: ('0', '10', '11')}[len(used)]
    table = dict(zip(used, of_lengths, strict=True))
    bits = ['0', _number(15, 4), *(_number(table.get(value, 0), 3) for value in _ORDER), '0']
    return ''.join(bits) + ''.join(words[used.index(length)] for length in lengths)
