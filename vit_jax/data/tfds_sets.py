"""Image classification sets of TensorFlow Datasets, read without TensorFlow.

Reading needs the set as ArrayRecord, the format with random access. A set that is not there, or is
there as TFRecord as the original release left it, is brought into that form by
`vit_jax.data.prepare` in a child process.
"""

import dataclasses
import difflib
import functools
import os
import pathlib
import re
import signal
import tempfile
import threading
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.data import tfds_metadata
from vit_jax.data.captions import CAPTIONS
from vit_jax.data.columns import text_of
from vit_jax.data.dataset import Dataset
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Example
from vit_jax.errors import UserError, extra, printable
from vit_jax.run import child

_DESCRIPTION = tfds_metadata.DESCRIPTION
_LIMIT = threading.Lock()
_allowed: set[tuple[str, str]] = set()  # splits that the limit of open files was raised for


def open_tfds(name: str, data_dir: str, manual_dir: str, *, captions: bool = False) -> Dataset:
    """Opens a TFDS set, and prepares it first if necessary.

    Args:
      name: `tf_flowers`, `name/config` or `name:version`.
      data_dir: where TFDS sets are; '' is TFDS's default.
      manual_dir: where files downloaded by hand are, or ''.
      captions: whether labels are captions, see `data.captions`.

    Returns:
      The dataset with all its splits, keys `tf_flowers:train/17`.

    Raises:
      UserError: an unknown name, a set that cannot be prepared, or one that has no single label per
        image.
    """
    builder = find_builder(name, data_dir)
    check_features(name, builder.info.features, captions=captions)
    folder = array_record_folder(builder)
    if folder is None:
        prepare_in_child(name, data_dir=data_dir, manual_dir=manual_dir)
        builder = find_builder(name, data_dir)
        folder = array_record_folder(builder)
        if folder is None:
            raise UserError(
                f'{name} was prepared, but is not in {builder.data_path} as ArrayRecord; '
                'remove that folder, or give another --config.tfds_data_dir'
            )
    return _open_prepared(name, folder, captions)


def is_known(name: str) -> bool:
    """Whether this is the plain name of a set that TFDS can prepare."""
    return tfds_metadata.parse_name(name) == name and name in _known()


def prepare_in_child(name: str, *, data_dir: str = '', manual_dir: str = '') -> None:
    """Prepares a set in a child process, whose progress goes to this process's console.

    Args:
      name: of the TFDS set: `tf_flowers`, `name/config` or `name:version`.
      data_dir: where TFDS sets are; '' is TFDS's default.
      manual_dir: where files that had to be downloaded by hand are, or ''.

    Raises:
      UserError: the set could not be prepared; says why and what to do.
    """
    package_root = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | {
        'TF_CPP_MIN_LOG_LEVEL': '3',  # TensorFlow's start-up notices are not for our users.
        'CUDA_VISIBLE_DEVICES': '-1',  # The GPU is the parent's.
        'PYTHONPATH': os.pathsep.join(filter(None, [package_root, os.environ.get('PYTHONPATH')])),
    }
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / 'error'
        command = ['-m', 'vit_jax.data.prepare', '--dataset', name, '--error_file', str(result)]
        command += ['--data_dir', data_dir, '--manual_dir', manual_dir]
        code = child.run(command, env=environment).returncode
        if code:
            reason = result.read_text() if result.exists() else _how_it_ended(code)
            raise UserError(f'dataset {name} could not be prepared: {reason}')


def _how_it_ended(code: int) -> str:
    """How a child process ended that left no message itself."""
    ended = child.how_it_ended(code)
    if code == -signal.SIGKILL:
        return (
            f'{ended} (converting needs as much as the largest file of the set). Run the same '
            'command again; nothing that is incomplete is used'
        )
    return ended if code < 0 else f'{ended}; its last lines are above'


def _tfds() -> Any:
    """TensorFlow Datasets, which is imported, in a second, when a set of it is asked for."""
    with extra('train'):
        import tensorflow_datasets as tfds
    return tfds


def _known() -> list[str]:
    """Names of the sets that TFDS can prepare, sorted."""
    return sorted(set(_tfds().core.registered.list_imported_builders()))


