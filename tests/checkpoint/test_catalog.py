import pathlib
import re
import threading

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.checkpoint import adapt, catalog, download, npz
from vit_jax.configs import augreg
from vit_jax.errors import UserError

MIB = 2**20


def _data(size=3 * MIB + 17):
    return bytes(i * 37 % 251 for i in range(251)) * (size // 251 + 1)


TI16 = 'augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz'


def test_released_name_is_downloaded_once(bucket, tmp_path, monkeypatch):
    monkeypatch.setitem(catalog.RELEASED, 'sam/ViT-B_16.npz', 3.0)
    monkeypatch.setitem(catalog.RELEASED, 'imagenet21k/ViT-B_16.npz', None)
    bucket.put('/vit_models/sam/ViT-B_16.npz', _data())
    bucket.put('/vit_models/imagenet21k/ViT-B_16.npz', b'another file of this name')
    path = catalog.resolve('sam/ViT-B_16.npz')
    assert path == tmp_path / 'cache' / 'vit_models' / 'sam' / 'ViT-B_16.npz'
    assert path.read_bytes() == _data()
    assert (
        catalog.resolve('sam/ViT-B_16')
        == catalog.resolve('gs://vit_models/sam/ViT-B_16.npz')
        == path
    )
    assert len(bucket.requests) == 1
    assert catalog.resolve('imagenet21k/ViT-B_16').read_bytes() == b'another file of this name'
    assert not [p for p in path.parent.iterdir() if '.part' in p.name]
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'elsewhere'))
    other = catalog.resolve('sam/ViT-B_16')
    assert other == tmp_path / 'elsewhere' / 'vit_models' / 'sam' / 'ViT-B_16.npz'


def test_progress_bar_on_a_terminal_only(bucket, monkeypatch, capsys):
    bucket.put('/b/x.npz', _data())
    bucket.put('/b/y.npz', _data())
    catalog.resolve('gs://b/x.npz')
    assert capsys.readouterr() == ('', '')
    monkeypatch.setenv('FORCE_COLOR', '1')  # rich takes this for a terminal
    catalog.resolve('gs://b/y.npz')
    assert 'y.npz' in capsys.readouterr().err


def test_plus_in_names_is_quoted(bucket, monkeypatch):
    name = 'imagenet21k+imagenet2012/R50+ViT-B_16.npz'
    monkeypatch.setitem(catalog.RELEASED, name, None)
    bucket.put('/vit_models/imagenet21k%2Bimagenet2012/R50%2BViT-B_16.npz', b'x')
    path = catalog.resolve(name)
    assert path.parts[-2:] == ('imagenet21k+imagenet2012', 'R50+ViT-B_16.npz')


def test_broken_off_download_goes_on(bucket, tmp_path):
    data = _data()
    bucket.put('/b/x.npz', data)
    for cut in (MIB + 5, 2 * MIB + 9):
        bucket.break_off_at = cut
        with pytest.raises(UserError, match=f'broke off after {cut:,} of {len(data):,}.*again'):
            catalog.resolve('gs://b/x.npz')
        assert not (tmp_path / 'cache' / 'b' / 'x.npz').exists()
    assert catalog.resolve('gs://b/x.npz').read_bytes() == data
    assert [r for _, r in bucket.requests] == [None, f'bytes={MIB + 5}-', f'bytes={2 * MIB + 9}-']


def test_changed_file_starts_again(bucket):
    bucket.put('/b/x.npz', _data())
    bucket.break_off_at = MIB
    with pytest.raises(UserError, match='broke off'):
        catalog.resolve('gs://b/x.npz')
    new = _data()[::-1]
    bucket.put('/b/x.npz', new, '"v2"')
    assert catalog.resolve('gs://b/x.npz').read_bytes() == new


def test_complete_or_overlong_part_starts_again(bucket, tmp_path):
    data = _data()
    bucket.put('/b/x.npz', data)
    folder = tmp_path / 'cache' / 'b'
    folder.mkdir(parents=True)
    (folder / 'x.npz.part').write_bytes(data + b'more')
    (folder / 'x.npz.part.etag').write_text('"v1"')
    assert catalog.resolve('gs://b/x.npz').read_bytes() == data


def test_wrong_size_is_refused_before_the_download(bucket, tmp_path):
    bucket.put(f'/vit_models/{TI16}', b'x' * MIB)
    with pytest.raises(UserError, match=r'1\.00 MiB there, the released file 37\.2'):
        catalog.resolve(TI16)
    assert not list(tmp_path.rglob('*.npz')) and not list(tmp_path.rglob('*.part'))


