"""Who reads files from outside: how a file for them is damaged, and how it is read."""

import io
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from fuzzing import corpus as corpus_lib
from fuzzing import downloads, mutate, mutate_images, rows, runs
from vit_jax.checkpoint import catalog, formats, inspection
from vit_jax.data import folders, image_files, sources, tfds_sets
from vit_jax.data.batches import eval_batches
from vit_jax.data.dataset import Dataset
from vit_jax.data.decode import BadImageError, decode
from vit_jax.data.examples import CLASS_INDEX
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

Read = Callable[[], object]
CROP = Preprocess(crop=8)


def prepare_case(reader: str, rng: random.Random, corpus: pathlib.Path, case: pathlib.Path) -> Read:
    """Makes the damaged input of a case in the empty folder `case`; returns what reads it."""
    return READERS[reader](rng, corpus, case)


def _pick(rng: random.Random, folder: pathlib.Path) -> pathlib.Path:
    return rng.choice(sorted(folder.iterdir()))


def _write(rng, source: pathlib.Path, case: pathlib.Path, special: Callable) -> pathlib.Path:
    """A damaged copy: by bytes, or as `special` knows the format."""
    data = source.read_bytes()
    if rng.random() < 0.4:
        others = [path.read_bytes() for path in sorted(source.parent.iterdir()) if path.is_file()]
        data = mutate.damage(rng, data, others)
    else:
        data = special(rng, data)
    name = source.name
    if rng.random() < 0.15:  # a file under another's name
        name = 'x' + rng.choice(('.npz', '.safetensors', '.pth', '.bin', '.jpg', '.png', ''))
    (case / name).write_bytes(data)
    return case / name


def _weights(rng, corpus, case, kind, special) -> Read:
    path = _write(rng, _pick(rng, corpus / kind), case, special)
    read = rng.choice((formats.load, formats.load, inspection.inspect, model_folder.load))
    return lambda: read(path)


def _npz(rng, corpus, case) -> Read:
    def special(rng, data):
        return mutate.damage_zip(rng, data, mutate.npy_member)

    return _weights(rng, corpus, case, 'npz', special)


def _safetensors(rng, corpus, case) -> Read:
    return _weights(rng, corpus, case, 'safetensors', mutate.damage_safetensors)


def _pickles(rng, corpus, case) -> Read:
    def special(rng, data):
        if data[:2] != b'PK':
            return mutate.pickle_member(rng, 'x.pkl', data)
        return mutate.damage_zip(rng, data, mutate.pickle_member)

    return _weights(rng, corpus, case, 'pickles', special)


def _damage_file(rng, path: pathlib.Path) -> None:
    data = path.read_bytes()
    if path.suffix == '.json' and rng.random() < 0.8 and _is_json(data):
        path.write_bytes(mutate.damage_json(rng, json.loads(data)))
    elif path.suffix == '.safetensors' and _is_json(data[8:-1].partition(b'}}')[0] + b'}}'):
        path.write_bytes(mutate.damage_safetensors(rng, data))
    elif rng.random() < 0.1:
        path.unlink()
        rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to('/dev/zero')))()
    else:
        path.write_bytes(mutate.damage(rng, data))


def _is_json(data: bytes) -> bool:
    try:
        return bool(json.loads(data))
    except (ValueError, RecursionError):  # it was damaged before
        return False


def _folder_case(rng, source: pathlib.Path, case: pathlib.Path) -> pathlib.Path:
    folder = case / source.name
    shutil.copytree(source, folder)
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    described = [path for path in files if path.suffix in ('.json', '.txt')]
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(described if described and rng.random() < 0.7 else files)
        if path.is_file():
            _damage_file(rng, path)
    return folder


def _folders(rng, corpus, case) -> Read:
    folder = _folder_case(rng, _pick(rng, corpus / 'folders'), case)
    read = rng.choice((formats.load, formats.load, inspection.inspect, model_folder.load))
    return lambda: read(folder)


def _msgpack(rng, corpus, case) -> Read:
    folder = case / 'flax'
    shutil.copytree(corpus / 'msgpack/flax', folder)
    file = folder / 'flax_model.msgpack'
    data = file.read_bytes()
    if rng.random() < 0.2:  # many objects of a byte each, and lengths that are claimed
        place, piece = rng.randrange(min(len(data), 400)), rng.choice((b'\x80', b'\x91', b'\xc0'))
        piece = rng.choice((piece * 200_000, b'\xdd\xff\xff\xff\xff', b'\xc9\xff\xff\xff\xff\1'))
        data = data[:place] + piece + data[place:]
    else:
        data = mutate.damage(rng, data)
    file.write_bytes(data)
    read = rng.choice((formats.load, formats.load, inspection.inspect, model_folder.load))
    return lambda: read(folder)


