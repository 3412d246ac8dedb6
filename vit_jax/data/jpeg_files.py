"""The segments of a JPEG file (ITU T.81, section B.1.1), looked at before it is decoded."""

import re

# Scans of a JPEG file, each of which passes over all pixels. Encoders write up to 20; where the
# picture is small, more take no time.
MAX_SCANS = 24
_SCAN_PIXELS = MAX_SCANS * 25_000_000
_SCAN_COST = 4096  # what beginning one takes, in pixels
_SCAN_BYTES = 10  # at least
_MAX_SEGMENTS = 50_000  # for each of which readers take time, and some keep it
_MAX_HEADER = 32 << 20  # bytes, of which Pillow reads one after the other
_LARGE = 4 << 20  # bytes: in less there are not enough segments to take much memory
_NEXT_MARKER = re.compile(b'\xff[^\x00\x01\xff\xd0-\xd7]')  # of a segment: one with a length
_NO_SEGMENTS = (0, 1, *range(0xD0, 0xD8))  # markers without a length, and what is no marker


class TooLongError(ValueError):
    """A JPEG file of more segments than any camera or editor writes."""


def check(data: bytes) -> None:
    """Checks a JPEG file before any of it is decoded.

    Raises:
      TooLongError: for so many segments the decoder would take much memory.
    """
    if len(data) > _LARGE:
        _start(data)


def has_exif(data: bytes) -> bool:
    """Whether a JPEG file may have EXIF data before its picture, in a header of a usual size."""
    try:
        return _start(data)[0]
    except TooLongError:
        return False


def has_too_many_scans(data: bytes, pixels: int) -> bool:
    """Whether the decoder of a JPEG file would pass over its pixels more often than any needs.

    Args:
      data: the file.
      pixels: height times width.

    Raises:
      TooLongError: nobody could tell.
    """
    limit = max(MAX_SCANS, _SCAN_PIXELS // (pixels + _SCAN_COST))
    if len(data) <= limit * _SCAN_BYTES or _start(data)[1]:
        return False
    # What looks like the start of a scan may be in data that follow the picture, a film perhaps.
    return len(re.findall(b'\xff\xda', data)) > limit and _count_scans(data, limit) > limit


def _start(data: bytes) -> tuple[bool, bool]:
    """(whether there may be EXIF data, whether one scan is all that a decoder reads).

    Walks over the segments: a search through the first 64 kB took six times as long, with Python's
    lock held.

    Raises:
      TooLongError: the picture does not begin after `_MAX_SEGMENTS`.
    """
    place, components, has_exif = 2, 0, False
    try:
        for _ in range(_MAX_SEGMENTS):
            if data[place] != 0xFF:  # stray bytes, which decoders skip
                place = data.index(b'\xff', place)
            marker = data[place + 1]
            if marker in _NO_SEGMENTS:
                place += 2
                continue
            if marker == 0xFF:  # padding
                place += 1
                continue
            if marker == 0xDA:  # the picture begins
                return has_exif and place < _MAX_HEADER, data[place + 4] == components
            if marker in (0xC0, 0xC1):  # sequential, unlike the others
                components = data[place + 9]
            elif marker == 0xE1 and data[place + 4 : place + 9] == b'Exif\x00':
                has_exif = True
            place += 2 + (data[place + 2] << 8) + data[place + 3]
    except (IndexError, ValueError):  # no picture
        return has_exif, False
    raise TooLongError(f'it has more than {_MAX_SEGMENTS:,} segments')


def without_stray_bytes(data: bytes) -> bytes:
    """A JPEG file without the bytes between the segments of its header, which decoders skip.

    Returns:
      The same file where there are none, or no picture.
    """
    parts, place = [data[:2]], 2
    for _ in range(_MAX_SEGMENTS):
        found = _NEXT_MARKER.search(data, place)
        if found is None:
            return data
        if found[0] == b'\xff\xda':  # the picture begins
            return b''.join([*parts, data[found.start() :]])
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], 'big')
        parts.append(data[found.start() : place])
    return data


def _count_scans(data: bytes, limit: int) -> int:
    """How many scans come before the end of the picture, or more than `limit`."""
    place, scans = 2, 0
    for _ in range(_MAX_SEGMENTS):
        found = _NEXT_MARKER.search(data, place)
        if found is None or found[0] == b'\xff\xd9' or scans > limit:
            return scans
        scans += found[0] == b'\xff\xda'
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], 'big')
    return limit + 1
