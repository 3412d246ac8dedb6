"""Data and weights in cloud storage, by copies on this machine."""

import os
import types

import fake_bucket
import fsspec
import ml_collections
import modules
import numpy as np
import pytest
from PIL import Image

from vit_jax import config as config_lib
from vit_jax import files, models
from vit_jax.analysis import report_data
from vit_jax.checkpoint import catalog
from vit_jax.configs import digits
from vit_jax.data import remote, sources
from vit_jax.errors import UserError
from vit_jax.inference import model_folder


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A folder that is gs:// and s3://."""
    fake_bucket.register(tmp_path / 'storage')
    monkeypatch.setattr(fake_bucket.Bucket, 'fail', staticmethod(lambda operation, name: None))
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('VIT_JAX_BASE_URL', raising=False)
    return tmp_path / 'storage'


def photo(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4), (value, 0, 0)).save(path)


def names(source):
    return sorted('/'.join(path.split('/')[-2:]) for path in source.paths())


def read():
    log = fake_bucket.Bucket.touched('get')
    fake_bucket.Bucket.log.clear()
    return [name.removeprefix('bucket/photos/') for name in log]


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_a_folder_of_photos_is_copied_and_brought_up_to_date(storage, scheme, tmp_path):
    there, dataset = storage / 'bucket/photos', f'{scheme}://bucket/photos/'
    for name in ('cat/1.png', 'cat/2.png', 'dog/1.png', 'dog/2.png'):
        photo(there / name)
    assert sources.is_path(dataset)
    opened = sources.open_dataset(dataset).select('train')
    assert names(opened) == ['cat/1.png', 'cat/2.png', 'dog/1.png', 'dog/2.png']
    assert len(read()) == 4 and opened[0].image == (there / 'cat/1.png').read_bytes()
    local = sources.open_dataset(str(there)).select('train')
    assert opened.fingerprint() == local.fingerprint(), 'the same set, wherever it lies'

    sources.open_dataset(dataset)
    assert read() == [], 'nothing has changed'
    photo(there / 'cat/1.png', 200)
    os.utime(there / 'cat/1.png', ns=(1, 1))
    photo(there / 'dog/3.png')
    (there / 'dog/2.png').unlink()
    copy = remote.local_copy(dataset, print)
    (copy / 'cat/.2.png.999999.part').write_text('left by a killed process')
    (copy / 'cat/2.png').unlink()
    again = sources.open_dataset(dataset).select('train')
    assert sorted(read()) == ['cat/1.png', 'cat/2.png', 'dog/3.png']
    assert names(again) == ['cat/1.png', 'cat/2.png', 'dog/1.png', 'dog/3.png']
    assert (copy / 'cat/1.png').read_bytes() == (there / 'cat/1.png').read_bytes()
    assert not list(copy.rglob('.*.part'))


def test_a_copy_that_was_broken_off_goes_on(storage, monkeypatch, tmp_path):
    for number in range(40):
        photo(storage / f'bucket/photos/{"ab"[number % 2]}/{number}.png', number)

    monkeypatch.setattr(remote, '_AT_LEAST', 10)

    def fail(operation, name):
        if operation == 'get' and name.endswith('/39.png'):
            raise TimeoutError('slow')

    monkeypatch.setattr(fake_bucket.Bucket, 'fail', staticmethod(fail))
    with pytest.raises(UserError, match='cannot read gs://bucket/photos/b/39.png: TimeoutError'):
        sources.open_dataset('gs://bucket/photos')
    monkeypatch.setattr(fake_bucket.Bucket, 'fail', staticmethod(lambda operation, name: None))
    fake_bucket.Bucket.log.clear()
    assert len(sources.open_dataset('gs://bucket/photos').select('train')) == 40
    assert 'b/39.png' in (again := read()) and len(again) <= 10
    next((tmp_path / 'cache/copies').glob('*/copied.json')).write_text('[')
    assert len(sources.open_dataset('gs://bucket/photos').select('train')) == 40
    assert len(read()) == 40, 'a damaged record is none'


def test_names_that_leave_the_copy_are_refused(storage, monkeypatch, tmp_path):
    photo(storage / 'bucket/photos/a/1.png')
    find = fake_bucket.Bucket.find

    def with_dots(self, path, **options):
        return {f'{path}/a/../../x': info for info in find(self, path, **options).values()}

    monkeypatch.setattr(fake_bucket.Bucket, 'find', with_dots)
    with pytest.raises(UserError, match="the name 'a/../../x' is not one of a file"):
        sources.open_dataset('gs://bucket/photos')


@pytest.mark.parametrize('last', ['..', '.', '', 'a\0b', 'x' * 300, '~', '\udcff'])
def test_a_copy_stays_in_its_place(storage, tmp_path, last):
    place = remote._place(f'gs://bucket/{last}')
    assert place.parent.parent == tmp_path / 'cache/copies' and place.name not in ('.', '..')
    assert remote.existing_copy(f'gs://bucket/{last}') is None


