"""Files of features: parts that are kept while they are computed, and what is made of them."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Source
from vit_jax.errors import UserError, extra

SUFFIXES = ('.npz', '.parquet')
WHAT_FILE = 'features.json'


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the images of a source that could be read, in its order.

    Attributes:
      values: float32 [N, D].
      label: int32 [N], as the source tells them; of other labels float32 [N] or [N, C].
      keys: what a person calls each image: its path.
      index: int64 [N], its place in the source.
    """

    values: np.ndarray
    label: np.ndarray
    keys: tuple[str, ...]
    index: np.ndarray

    @classmethod
    def join(cls, parts: 'Sequence[Features]') -> 'Features':
        """Those of several parts, one after the other."""
        arrays = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ('values', 'label', 'index')
        )
        values, label, index = arrays
        return cls(values, label, tuple(key for part in parts for key in part.keys), index)


class Parts:
    """A folder with the features of consecutive images, which grows while they are computed.

    `features.json` says of what model and images they are. A part appears whole, so that whoever
    was killed goes on behind the last one.

    Args:
      folder: made if it is not there. What it holds of other features is removed.
      what: JSON that tells these features from others.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: pathlib.Path, what: Mapping[str, Any]):
        self._folder = folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f'{folder} is a file; features are kept in a folder')
        if folder.exists() and any(folder.iterdir()) and not (folder / WHAT_FILE).exists():
            raise UserError(f'{folder} holds something else than features; name another folder')
        try:
            same = files.read_json(folder / WHAT_FILE) == json.loads(json.dumps(what))
        except UserError:  # not there, or damaged
            same = False
        if not same:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            files.write_json(folder / WHAT_FILE, what)

    def read(self) -> tuple[int, list[Features], list[BadImageError]]:
        """How many images of the source are done, their features, and what could not be read."""
        done, found, errors = 0, list[Features](), list[BadImageError]()
        while (path := self._path(done)).exists():
            try:
                with np.load(path, allow_pickle=False) as part:
                    arrays = dict(part)
                end = int(arrays['end'])
                keys = tuple(arrays['keys'].tolist())
                found.append(Features(arrays['values'], arrays['label'], keys, arrays['index']))
                told = json.loads(str(arrays['errors']))
            except (OSError, ValueError, KeyError, EOFError):  # damaged on disk: computed anew
                break
            errors += [BadImageError(key, reason) for key, reason in told]
            done = end
        return done, found, errors

    def write(self, start: int, end: int, found: Features, errors: Sequence[BadImageError]) -> None:
        """Adds the part of the images from `start` to before `end`."""
        told = json.dumps([(error.key, error.reason) for error in errors])
        with files.atomic_file(self._path(start)) as part, open(part, 'wb') as file:
            np.savez(
                file, allow_pickle=False, values=found.values, label=found.label,
                keys=np.array(found.keys, str), index=found.index, end=np.int64(end),
                errors=np.array(told),
            )  # fmt: skip

    def _path(self, start: int) -> pathlib.Path:
        return self._folder / f'part-{start:09d}.npz'


def identity_of(source: Source) -> str:
    """SHA-256 of what tells the images of a source from others, without reading them.

    What the source says of itself, and path, size and time of change of each file.
    """
    digest = hashlib.sha256(repr((type(source).__name__, len(source))).encode())
    if fingerprint := getattr(source, 'fingerprint', None):
        digest.update(fingerprint().encode())
    paths = getattr(source, 'paths', lambda: None)()
    for path in paths or ():
        digest.update(os.fsencode(path) + b'\0')
        digest.update(getattr(path, 'content', b''))  # was piped in
        try:
            status = os.stat(path)
        except OSError:  # is named where it is read
            continue
        digest.update(f'{status.st_size} {status.st_mtime_ns}\0'.encode())
    return digest.hexdigest()


def check_output(path: str, *, overwrite: bool) -> None:
    """Refuses what `write` could not write, before there is anything to write."""
    if not path.endswith(SUFFIXES):
        raise UserError(f'--output {path}: the file is NAME.npz or NAME.parquet')
    files.check_output(path, overwrite=overwrite, flag='--output')
    if path.endswith('.parquet'):
        with extra('parquet'):
            import pyarrow  # noqa: F401


def write(
    path: str | os.PathLike[str],
    found: Features,
    *,
    about: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes features to a file, as NumPy's .npz or, with the suffix .parquet, Parquet.

    A .npz has `features` float32 [N, D], `paths` [N], `fingerprint` of the model, `about` (JSON);
    and with class names `labels` [N] and `class_names` [C]. A Parquet file has the columns path,
    features (lists of one length) and, with class names, label; about, fingerprint and class_names
    (JSON) are in the metadata of its schema.

    Args:
      path: the file; replaced if it is there.
      found: the features.
      about: how they were made: `fingerprint` and more, as JSON.
      class_names: of the labels; None where there are none.
    """
    told = json.dumps(about)
    with files.atomic_file(path) as part:
        if os.fspath(path).endswith('.parquet'):
            _write_parquet(part, found, about, class_names)
            return
        arrays = {
            'features': found.values,
            'paths': np.array(found.keys, str),
            'fingerprint': np.array(about['fingerprint']),
            'about': np.array(told),
        }
        if class_names is not None:
            arrays |= {'labels': found.label, 'class_names': np.array(class_names, str)}
        with open(part, 'wb') as file:
            np.savez(file, allow_pickle=False, **arrays)


def _write_parquet(
    part: pathlib.Path,
    found: Features,
    about: Mapping[str, Any],
    class_names: Sequence[str] | None,
) -> None:
    with extra('parquet'):
        import pyarrow
        from pyarrow import parquet

    flat = pyarrow.array(found.values.reshape(-1), pyarrow.float32())
    keys = [key.encode(errors='backslashreplace').decode() for key in found.keys]
    columns = {
        'path': pyarrow.array(keys, pyarrow.string()),
        'features': pyarrow.FixedSizeListArray.from_arrays(flat, found.values.shape[1]),
    }
    metadata = {'about': json.dumps(about), 'fingerprint': about['fingerprint']}
    if class_names is not None:
        columns['label'] = pyarrow.array(found.label.tolist())
        metadata['class_names'] = json.dumps(list(class_names), ensure_ascii=False)
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    parquet.write_table(table, part)