def test_published_sizes_may_be_rounded():
    for size, published in ((37.2, 37), (1.2178 * 1024, 1.22 * 1024), (393.63, 393.69)):
        download._check_size(int(size * MIB), published)
    with pytest.raises(OSError, match='330.29'):
        download._check_size(int(340 * MIB), 330.29)


def test_not_on_the_server(bucket, tmp_path):
    with pytest.raises(UserError, match='the server answers 404') as e:
        catalog.resolve('imagenet21k/ViT-B_16')
    assert f'{bucket.url}/vit_models/imagenet21k/ViT-B_16.npz' in str(e.value)


def test_offline_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_BASE_URL', 'http://127.0.0.1:9')  # discard: nothing listens there
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path))
    with pytest.raises(UserError) as e:
        catalog.resolve('imagenet21k/ViT-B_16')
    place = tmp_path / 'vit_models' / 'imagenet21k' / 'ViT-B_16.npz'
    for part in ('http://127.0.0.1:9/vit_models/imagenet21k/ViT-B_16.npz', str(place)):
        assert part in str(e.value)
    assert '--config.pretrained=FILE' in str(e.value)
    place.write_bytes(b'from elsewhere')
    assert catalog.resolve('imagenet21k/ViT-B_16') == place


def test_no_space(bucket, monkeypatch):
    bucket.put('/b/x.npz', _data())
    monkeypatch.setattr(
        download.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': MIB})
    )
    with pytest.raises(UserError, match='only 1,048,576 are free'):
        catalog.resolve('gs://b/x.npz')


def test_two_at_once_download_once(bucket):
    bucket.put('/b/x.npz', _data())
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(catalog.resolve('gs://b/x.npz')))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 and len(results) == 4
    assert results[0].read_bytes() == _data()
    assert len(bucket.requests) == 1


def test_addresses(bucket, tmp_path):
    bucket.put('/a/b.npz?token=1', b'data')
    path = catalog.resolve(f'{bucket.url}/a/b.npz?token=1')
    assert path.read_bytes() == b'data'
    assert path.parts[-2:] == ('a', 'b.npz')
    bucket.put('/a/../../../e.npz', b'data')  # must not leave the cache
    path = catalog.resolve(f'{bucket.url}/a/../../../e.npz')
    assert path == tmp_path / 'cache' / bucket.url.removeprefix('http://') / 'a' / 'e.npz'
    for bad in ('ftp://host/x.npz', 'gs://'):
        with pytest.raises(UserError, match='s3://bucket/path or https://host/path'):
            catalog.resolve(bad)


def test_the_buckets_own_address_is_the_same_cache_entry(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        download, 'fetch', lambda url, target, **options: seen.append((url, target))
    )
    monkeypatch.delenv('VIT_JAX_BASE_URL', raising=False)
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path))
    for name in (
        'https://storage.googleapis.com/vit_models/sam/a.npz',
        'gs://vit_models/sam/a.npz',
    ):
        catalog.resolve(name)
    assert seen[0] == seen[1]
    assert seen[0][0] == 'https://storage.googleapis.com/vit_models/sam/a.npz'


def test_local_files_and_folders(tmp_path):
    file = tmp_path / 'w.npz'
    file.write_bytes(b'x')
    assert catalog.resolve(str(file)) == file
    with pytest.raises(UserError, match='folder without params.npz'):
        catalog.resolve(str(tmp_path))
    (tmp_path / 'params.npz').write_bytes(b'x')
    assert catalog.resolve(str(tmp_path)) == tmp_path / 'params.npz'


def test_unknown_names_get_the_nearest():
    with pytest.raises(
        UserError, match=r'nor a released checkpoint; nearest .*imagenet21k/ViT-B_16\.npz'
    ):
        catalog.resolve('imagenet21k/ViT-B16')
    with pytest.raises(UserError, match='neither a file here nor a released checkpoint. Expected'):
        catalog.resolve('/nowhere/zzz')


def test_catalogue_is_spelled_as_in_the_release():
    for name, mib in catalog.RELEASED.items():
        folders = r'imagenet21k(\+imagenet2012)?|sam|gsam|augreg|mixer_models/\w+'
        assert re.fullmatch(rf'({folders})/[\w.+-]+\.npz', name)
        assert mib is None or 30 < mib < 3000