def _models(rng, corpus, case) -> Read:
    folder = _folder_case(rng, corpus / 'models/model', case)
    return lambda: model_folder.load(folder)


def _tfds(rng, corpus, case) -> Read:
    _folder_case(rng, corpus / 'tfds' / 'tiny_set', case)
    return lambda: _read_all(sources.open_dataset('tiny_set', tfds_data_dir=str(case)))


def _read_all(dataset: Dataset) -> None:
    """Reads as an evaluation does, at most some examples of each split."""
    for name in dataset.splits:
        split = dataset.select(name)
        few = dataset.select(f'{name}[:{min(20, len(split))}]')
        errors = []
        for batch in eval_batches(few, CROP, batch=8, threads=1, on_bad=errors.append):
            assert np.isfinite(batch['image']).all()
            if few.label_dtype == CLASS_INDEX:
                assert (batch['label'] < len(few.class_names)).all()
                assert (batch['label'] >= -1).all()
            assert np.isfinite(batch['label']).all()
        for error in errors:
            assert str(error).isprintable(), ascii(str(error))


def _images(rng, corpus, case) -> Read:
    source = _pick(rng, corpus / 'images')

    def special(rng, data):
        return mutate_images.damage_image(rng, source.suffix, data)

    path = _write(rng, source, case, special)
    exif, image = rng.random() < 0.5, path.read_bytes()
    if rng.random() < 0.1:  # by somebody else, who has images of his own
        try:
            if image[4:8] == b'ftyp':  # of which opening alone can take minutes
                image_files.check(image)
            image = Image.open(io.BytesIO(image), formats=image_files.FORMATS)
        except Exception:  # Pillow's, and not our concern
            return lambda: None

    def read():
        pixels = decode(image, key=str(path), exif=exif)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        out = CROP.train(pixels, np.random.default_rng(0))
        assert np.isfinite(out).all()

    return read


def _image_folders(rng, corpus, case) -> Read:
    root = case / 'photos'
    names = [b'cat', b'dog', b'train', b'test', b'val', b'.git', b'a\nb', b'\xff', b'..x', b' ']
    places = [os.fsencode(root)]
    for _ in range(rng.choice((2, 4, 8))):
        place = rng.choice(places) + b'/' + rng.choice(names)
        if os.path.lexists(place):
            continue
        os.makedirs(place)
        places.append(place)
    images = sorted((corpus / 'images').glob('small*'))
    for number in range(rng.choice((0, 2, 10, 30))):
        folder = rng.choice(places[1:] or places)
        path = (
            folder + b'/' + rng.choice((b'%d.jpg', b'%d\n.png', b'\xff%d.bmp', b'.%d.jpg')) % number
        )
        action = rng.randrange(12)
        os.makedirs(folder, exist_ok=True)
        if action < 6:
            shutil.copy(rng.choice(images), path)
        elif action < 8:
            with open(path, 'wb') as file:
                file.write(mutate.damage(rng, rng.choice(images).read_bytes()))
        elif action == 8:
            os.symlink(rng.choice((b'.', b'..', b'nowhere', b'/dev/zero', path, b'../..')), path)
        elif action == 9:
            os.mkfifo(path)
        elif action == 10:
            os.makedirs(path)
        else:
            with open(path, 'wb') as file:
                file.truncate(1 << 42)
    root.mkdir(exist_ok=True)
    return lambda: _read_all(folders.open_folder(root, 'photos'))


def _downloads(rng, corpus, case) -> Read:
    return downloads.prepare(rng, case)


def _index(rng, corpus, case) -> Read:
    shutil.copytree(corpus / 'index', case / 'index')
    path = case / 'index/index.csv'
    text = path.read_bytes()
    if rng.random() < 0.5:
        field = rng.choice(
            [b'B_16-i21k-300ep-lr_0.001', b'0.41', b'i21k', b'filename', b'\n', b',']
        )
        new = rng.choice((*mutate.TEXTS, '"', '"' * 3, 'x' * 200_000, 'nan', '-inf'))
        text = text.replace(field, new.encode('utf-8', 'surrogatepass'))
    else:
        text = mutate.damage(rng, text)
    path.write_bytes(text)
    return lambda: catalog.resolve_augreg('B_16', pretrained_dir=str(case / 'index'))


