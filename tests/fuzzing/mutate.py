"""Ways to damage a file: bytes, and the fields of the formats that the readers know."""

import io
import json
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable

import numpy as np

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 32767, 65535, 65536, 10**6, 2**31 - 1, 2**31, 2**32),
    *(2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, -(2**31), 0.5, 1e308, -0.0),
)
TEXTS = (
    *('', '.', '..', '../x', '../../../../etc/passwd', '/etc/passwd', 'a\0b', 'a\nb', '\x1b[2J'),
    *('\ud800', 'x' * 10_000, '9' * 5000, 'a\u202eb\x9b\r', '=1+1', '%s%n', '{0.__class__}'),
    *('NaN', '1e999', '-1', 'file://x'),
    *('F32', 'BF16', 'I64', '|O', '<f8', '<c8', "O'", 'uint8', 'posix.system', 'os.system', 'ünï'),
)  # fmt: skip


def damage(rng: random.Random, data: bytes, others: list[bytes] = ()) -> bytes:
    """A few changes of bytes, whatever they mean."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        data = rng.choice(_BYTES)(rng, bytearray(data), others)
    return bytes(data)


def _place(rng: random.Random, size: int) -> int:
    """Anywhere, but more often at the beginning and at the end, where headers are."""
    near = rng.choice((16, 64, 512, size))
    place = rng.randrange(max(1, min(near, size)))
    return place if rng.random() < 0.6 else max(0, size - 1 - place)


def _flip(rng, data, _):
    for _ in range(rng.choice((1, 1, 4, 32))):
        if data:
            data[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    return data


def _cut(rng, data, _):
    return data[: rng.randrange(len(data) + 1)]


def _cut_front(rng, data, _):
    return data[_place(rng, len(data)) :]


def _insert(rng, data, _):
    place = _place(rng, len(data))
    return data[:place] + rng.randbytes(rng.choice((1, 4, 100))) + data[place:]


def _remove(rng, data, _):
    place = _place(rng, len(data))
    return data[:place] + data[place + rng.choice((1, 4, 100, 1000)) :]


def _repeat(rng, data, _):
    place, size = _place(rng, len(data)), rng.choice((4, 100, 1000))
    return data[: place + size] + data[place:]


def _swap(rng, data, _):
    a, b = sorted((_place(rng, len(data)), _place(rng, len(data))))
    size = rng.choice((4, 64, 500))
    size = min(size, b - a, len(data) - b)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    return data


def _number(rng, data, _):
    code = rng.choice('<B <H >H <I >I <Q >Q <d'.split())
    bits = 8 * struct.calcsize(code)
    number = rng.choice(NUMBERS)
    packed = struct.pack(code, float(number) if code == '<d' else int(number) % 2**bits)
    place = _place(rng, len(data))
    data[place : place + len(packed)] = packed
    return data


def _splice(rng, data, others):
    other = rng.choice(others) if others else data
    return data[: _place(rng, len(data))] + other[_place(rng, len(other)) :]


_BYTES = (_flip, _flip, _cut, _cut_front, _insert, _remove, _repeat, _swap, _number, _splice)


def damage_json(rng: random.Random, content: object) -> bytes:
    """A JSON text with some values, keys or the text itself changed."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = _json_change(rng, content)
    try:
        text = json.dumps(content).encode()
    except (ValueError, RecursionError):
        text = b'{}'
    if rng.random() < 0.15:
        text = rng.choice(_JSON_TEXTS)(rng, text)
    return text


_JSON_TEXTS = (
    lambda rng, text: b'[' * 100_000,
    lambda rng, text: b'{"a":' * 50_000 + text,
    lambda rng, text: b'\xef\xbb\xbf' + text,
    lambda rng, text: text.decode().encode('utf-16'),
    lambda rng, text: text.replace(b'1', b'9' * 5000, 1),
    lambda rng, text: text.replace(b':', b': NaN, "x":', 1),
    lambda rng, text: text + text,
    lambda rng, text: damage(rng, text),
)


def _json_change(rng: random.Random, content):
    nodes = []  # (container, key)

    def walk(node):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            nodes.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    if isinstance(content, dict | list):
        walk(content)
    if not nodes or rng.random() < 0.02:
        return _json_value(rng, content)
    node, key = rng.choice(nodes)
    action = rng.randrange(5)
    if action == 0 and isinstance(node, dict):
        node[rng.choice(TEXTS)] = node.pop(key)
    elif action == 1:
        del node[key]
    elif action == 2:
        other, other_key = rng.choice(nodes)
        node[key] = json.loads(json.dumps(other[other_key])) if other_key in _keys(other) else 0
    else:
        node[key] = _json_value(rng, node[key])
    return content