INDEX = """name,ds,final_val,filename,adapt_filename
B/16,i21k,0.44,B_16-i21k-300ep-a,B_16-i21k-300ep-a--cifar100
B/16,i21k,0.44,B_16-i21k-300ep-a,B_16-i21k-300ep-a--kitti
B/16,i21k,0.47,B_16-i21k-300ep-b,B_16-i21k-300ep-b--kitti
B/16,i1k,0.99,B_16-i1k-300ep-c,B_16-i1k-300ep-c--kitti
R+Ti/16,i21k,0.3,R_Ti_16-i21k-300ep-d,R_Ti_16-i21k-300ep-d--kitti
"""


def test_augreg_model_is_the_best_of_the_index(bucket):
    bucket.put('/vit_models/augreg/index.csv', INDEX.encode())
    bucket.put('/vit_models/augreg/B_16-i21k-300ep-b.npz', b'best')
    bucket.put('/vit_models/augreg/B_16-i21k-300ep-a--kitti.npz', b'adapted')
    assert catalog.resolve_augreg('B_16').read_bytes() == b'best'
    assert catalog.resolve_augreg('B_16-i21k-300ep-a--kitti').read_bytes() == b'adapted'
    path = catalog.resolve('augreg/B_16-i21k-300ep-a--kitti.npz')
    assert path.read_bytes() == b'adapted'
    assert catalog.resolve_augreg('B_16-i21k-300ep-a--kitti.npz') == path
    with pytest.raises(UserError, match="no AugReg model 'B16'; known: B_16, R_Ti_16"):
        catalog.resolve_augreg('B16')
    bucket.put(f'/vit_models/{TI16}', b'x')
    with pytest.raises(UserError, match='the released file 37.2'):
        catalog.resolve_augreg(TI16.removeprefix('augreg/'))


def test_augreg_in_a_local_folder(tmp_path):
    (tmp_path / 'index.csv').write_text(INDEX)
    file = tmp_path / 'R_Ti_16-i21k-300ep-d.npz'
    file.write_bytes(b'x')
    assert catalog.resolve_augreg('R_Ti_16', pretrained_dir=str(tmp_path)) == file
    with pytest.raises(UserError, match='B_16-i21k-300ep-b.npz. is neither a file here'):
        catalog.resolve_augreg('B_16', pretrained_dir=str(tmp_path))
    (tmp_path / 'index.csv').write_text('a,b\n1,2\n')
    with pytest.raises(UserError, match='is not an index of AugReg'):
        catalog.resolve_augreg('B_16', pretrained_dir=str(tmp_path))
    with pytest.raises(UserError, match='index.csv'):
        catalog.resolve_augreg('B_16', pretrained_dir=str(pathlib.Path(tmp_path / 'no')))


@pytest.mark.parametrize('argument', ['R_Ti_16', 'R_Ti_16-i21k-300ep-d'])
def test_augreg_config_gets_its_weights_from_the_bucket(bucket, tmp_path, argument):
    config = augreg.get_config(argument)
    model = models.from_config(config.model, num_classes=3)

    def init(size):
        image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)

    rng = np.random.default_rng(0)
    published = jax.tree.map(lambda x: rng.random(x.shape, np.float32), init(224)['params'])
    npz.save(tmp_path / 'x.npz', published)
    bucket.put('/vit_models/augreg/index.csv', INDEX.encode())
    data = (tmp_path / 'x.npz').read_bytes()
    bucket.put('/vit_models/augreg/R_Ti_16-i21k-300ep-d.npz', data)

    path = catalog.resolve_augreg(config.model_or_filename, pretrained_dir=config.pretrained_dir)
    params, report = adapt.adapt(
        npz.open_file(path).read(),
        init(config.pp.crop)['params'],
        classifier='token',
        source=str(path),
    )
    assert list(report.resized) == [adapt.POSITION_EMBEDDING]
    assert report.resized[adapt.POSITION_EMBEDDING] == ((1, 50, 192), (1, 145, 192))
    assert list(report.initialised) == ['head/bias', 'head/kernel']
    np.testing.assert_array_equal(params['conv_root']['kernel'], published['conv_root']['kernel'])
    index = [request for request in bucket.requests if request[0].endswith('index.csv')]
    assert len(index) == (1 if argument == 'R_Ti_16' else 0)