def find_builder(name: str, data_dir: str) -> Any:
    """The `tfds.core.DatasetBuilder` of a set that is prepared or that TFDS knows how to prepare.

    Raises:
      UserError: neither is so; names the nearest names.
    """
    tfds = _tfds()

    expanded = str(files.expand(data_dir)) if data_dir else None
    stem = tfds_metadata.parse_name(name)
    if stem is None:
        raise UserError(_unknown(name, expanded))
    tfds_metadata.check_below(pathlib.Path(expanded or tfds.core.constants.DATA_DIR, stem))
    try:
        builder = tfds.builder(name, data_dir=expanded)
        described = pathlib.Path(builder.data_path)
        builder.info.features  # noqa: B018  (reads the description if the set is there)
    except MemoryError:
        raise
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(_unknown(name, expanded)) from error
    except Exception as error:  # a description that is damaged raises nearly anything
        reason = ' '.join(str(error).split()) or type(error).__name__
        if reason.startswith('Parsing builder name'):
            raise UserError(_unknown(name, expanded)) from error
        reason = re.sub(r'^Failed to construct dataset .*?}": ', '', reason)  # config or version
        raise UserError(f'dataset {name} cannot be opened: {reason[:300]}') from error
    if (described / _DESCRIPTION).exists():
        tfds_metadata.check_folder(described)
    return builder


def _unknown(name: str, data_dir: str | None) -> str:
    tfds = _tfds()

    shown = printable(name)
    text = f'dataset {shown} is neither a folder (seen from {pathlib.Path.cwd()}) nor'
    stem = tfds_metadata.parse_name(name)
    if not stem:
        return f'{text} a name of TFDS: those are NAME, NAME/CONFIG and NAME:1.2.3'
    near = difflib.get_close_matches(stem, _known(), n=3, cutoff=0.7)
    prepared = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR, stem)
    hint = 'https://www.tensorflow.org/datasets/catalog lists the sets.'
    if prepared.is_dir():
        hint = f'{prepared} has: {", ".join(sorted(path.name for path in prepared.iterdir()))}'
    elif near:
        hint = f'did you mean {" or ".join(near)}?'
    return f'{text} a set that TFDS knows; {hint}'


def caption_feature(features: Any) -> str:
    """The feature of a set that has a text or several for each image; '' if there is none.

    A text, a sequence of texts, or, as in `coco_captions`, a sequence of what has a `text`.
    """
    tfds = _tfds()

    fields = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    for name in ('captions', 'caption'):
        found = fields.get(name)
        inside = getattr(found, 'feature', found)  # of a sequence
        if isinstance(inside, tfds.features.FeaturesDict):
            inside = dict(inside.items()).get('text')
        if isinstance(inside, tfds.features.Text):
            return name
    return ''


def check_features(name: str, features: Any, *, captions: bool = False) -> None:
    """Refuses a set whose examples are not one image with one label, or with captions.

    Args:
      name: of the set.
      features: of the set.
      captions: whether there have to be captions.

    Raises:
      UserError: says which features the set has.
    """
    tfds = _tfds()

    fields = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image = isinstance(fields.get('image'), tfds.features.Image)
    if captions:
        if not image or not caption_feature(features):
            found = ', '.join(fields) or 'none by name'
            raise UserError(
                f'{name} is not a set of images with captions: it needs the features image (an '
                f'image) and captions (texts), and has: {found}'
            )
    elif not (image and isinstance(fields.get('label'), tfds.features.ClassLabel)):
        found = ', '.join(fields) or 'none by name'
        raise UserError(
            f'{name} is not a set for image classification: it needs the features image (an image) '
            f'and label (one class of several), and has: {found}'
        )


def array_record_folder(builder: Any) -> pathlib.Path | None:
    """The folder that holds a set as ArrayRecord: its own or the converted one; None if none."""
    tfds = _tfds()

    own, converted = pathlib.Path(builder.data_path), converted_folder(builder)
    wanted = tfds.core.FileFormat.ARRAY_RECORD
    if (own / _DESCRIPTION).exists() and wanted in builder.info.available_file_formats():
        return own
    return converted if (converted / _DESCRIPTION).exists() else None


def converted_folder(builder: Any) -> pathlib.Path:
    """Where a TFRecord set is converted to, beside its own folder: `3.0.1-array_record`."""
    path = pathlib.Path(builder.data_path)
    return path.with_name(path.name + '-array_record')