def _keys(node):
    return node if isinstance(node, dict) else range(len(node))


def _json_value(rng, old):
    return rng.choice(
        (
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: str(rng.choice(NUMBERS)),
            lambda: rng.choice((None, True, False, [], {}, [[]], {'a': {}}, float('inf'))),
            lambda: [old] * rng.choice((0, 2, 1000)),
            lambda: {'x': old},
            lambda: -old if isinstance(old, int | float) else [old],
        )
    )()


def damage_zip(rng: random.Random, data: bytes, member: Callable) -> bytes:
    """A zip file written anew with members renamed, dropped, repeated, compressed or changed.

    Args:
      member: (rng, name, data) -> data, what may be done to the content of one.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.randrange(len(members))
        name, content = members[place]
        action = rng.randrange(8)
        if action == 0:
            suffix = name[name.rfind('.') :] if '.' in name else ''
            members[place] = rng.choice(TEXTS)[:60_000] + suffix, content
        elif action == 1:
            del members[place]
            members = members or [('a.npy', b'')]
        elif action == 2:
            members.insert(rng.randrange(len(members)), (name, content))
        elif action == 3:
            members[place] = '/'.join('a' * rng.choice((2, 30, 2000))) + '.npy', content
        elif action == 4:
            other = rng.choice(members)[1]
            members[place] = name, other
        else:
            members[place] = name, member(rng, name, content)
    method = rng.choice((0, 0, 0, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of names that are there twice
        with zipfile.ZipFile(out, 'w', method) as archive:
            for name, content in members:
                name = name.encode('utf-8', 'replace').decode().replace('\0', '')
                archive.writestr(zipfile.ZipInfo(name), content, method)
    data = out.getvalue()
    if rng.random() < 0.3:
        data = rng.choice(_ENDS)(rng, data)
    return damage(rng, data) if rng.random() < 0.2 else data


def _another_end(rng: random.Random, data: bytes) -> bytes:
    """The end of an archive a second time, with other numbers, at other places."""
    end = bytearray(data[data.rfind(b'PK\5\6') :])
    for place, code in ((8, '<H'), (10, '<H'), (12, '<I'), (16, '<I'), (20, '<H')):
        if rng.random() < 0.3:
            end[place : place + struct.calcsize(code)] = struct.pack(
                code, int(rng.choice(NUMBERS)) % 2 ** (8 * struct.calcsize(code))
            )
    return data + bytes(end) if rng.random() < 0.5 else data[: data.rfind(b'PK\5\6')] + bytes(end)


def _longer_end(rng: random.Random, data: bytes) -> bytes:
    """The record for large archives, which is believed more than the other, and says otherwise."""
    place, numbers = data.rfind(b'PK\5\6'), [rng.choice((0, 1, 50, 2**40)) for _ in range(4)]
    record = struct.pack('<4sQHHIIQQQQ', b'PK\6\6', 44, 45, 45, 0, 0, *numbers)
    start = place if rng.random() < 0.7 else rng.randrange(len(data))
    locator = struct.pack('<4sIQI', b'PK\6\7', 0, start, 1)
    return data[:place] + record + locator + data[place:]


# What readers of zip files disagree about.
_ENDS = (
    _another_end,
    _longer_end,
    lambda rng, data: data + rng.randbytes(rng.choice((1, 22, 70_000))),
    lambda rng, data: data + bytes(rng.choice((1, 22, 70_000))),
    lambda rng, data: rng.randbytes(rng.choice((1, 30))) + data,
    lambda rng, data: data[:-2] + struct.pack('<H', rng.choice((1, 65535))) + bytes(300),
)


def npy_member(rng: random.Random, name: str, data: bytes) -> bytes:
    """A .npy with another header, pickled objects, or a bomb."""
    choice = rng.randrange(9)
    if choice == 0:
        return damage(rng, data)
    if choice == 1:  # 64 MiB of zeros, which compress to nothing
        return npy_header(
            "{'descr': '<f4', 'fortran_order': False, 'shape': (16777216,), }"
        ) + bytes(1 << 26)
    if choice == 2:  # a header as long as it says
        return b'\x93NUMPY\2\0' + struct.pack('<I', rng.choice((2**32 - 1, 2**20))) + b' ' * 2**20
    if choice == 3:
        file = io.BytesIO()
        np.save(file, np.array([Evil()], object), allow_pickle=True)
        return file.getvalue()
    version = data[6:7]
    size = struct.unpack('<H', data[8:10])[0]
    header, values = data[10 : 10 + size].decode('latin1'), data[10 + size :]
    if choice in (4, 5):
        shape = tuple(rng.choice(NUMBERS[:27]) for _ in range(rng.choice((0, 1, 2, 4, 40))))
        header = header.split("'shape':")[0] + f"'shape': {shape}, }}"
    elif choice == 6:
        descr = rng.choice(
            ('|O', '<f8', '<f2', '|V2', '<i4', '|S5', '<U3', '<c8', '<M8[s]', '>f4', '<f16', '|b1')
        )
        header = header.replace('<f4', descr)
    elif choice == 7:
        header = header.replace("'<f4'", rng.choice(("[('a','<f4')]", "('<f4',(2,))", '(' * 500)))
    else:
        header = rng.choice(
            ('(' * 9000, '[' * 9000, '1' + '+1' * 4000, '{}', "{'descr': 1}", '-' * 99)
        )
    header = npy_header(header, rng.choice((version, b'\1', b'\2', b'\3', b'\xff')))
    return header + (values if rng.random() < 0.7 else values[: rng.randrange(1 + len(values))])


def npy_header(text: str, version: bytes = b'\1') -> bytes:
    short = version == b'\1' and len(text) < 65_535
    length = struct.pack('<H' if short else '<I', len(text) + 1)
    return b'\x93NUMPY' + version + b'\0' + length + text.encode('latin1', 'replace') + b'\n'


class Evil:
    """Opens a file that no reader may touch, when it is unpickled."""

    def __reduce__(self):
        return open, ('/etc/hostname',)


def pickle_member(rng: random.Random, name: str, data: bytes) -> bytes:
    """A pickle with other globals, numbers or opcodes; other members of a .pth are damaged."""
    if not name.endswith('.pkl'):
        return damage(rng, data)
    choice = rng.randrange(8)
    if choice == 0:
        return pickle.dumps({'a': Evil()}, protocol=rng.choice((0, 2, 4)))
    if choice == 1:  # bytearray(10**11)
        return (
            b'\x80\x02cbuiltins\nbytearray\n\x8a\x05' + (10**11).to_bytes(5, 'little') + b'\x85R.'
        )
    if choice == 2:
        return b'\x80\x02' + b']' * rng.choice((10, 100_000)) + b'.'
    if choice == 3:
        old, new = rng.choice(
            (
                (b'torch._utils\n_rebuild_tensor_v2', b'torch._utils\n_rebuild_sparse_tensor'),
                (
                    b'torch._utils\n_rebuild_tensor_v2',
                    b'torch._utils\n_rebuild_meta_tensor_no_storage',
                ),
                (b'collections\nOrderedDict', b'builtins\nset'),
                (b'torch\nFloatStorage', b'torch\nLongStorage'),
                (b'torch\nFloatStorage', b'os\nsystem'),
                (b'cpu', b'meta'),
                (b'cpu', b'cuda'),
            )
        )
        return data.replace(old, new)
    if choice == 4:  # any small integer becomes another: sizes, strides, offsets
        places = [i for i in range(len(data) - 1) if data[i : i + 1] == b'K']
        out = bytearray(data)
        for place in rng.sample(places, min(len(places), rng.choice((1, 3)))):
            out[place + 1] = rng.randrange(256)
        return bytes(out)
    if choice == 5:
        places = [i for i in range(len(data) - 1) if data[i : i + 1] == b'K']
        place = rng.choice(places or [0])
        number = b'J' + struct.pack('<i', rng.choice((2**31 - 1, -1, 10**8, -(2**31))))
        return data[:place] + number + data[place + 2 :]
    return damage(rng, data)


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Its header changed as JSON, the length of the header, or its bytes."""
    size = struct.unpack('<Q', data[:8])[0]
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:  # it is damaged already
        return damage(rng, data)
    if rng.random() < 0.6:
        header = damage_json(rng, header)
        length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, 2**64 - 1, 10**8))
        return struct.pack('<Q', length) + header + data[8 + size :]
    return damage(rng, data)
