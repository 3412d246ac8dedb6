"""Files of weights made to harm: they end in one message, and take neither memory nor time."""

import io
import json
import os
import pathlib
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest

from vit_jax.checkpoint import archives, catalog, formats, inspection, library_configs, npz, tensors
from vit_jax.errors import UserError

SHARED = pathlib.Path(__file__).parents[3] / 'shared' / 'cases' / 'hostile'

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'conformance'


def refused(path, words):
    with pytest.raises(UserError, match=words):
        formats.load(path)


def npy(shape, descr='<f4', values=b''):
    file = io.BytesIO()
    header = {'descr': descr, 'fortran_order': False, 'shape': shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + values


def write_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize('shape', [(10**12,), (-2, -3), (0, 10**30), (1,) * 40, (2**63, 2)])
def test_npz_headers_that_claim_anything(tmp_path, shape):
    path = write_zip(tmp_path / 'a.npz', {'head/kernel.npy': npy(shape, values=bytes(24))})
    refused(path, 'cannot read the array|declares')


def test_npz_header_as_long_as_it_says(tmp_path):
    data = b'\x93NUMPY\2\0' + struct.pack('<I', 2**32 - 1) + bytes(1 << 24)
    path = write_zip(tmp_path / 'a.npz', {'a.npy': data}, zipfile.ZIP_DEFLATED)
    refused(path, "cannot read the array 'a'")


def test_zip_bombs(tmp_path, monkeypatch):
    """Sizes are scaled down: what counts is the bound."""
    monkeypatch.setattr(npz, '_SMALL', 1 << 20)
    zeros = npy((1 << 20,), values=bytes(4 << 20))
    path = write_zip(tmp_path / 'a.npz', {'a.npy': zeros}, zipfile.ZIP_DEFLATED)
    refused(path, 'more than 32 times its size')
    # Members that share their bytes: the second name of the central directory leads to the first.
    values = np.arange(1000, dtype=np.float32)
    path = write_zip(tmp_path / 'b.npz', {n: npy((1000,), values=values.tobytes()) for n in 'ab'})
    data = bytearray(path.read_bytes())
    entries = [i for i in range(len(data)) if data[i : i + 4] == b'PK\1\2']
    data[entries[1] + 42 : entries[1] + 46] = data[entries[0] + 42 : entries[0] + 46]
    del data[4128 + 30 + 1 : entries[0]]
    path.write_bytes(data)
    refused(path, 'not a readable|larger than the file')


def test_keys_nested_without_end(tmp_path):
    path = write_zip(tmp_path / 'a.npz', {'a/' * 5000 + 'b.npy': npy((1,), values=bytes(4))})
    refused(path, 'a.npz')


@pytest.mark.parametrize('kind', ['npz', 'pth', 'safetensors'])
def test_pipes_and_devices_are_not_waited_for(tmp_path, kind):
    os.mkfifo(tmp_path / f'pipe.{kind}')
    refused(tmp_path / f'pipe.{kind}', 'not a regular file')
    (tmp_path / f'device.{kind}').symlink_to('/dev/zero')
    refused(tmp_path / f'device.{kind}', 'not a regular file')


def long_bytes():
    return b'\x80\x02cbuiltins\nbytearray\n\x8a\x05' + (10**11).to_bytes(5, 'little') + b'\x85R.'


def doubled_bytes():
    """b'x' written in hexadecimal 40 times over would take a terabyte."""
    hexadecimal = b'c_codecs\nencode\n'
    return b'\x80\x02' + hexadecimal * 40 + b'X\1\0\0\0x' + b'X\3\0\0\0hex\x86R' * 40 + b'.'


@pytest.mark.parametrize('make', [long_bytes, doubled_bytes])
@pytest.mark.parametrize('zipped', [True, False])
def test_pickles_that_allocate(tmp_path, make, zipped):
    pytest.importorskip('torch')
    path = tmp_path / 'a.pth'
    if zipped:
        write_zip(path, {'a/data.pkl': make(), 'a/version': b'3\n'})
    else:
        path.write_bytes(make())
    refused(path, 'could take all memory')


def test_pickles_run_no_code(tmp_path):
    pytest.importorskip('torch')
    trace = tmp_path / 'trace'

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    (tmp_path / 'a.pth').write_bytes(pickle.dumps({'a': Evil()}, protocol=2))
    write_zip(tmp_path / 'b.pth', {'a/data.pkl': pickle.dumps(Evil(), protocol=2)})
    for name in ('a.pth', 'b.pth'):
        refused(tmp_path / name, 'cannot be read safely')
    assert not trace.exists()


def test_tensors_larger_than_their_file(tmp_path):
    """A stored row repeated by a stride of zero: a terabyte in a kilobyte."""
    torch = pytest.importorskip('torch')
    torch.save({'patch_embed.proj.weight': torch.ones(1).expand(10**6, 10**6)}, tmp_path / 'a.pth')
    refused(tmp_path / 'a.pth', 'would take 8 times the size of the file')
    tied = torch.randn(100, 100)
    torch.save({'a': tied, 'b': tied}, tmp_path / 'tied.pth')
    assert set(tensors.open_tensors(tmp_path / 'tied.pth')[0]) == {'a', 'b'}
    sparse = torch.sparse_coo_tensor([[0], [0]], [1.0], (9, 9), check_invariants=True)
    torch.save({'a': sparse}, tmp_path / 'sparse.pth')
    refused(tmp_path / 'sparse.pth', 'expected plain tensors')


def rewritten(path, change=lambda info, data: data, method=zipfile.ZIP_STORED):
    """The members of a zip file written anew."""
    with zipfile.ZipFile(path) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', method) as archive:
        for info, data in members:
            archive.writestr(info.filename, change(info, data))
    return out.getvalue()


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors', 'a.npz', 'a.bin', 'a'])
def test_compressed_members_of_a_pytorch_file(tmp_path, name):
    """PyTorch unpacks them before anyone can ask how large they are."""
    torch = pytest.importorskip('torch')
    torch.save({'patch_embed.proj.weight': torch.zeros(8, 3, 40, 400)}, tmp_path / 'plain.pth')
    packed = rewritten(tmp_path / 'plain.pth', method=zipfile.ZIP_DEFLATED)
    (tmp_path / name).write_bytes(packed)
    assert torch.load(tmp_path / 'plain.pth')  # which is a file as PyTorch writes it
    refused(tmp_path / name, 'is compressed')


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors', 'a.npz', 'a'])
@pytest.mark.parametrize('behind', [b'x', bytes(30), bytes(70_000), b'PK\5\6' + bytes(18)])
def test_bytes_after_the_end_of_an_archive(tmp_path, name, behind):
    """zipfile then finds no archive, or another one than PyTorch."""
    torch = pytest.importorskip('torch')
    torch.save({'a': torch.zeros(4)}, tmp_path / 'plain.pth')
    packed = rewritten(tmp_path / 'plain.pth', method=zipfile.ZIP_DEFLATED)
    (tmp_path / name).write_bytes(packed + behind)
    refused(tmp_path / name, 'goes on after the end|contents|cannot be read|no list')


def test_an_archive_of_two_ends(tmp_path):
    """The longer record of the end leads readers to one list, the shorter one to another."""
    torch = pytest.importorskip('torch')
    torch.save({'a': torch.zeros(4)}, tmp_path / 'a.pth')
    data = (tmp_path / 'a.pth').read_bytes()
    assert data[-98:-94] == b'PK\6\6' and data[-42:-38] == b'PK\6\7'
    elsewhere = data[:-34] + struct.pack('<Q', 0) + data[-26:]
    (tmp_path / 'b.pth').write_bytes(elsewhere)
    refused(tmp_path / 'b.pth', 'two ends')
    before = write_zip(tmp_path / 'c.npz', {'a.npy': npy((1,), values=bytes(4))})
    before.write_bytes(b'PK\3\4' + before.read_bytes())
    refused(before, 'not where its list says')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, '_MAX_DIRECTORY', 100)
        refused(tmp_path / 'a.pth', 'the list of its contents has')