def _texts(rng, corpus, case) -> Read:
    """What a config or a command line says: names of sets, splits, weights."""
    os.makedirs(case / 'empty')

    def text(*seeds):
        word = rng.choice(seeds)
        for _ in range(rng.choice((0, 1, 1, 2))):
            place = rng.randrange(len(word) + 1)
            part = rng.choice(
                (*mutate.TEXTS, '/', ':', '[', ']', '%', '+', '~', '*', ' ', '\udcff')
            )
            word = word[:place] + part[:5000] + word[place + rng.choice((0, 1, 5)) :]
        return word

    def dataset():
        name = text('tiny_set', 'tiny_set:1.2.0', 'tiny_set/config:1.2.0', 'digits', 'photos', '~x')
        return sources.open_dataset(name, tfds_data_dir=text(str(corpus / 'tfds'), '', '~y'))

    def split():
        spec = text('train', 'train[:90%]', 'train[5:]+train[:3]', 'all', 'train[1:2%]')
        return sources.open_dataset('digits').select(spec)

    def weights():
        name = text(
            'imagenet21k/ViT-B_16', 'augreg/B_16-i21k', str(corpus / 'npz'), 'gs://x/y', '~z'
        )
        os.environ['VIT_JAX_CACHE'] = str(case / 'empty')
        return catalog.resolve(name)

    def augreg():
        return catalog.resolve_augreg(
            text('B_16', 'B_16-i21k'), pretrained_dir=str(corpus / 'index')
        )

    return rng.choice((dataset, split, weights, augreg))


def _rows(prepare: Callable) -> Callable:
    return lambda rng, corpus, case: prepare(rng, corpus, case, _read_all)


READERS: dict[str, Callable[[random.Random, pathlib.Path, pathlib.Path], Read]] = {
    'npz': _npz,
    'safetensors': _safetensors,
    'pickles': _pickles,
    'folders': _folders,
    'msgpack': _msgpack,
    'models': _models,
    'tfds': _tfds,
    'images': _images,
    'image_folders': _image_folders,
    'index': _index,
    'downloads': _downloads,
    'texts': _texts,
    'runs': runs.workdirs,
    'onnx': runs.graphs,
    'labels': runs.names,
    'tables': _rows(rows.tables),
    **{kind: _rows(rows.shards(kind)) for kind in rows.KINDS},
}


MIB = 1 << 20


def limits(reader: str, case: pathlib.Path) -> tuple[int, float]:
    """What reading a case may take: (bytes of memory, CPU seconds); see docs/guarantees.md.

    Args:
      reader: its name.
      case: its folder, for the sizes of files and what images declare.
    """
    sizes = [path.lstat().st_size for path in case.rglob('*') if not path.is_symlink()]
    stored = sum(size for size in sizes if size < 64 * MIB)  # of larger ones no case writes a byte
    if reader != 'images':
        return 192 * MIB + 32 * stored, 5 + stored / MIB
    (path,) = case.iterdir()
    pixels = declared_pixels(path.read_bytes())
    return 64 * MIB + 24 * pixels, 5 * max(1.0, pixels / 25e6)


def declared_pixels(data: bytes) -> int:
    """Height times width, by the header of an image; 0 of what is none."""
    try:
        if data[:2] == b'\xff\xd8':
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        else:
            image_files.check(data)
            width, height = Image.open(io.BytesIO(data), formats=image_files.FORMATS).size
    except Exception:  # nearly anything, of what is damaged
        return 0
    return height * width


def available(corpus: pathlib.Path) -> list[str]:
    """The readers whose libraries are installed (PyTorch is not everywhere)."""
    optional = ('pickles', 'onnx')
    return [name for name in READERS if name not in optional or (corpus / name).is_dir()]


def read_undamaged(corpus: pathlib.Path) -> None:
    """Reads every file as it was made; raises what is wrong with one that cannot be read."""
    for kind in ('npz', 'safetensors', 'pickles', 'folders', 'msgpack'):
        for path in sorted((corpus / kind).glob('*')):
            formats.load(path)
    model_folder.load(corpus / 'models' / 'model')
    _read_all(sources.open_dataset('tiny_set', tfds_data_dir=str(corpus / 'tfds')))
    for path in (corpus / 'images').iterdir():
        decode(path.read_bytes(), key=str(path))
    catalog.resolve_augreg('B_16', pretrained_dir=str(corpus / 'index'))
    runs.read_undamaged(corpus)
    rows.read_undamaged(corpus, _read_all)
    sources.open_dataset('digits').select('train[:10%]')


def isolate() -> None:
    """What no case may do: download, or prepare a set by TensorFlow; both say so."""
    formats._HEADS[corpus_lib.WIDTH] = corpus_lib.HEADS  # so that reading goes on to the arrays
    os.environ['VIT_JAX_BASE_URL'] = 'http://127.0.0.1:9'  # nothing listens there

    def refused(name, **_):
        raise UserError(f'{name} would be prepared')

    tfds_sets.prepare_in_child = refused


__all__ = ['READERS', 'BadImageError', 'available', 'isolate', 'prepare_case']
