"""Preparing TFDS sets for real: child processes that import TensorFlow convert and make them."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from vit_jax.data import prepare, sources, tfds_sets
from vit_jax.data.decode import decode
from vit_jax.errors import UserError

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'
SET = pathlib.Path('tiny_set') / '1.2.0'


@pytest.fixture
def tfrecord_set(tmp_path):
    """A TFDS folder with a set of 10 + 4 images as the original release would have left it."""
    shutil.copytree(FIXTURES / 'tfrecord', tmp_path / 'tfds')
    return tmp_path / 'tfds'


def records(folder, split, suffix):
    """The serialized examples of a split, read without TFDS."""
    found = []
    for path in sorted(folder.glob(f'*-{split}.{suffix}-*')):
        if suffix == 'tfrecord':  # length (8 bytes), checksum (4), data, checksum (4)
            data = path.read_bytes()
            while data:
                length = int.from_bytes(data[:8], 'little')
                found.append(data[12 : 12 + length])
                data = data[16 + length :]
        else:
            from array_record.python.array_record_module import ArrayRecordReader

            reader = ArrayRecordReader(str(path))
            found += reader.read_all()
            reader.close()
    return found


def test_tfrecord_set_is_converted_and_read_without_tensorflow(tfrecord_set, capfd):
    before = {path: path.read_bytes() for path in tfrecord_set.rglob('*') if path.is_file()}
    train, test = sources.open_sources('tiny_set', tfds_data_dir=str(tfrecord_set))
    assert 'Converting' in capfd.readouterr().out
    assert 'tensorflow' not in sys.modules
    target = tfrecord_set / 'tiny_set' / '1.2.0-array_record'
    for split, count in (('train', 10), ('test', 4)):
        converted = records(target, split, 'array_record')
        assert len(converted) == count
        assert converted == records(tfrecord_set / SET, split, 'tfrecord')
    assert all(path.read_bytes() == data for path, data in before.items())
    assert sorted(path.name for path in target.parent.iterdir()) == ['1.2.0', '1.2.0-array_record']
    assert os.access(target, os.R_OK | os.X_OK) and target.stat().st_mode & 0o055 == 0o055

    assert (len(train), len(test), train.class_names) == (10, 4, ('red', 'blue'))
    for i in range(10):
        example = train[i]
        pixels = decode(example.image, key=example.key)
        assert pixels[..., 0 if example.label == 0 else 2].min() >= 150
        assert pixels.shape[1] == 5

    # The second time everything is there: no child process, no output, whoever reads.
    sources.open_sources('tiny_set:1.2.0', tfds_data_dir=str(tfrecord_set))
    assert capfd.readouterr().out == ''


def test_another_version_than_the_one_that_is_there(tfrecord_set):
    with pytest.raises(UserError, match=r'tiny_set:9.0.0 .* has: 1.2.0$'):
        sources.open_sources('tiny_set:9.0.0', tfds_data_dir=str(tfrecord_set))


def test_incomplete_set_leaves_nothing_behind(tfrecord_set):
    next((tfrecord_set / SET).glob('*test*00001-of*')).unlink()
    with pytest.raises(UserError, match='could not be prepared: .*00001-of-00003 is missing'):
        sources.open_sources('tiny_set', tfds_data_dir=str(tfrecord_set))
    assert [path.name for path in (tfrecord_set / 'tiny_set').iterdir()] == ['1.2.0']


MAKE = """
import sys
import tensorflow_datasets as tfds

class MadeSet(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(names=['a', 'b'])}))
    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}
    def _generate_examples(self):
        for i in range(6):
            yield i, {'image': sys.argv[1], 'label': i % 2}