@pytest.mark.parametrize('zipped', [True, False])
def test_pickles_of_many_objects(tmp_path, zipped):
    """A byte each in the file, and a hundred in memory."""
    torch = pytest.importorskip('torch')
    path, lists = tmp_path / 'a.pth', b'\x80\x02(' + b']' * 1_100_000
    if zipped:
        write_zip(path, {'a/DATA.PKL': lists + b'l.', 'a/version': b'3\n'})
    else:
        torch.save({'a': 1}, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        start = content.index(b'\x80\x02}q\x00X\x01\0\0\0a')
        path.write_bytes(content[:start] + lists + b'l.' + content[start:])
    refused(path, 'more than 1,000,000 steps')


def test_tensors_of_other_kinds_are_named(tmp_path):
    torch = pytest.importorskip('torch')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that nested tensors are young
        nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)])
        quantised = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    for words, tensor in (('a nested tensor', nested), ('a quantised tensor', quantised)):
        torch.save({'head.weight': tensor}, tmp_path / 'a.pth')
        refused(tmp_path / 'a.pth', f"'head.weight' is stored as {words}")
    if SHARED.is_dir():
        refused(SHARED / 'nested.pth', 'a nested tensor')


@pytest.mark.parametrize(
    'name', ['../x.safetensors', '/etc/passwd', '..', 'a/../b', 'a\0b', '', 'x' * 999]
)
def test_shards_are_files_beside_their_index(tmp_path, name):
    (tmp_path / 'config.json').write_text('{}')
    index = {'weight_map': {'a': name}}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    refused(tmp_path, 'not in the folder')
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map": {}}')
    refused(tmp_path, 'no weight_map of names to files')