def _open_prepared(name: str, folder: pathlib.Path, captions: bool) -> Dataset:
    tfds = _tfds()

    tfds_metadata.check_folder(folder)
    with tfds_metadata.reading(folder / _DESCRIPTION):
        builder = tfds.builder_from_directory(folder)
        features = builder.info.features
        lengths = {str(split): info.num_examples for split, info in builder.info.splits.items()}
    check_features(name, features, captions=captions)
    label = caption_feature(features) if captions else 'label'
    if not captions and (features[label].num_classes or 0) < 2:
        raise UserError(
            f'{name} has {features[label].num_classes} classes; classification needs at least two'
        )
    splits = {
        split: _Records(f'{name}:{split}', str(folder), split, count, label)
        for split, count in lengths.items()
        if count
    }
    if not splits:
        raise UserError(f'{folder} has no examples in any split; remove it to prepare it again')
    if captions:
        return Dataset(name, (), False, splits, label_dtype=CAPTIONS)
    return Dataset(name, tuple(features[label].names), False, splits)


def _texts(stored: Any) -> tuple[str, ...]:
    """The captions of an example, as TFDS gives them."""
    stored = stored['text'] if isinstance(stored, dict) else stored
    return tuple(text_of(text) for text in np.atleast_1d(stored).tolist())


def _allow_open_files(shards: int, folder: str, name: str) -> None:
    """Raises the limit of open files by so many, once: all shards of a split stay open.

    Raises:
      UserError: the system does not let this process have so many.
    """
    try:
        import resource
    except ImportError:  # Windows, where the limit is another one
        return
    with _LIMIT:  # threads come here together
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if (folder, name) in _allowed or soft == resource.RLIM_INFINITY or shards < soft // 8:
            return
        needed = soft + shards
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f'{name} has {shards:,} shards, which all stay open, and this process may have '
                f'{hard:,} open files: raise the limit to {needed:,} (ulimit -Hn, LimitNOFILE of '
                'systemd, --ulimit nofile of Docker)'
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        _allowed.add((folder, name))


@dataclasses.dataclass(frozen=True)
class _Records:
    """A split in ArrayRecord files, opened when it is first read: free if unused."""

    name: str
    folder: str
    split: str
    length: int
    label: str

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Example:
        records, features, decoders = self._opened
        key = f'{self.name}/{index}'
        try:
            # ArrayRecord verifies a checksum of each record; protobuf and TFDS the structure.
            fields = features.deserialize_example_np(records[index], decoders=decoders)
            image, stored = fields['image'], fields[self.label]
            if self.label != 'label':
                return Example(image, _texts(stored), key)
            label = int(stored)
        except MemoryError:
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), '')
            raise BadImageError(
                key, f'its record in {self.folder} is damaged ({type(error).__name__}: {reason})'
            ) from error
        classes = features['label'].num_classes
        if label >= classes:
            raise BadImageError(key, f'its label is {label}, and there are {classes} classes')
        if label < 0:  # TFDS's mark for test sets whose labels are kept secret.
            raise UserError(f'{key} has no label; choose another split than {self.split}')
        return Example(image, label, key)

    def identity(self) -> tuple[str, ...]:
        version = re.match(r'[\d.]+', pathlib.Path(self.folder).name)
        return self.name, version[0] if version else '', str(self.length)

    @functools.cached_property
    def _opened(self) -> tuple[Any, Any, dict[str, Any]]:
        tfds = _tfds()

        description = pathlib.Path(self.folder, _DESCRIPTION)
        with tfds_metadata.reading(description):
            builder = tfds.builder_from_directory(self.folder)
            stored, shards = builder.info.features, builder.info.splits[self.split].num_shards
            # Only these two are parsed: other features (masks, boxes) may be large.
            features = tfds.features.FeaturesDict(
                {'image': stored['image'], self.label: stored[self.label]}
            )
        _allow_open_files(shards, self.folder, self.name)
        with tfds_metadata.reading(description):
            records = builder.as_data_source(
                self.split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format=tfds.core.FileFormat.ARRAY_RECORD,
            )
        return records, features, {'image': tfds.decode.SkipDecoding()}