from vit_jax.data import prepare
sys.exit(prepare.main(['--dataset', 'made_set', '--data_dir', sys.argv[2]]))
"""


def test_a_set_is_made_by_its_builder_and_read_without_it(tmp_path):
    image = tmp_path / 'x.png'
    Image.new('RGB', (7, 5), (10, 200, 30)).save(image)
    command = [sys.executable, '-c', MAKE, str(image), str(tmp_path / 'tfds')]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'made_set is ready in' in done.stdout
    description = json.loads((tmp_path / 'tfds/made_set/1.0.0/dataset_info.json').read_text())
    assert description['fileFormat'] == 'array_record'
    dataset = sources.open_dataset('made_set', tfds_data_dir=str(tmp_path / 'tfds'))
    train, test = dataset.select('train[:4]'), dataset.select('train[4:]')
    assert sorted(train[i].label for i in range(4)) and len(test) == 2
    assert train[0].image == image.read_bytes()
    assert test[1].key == 'made_set:train/5'


def test_files_that_must_be_downloaded_by_hand(tmp_path):
    with pytest.raises(UserError, match='tfds_manual_dir.*ILSVRC2012_img_train.tar'):
        sources.open_sources('imagenet2012', tfds_data_dir=str(tmp_path))


def test_no_network(tmp_path, monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # nothing listens there
    for name in ('no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match='flower_photos.tgz cannot be reached.*tfds_data_dir=DIR'):
        tfds_sets.prepare_in_child('tf_flowers', data_dir=str(tmp_path))


KILLED = 'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n'


def test_a_killed_conversion_is_said_and_swept(tfrecord_set, tmp_path, monkeypatch):
    """As when memory runs out: the child dies when it begins to read, its folder half full."""
    (tmp_path / 'path').mkdir()
    (tmp_path / 'path' / 'tensorflow.py').write_text(KILLED)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'path'))
    folder = tfrecord_set / 'tiny_set'

    def left():
        return {path.name for path in folder.iterdir()} - {'1.2.0'}

    seen = set()
    for _ in range(2):
        with pytest.raises(UserError, match='process was killed, as .* memory runs out') as caught:
            sources.open_sources('tiny_set', tfds_data_dir=str(tfrecord_set))
        assert '\n' not in str(caught.value)
        (name,) = left()  # of this try; that of the one before is gone
        assert name.startswith('.1.2.0-array_record.') and name not in seen
        seen.add(name)
    # TFDS's own way of making a set leaves others; one at work is left alone.
    for name, age in (('incomplete.ABC123_1.2.0', 7200), ('incomplete.XYZ789_1.2.0', 0)):
        (folder / name).mkdir()
        os.utime(folder / name, ((folder / name).stat().st_mtime - age,) * 2)
    prepare._sweep(folder / '1.2.0')
    assert 'incomplete.XYZ789_1.2.0' in left() and len(left()) == 2


FULL = """
mount -t tmpfs -o size={size} none {data} || exit 77
cp -r {source}/. {data}
{python} -c "
from vit_jax.data import tfds_sets
from vit_jax.errors import UserError
try:
    tfds_sets.prepare_in_child('tiny_set', data_dir='{data}')
except UserError as error:
    print('UserError:', error)
"
ls {data}/tiny_set
"""


def test_no_room_for_a_conversion(tmp_path):
    """On a real file system that is full (root may mount one in a name space of its own)."""
    data = tmp_path / 'data'
    data.mkdir()
    words = {'data': data, 'source': FIXTURES / 'tfrecord', 'python': sys.executable}
    try:
        done = subprocess.run(
            ['unshare', '-m', 'sh', '-c', FULL.format(size='200k', **words)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip('there is no command unshare')
    if 'UserError' not in done.stdout and ('unshare' in done.stderr or done.returncode == 77):
        pytest.skip('only root may mount a file system that is full')
    message = next(line for line in done.stdout.splitlines() if line.startswith('UserError'))
    assert 'No space left on device' in message and 'tfds_data_dir' in message
    assert 'GiB free there' in message
    assert done.stdout.split()[-1] == '1.2.0'  # nothing is left behind