@pytest.mark.parametrize(
    'packed',
    [
        b'\x81\xa1a\xdd' + struct.pack('>I', 200_000) + b'\x80' * 200_000,
        b'\x81\xa1a\xdf' + struct.pack('>I', 200_000) + b'\x01\x80' * 200_000,
        b'\x81\xa1a\xc9' + struct.pack('>IB', 200_005, 1) + b'\xdd' + struct.pack('>I', 200_000)
        + b'\xc0' * 200_000,
        b'\x81\xa1a\xdd' + struct.pack('>I', 50_000) + b'\x92\x80\x80' * 50_000,
    ],
)  # fmt: skip
def test_flax_files_of_many_objects(tmp_path, packed):
    (tmp_path / 'a.msgpack').write_bytes(packed)
    refused(tmp_path / 'a.msgpack', 'more than 100,000 objects|exceeds max_')


def test_a_header_of_a_safetensors_file_as_large_as_it_says(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' + b' ' * (9 << 20) + b'}'
    data = struct.pack('<Q', len(header)) + header + bytes(4)
    (tmp_path / 'a.safetensors').write_bytes(data)
    refused(tmp_path / 'a.safetensors', 'its header has 9,437,')


@pytest.mark.parametrize(
    'stated',
    [
        {'layer_norm_eps': [1]}, {'layer_norm_eps': 0.0}, {'layer_norm_eps': 1e308}, {'act': 3},
        {'act': 'posix.system'}, {'class_token': 'yes'}, {'classifier': {}}, {'hidden_size': 10**9},
        {'__class__': 1}, {'x' * 9999: 1},
    ],
)  # fmt: skip
def test_settings_from_a_file(tmp_path, stated):
    params = npz.open_file(FIXTURES / 'vit_token.checkpoint.npz').read()
    npz.save(tmp_path / 'a.npz', params, stated)
    with pytest.raises(UserError, match='states'):
        inspection.inspect(tmp_path / 'a.npz')


@pytest.mark.parametrize('activation', [3, True, ['gelu'], 'x' * 9999])
def test_activations_from_a_configuration(tmp_path, activation):
    from safetensors.numpy import save_file

    names = ('embeddings.patch_embeddings.projection.weight', 'embeddings.cls_token')
    shapes = ((8, 3, 4, 4), (1, 1, 8))
    arrays = {name: np.ones(shape, np.float32) for name, shape in zip(names, shapes, strict=True)}
    save_file(arrays, tmp_path / 'model.safetensors')
    config = {'model_type': 'vit', 'hidden_act': activation, 'num_attention_heads': 2}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    refused(tmp_path, 'has hidden_act .{1,110}; known: gelu, ')


@pytest.mark.parametrize(
    ('mean', 'std'),
    [
        ([0.5, 0.5], [0] * 3),
        (['a', 'b', 'c'], [0] * 3),
        ([float('nan')] * 3, [0] * 3),
        ({'a': 1}, [0] * 3),
        ([], [0.5] * 3),
        ([], []),
    ],
)
def test_normalisation_from_a_configuration(tmp_path, mean, std):
    from safetensors.numpy import save_file

    tensor = {'conv_proj.weight': np.ones((8, 3, 4, 4), np.float32)}
    tensor['class_token'] = np.ones((1, 1, 8), np.float32)
    save_file(tensor, tmp_path / 'model.safetensors')
    config = {'library': 'torchvision', 'arguments': {'num_heads': 2}, 'mean': mean, 'std': std}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    refused(tmp_path, 'should be three numbers|is damaged')


@pytest.mark.parametrize(
    'row',
    ['../../secret-i21k', '/etc/passwd', '"' + 'x' * 200_000 + '"', 'a\0b', '..'],
)
def test_an_index_does_not_choose_the_folder(tmp_path, row):
    (tmp_path / 'secret-i21k.npz').write_bytes(b'secret')
    folder = tmp_path / 'a' / 'b'
    folder.mkdir(parents=True)
    (folder / 'index.csv').write_text(f'ds,filename,final_val\ni21k,{row},0.5\n')
    with pytest.raises(UserError, match='is not an index of AugReg checkpoints'):
        catalog.resolve_augreg('B_16', pretrained_dir=str(folder))
    with pytest.raises(UserError, match='have no paths'):
        catalog.resolve_augreg('../../secret-i21k', pretrained_dir=str(folder))


@pytest.mark.parametrize(
    'name', ['~no_such_user_here/x', 'x' * 5000, 'a\0b', 'http://[::1', '\ud800', 'gs://x/\udcff']
)
def test_names_that_can_be_no_path(tmp_path, name, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path))
    with pytest.raises(UserError):
        catalog.resolve(name)
    with pytest.raises(UserError):
        formats.load(name)


def test_a_processor_that_divides_by_nothing(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "vit", "image_size": 8}')
    (tmp_path / 'preprocessor_config.json').write_text(
        '{"image_processor_type": "ViTImageProcessor", "rescale_factor": 0}'
    )
    with pytest.raises(UserError, match='is damaged .ZeroDivisionError'):
        library_configs.read(tmp_path)