def test_a_report_reads_a_copy_and_never_the_storage(storage, tmp_path):
    for name in ('cat/1.png', 'cat/2.png', 'dog/1.png', 'dog/2.png'):
        photo(storage / 'bucket/photos' / name)
    train, test = sources.open_sources('gs://bucket/photos')
    told = {
        'train': {'split': train.spec, 'fingerprint': train.fingerprint()},
        'test': {'split': test.spec, 'fingerprint': test.fingerprint()},
    }
    config = {'dataset': 'gs://bucket/photos', 'tfds_data_dir': ''}
    run = types.SimpleNamespace(config=config, data=told)
    fake_bucket.Bucket.log.clear()
    assert len(report_data.open_data(run)[1]) == 2
    assert fake_bucket.Bucket.log == []
    for name in ('gs://bucket/other', 'gs://bucket/..', 's3://bucket/photos'):
        run.config['dataset'] = name
        with pytest.raises(UserError, match='there is no copy on this machine'):
            report_data.open_data(run)
    assert fake_bucket.Bucket.log == []


def test_nothing_there(storage):
    with pytest.raises(UserError, match='there is nothing at gs://bucket/none'):
        sources.open_dataset('gs://bucket/none')
    with pytest.raises(UserError, match='expected gs://bucket/path'):
        sources.open_dataset('gs://')


def test_no_room(storage, monkeypatch):
    photo(storage / 'bucket/photos/a/1.png')
    monkeypatch.setattr(remote, '_SPARE', 1 << 60)
    with pytest.raises(UserError, match='VIT_JAX_CACHE names another folder'):
        sources.open_dataset('gs://bucket/photos')
    assert read() == []


def test_without_the_package(monkeypatch, tmp_path):
    def missing(scheme, **options):
        raise ImportError('Please install it')

    monkeypatch.setattr(fsspec, 'filesystem', missing)
    for address, package in (('gs://b/x', 'gcsfs'), ('s3://b/x', 's3fs')):
        with pytest.raises(UserError, match=rf"{package}: pip install 'vit_jax\[cloud\]'"):
            sources.open_dataset(address)


def test_weights_and_model_folders(storage):
    small = dict(
        hidden_size=8, patches={'size': (4, 4)}, classifier='token',
        transformer={'num_layers': 1, 'mlp_dim': 8, 'num_heads': 2},
    )  # fmt: skip
    module = models.VisionTransformer(num_classes=2, **small)
    params = modules.params_of(module, np.zeros((1, 8, 8, 3), np.float32), train=False)
    there = storage / 'private/run/model'
    there.parent.mkdir(parents=True)
    model_folder.save(
        there, params, model_config=small, class_names=('cat', 'dog'),
        preprocess=config_lib.Preprocess(crop=8), source={},
    )  # fmt: skip
    for scheme in ('gs', 's3'):
        loaded = model_folder.load(f'{scheme}://private/run/model')
        assert loaded.class_names == ('cat', 'dog')
        path = catalog.resolve(f'{scheme}://private/run/model')
        assert path.read_bytes() == (there / 'params.npz').read_bytes()
        file = catalog.resolve(f'{scheme}://private/run/model/params.npz')
        assert file.read_bytes() == path.read_bytes()


def test_released_weights_are_read_without_an_account(storage, monkeypatch):
    asked = []
    monkeypatch.setattr(catalog.download, 'fetch', lambda url, *_, **__: asked.append(url))
    catalog.resolve('gs://vit_models/sam/ViT-B_16.npz')
    assert asked == ['https://storage.googleapis.com/vit_models/sam/ViT-B_16.npz'] and read() == []


@pytest.mark.parametrize('scheme', ['hdfs', 'https', 'az', 'file'])
def test_other_schemes_of_data_are_refused_by_name(scheme):
    with pytest.raises(UserError, match=rf'the dataset {scheme}://h/x: {scheme}:// is not known'):
        sources.open_dataset(f'{scheme}://h/x')
    config = digits.get_config()
    config.dataset = f'{scheme}://h/x'
    with pytest.raises(UserError, match=rf'--config.dataset {scheme}://h/x'):
        config_lib.resolve(config, {})


@pytest.mark.parametrize('name', ['tfds_data_dir', 'compile_cache'])
def test_places_that_have_to_be_here(name):
    config: ml_collections.ConfigDict = digits.get_config()
    config[name] = 'gs://bucket/x'
    with pytest.raises(UserError, match=rf'config.{name}=gs://bucket/x has to be a folder'):
        config_lib.resolve(config, {})


def test_outputs_are_written_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='--output gs://bucket/x.csv is an address'):
        files.check_output('gs://bucket/x.csv', overwrite=True, flag='--output')
    for write in (files.atomic_file, files.atomic_folder, files.atomic_group):
        with pytest.raises(UserError, match='is an address'), write('s3://bucket/x') as part:
            part.write_text('')
    assert not list(tmp_path.iterdir())
