"""Brings a TFDS set into ArrayRecord, the format that training reads.

    python -m vit_jax.data.prepare --dataset tf_flowers [--data_dir DIR] [--manual_dir DIR]

The only file of the package that imports TensorFlow (most of TFDS's builders need it): it runs in a
child process (`tfds_sets.prepare_in_child`), and training never imports it. A set that is there as
TFRecord, as the original release left it, is converted into a folder beside it, record by record:
same bytes, same order, nothing downloaded.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time
from typing import Any

from vit_jax import files
from vit_jax.data import tfds_sets
from vit_jax.errors import UserError
from vit_jax.run import streams

_ABANDONED_SECONDS = 3600


def prepare(name: str, *, data_dir: str = '', manual_dir: str = '') -> pathlib.Path:
    """Prepares a set in this process; imports TensorFlow.

    It takes what `tfds_sets.prepare_in_child` takes, which runs it.

    Returns:
      The folder that holds the set as ArrayRecord.

    Raises:
      UserError: no such set, no room or right to write, no network, or files missing that must be
        downloaded by hand.
    """
    builder = tfds_sets.find_builder(name, data_dir)
    captions = bool(tfds_sets.caption_feature(builder.info.features))
    tfds_sets.check_features(name, builder.info.features, captions=captions)
    folder = tfds_sets.array_record_folder(builder)
    if folder is not None:
        return folder
    source = pathlib.Path(builder.data_path)
    try:
        _sweep(source)
        if (source / 'dataset_info.json').exists():
            try:
                return _convert(builder, tfds_sets.converted_folder(builder))
            except UserError as error:
                if isinstance(error.__cause__, OSError):
                    raise error.__cause__ from error
                raise
        _download(name, builder, manual_dir)
    except OSError as error:
        raise _no_room(error, source) from error
    return source


def _sweep(source: pathlib.Path) -> None:
    """Removes the half of a set that TFDS leaves beside its folder when it is killed.

    Only what nobody has written to for an hour. (The downloaded files lie elsewhere and are used
    again; a conversion that was killed is removed by `files.atomic_folder`.)
    """
    made = re.compile(rf'incomplete\.\w+_{re.escape(source.name)}')
    folders = source.parent.iterdir() if source.parent.is_dir() else ()
    for folder in [folder for folder in folders if made.fullmatch(folder.name)]:
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob('*')))
        if time.time() - newest > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _no_room(error: OSError, place: pathlib.Path) -> UserError:
    """What is wrong with the place where the set should go."""
    what = f'{error.strerror}: {error.filename or place}'
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            existing = next(path for path in (place, *place.parents) if path.exists())
            what += f' ({shutil.disk_usage(existing).free / 2**30:.1f} GiB free there)'
        return UserError(f'{what}. Make room, or choose another place with --config.tfds_data_dir')
    return UserError(f'{what}; choose another place with --config.tfds_data_dir')


def _convert(builder: Any, target: pathlib.Path) -> pathlib.Path:
    """Copies a set to a new folder as ArrayRecord, shard by shard and record by record."""
    from tensorflow_datasets.core import file_adapters

    source, info = pathlib.Path(builder.data_path), builder.info
    formats = file_adapters.FileFormat
    if info.file_format != formats.TFRECORD:
        raise UserError(
            f'{source} is stored as {info.file_format.value}; expected tfrecord or array_record'
        )
    reader = file_adapters.ADAPTER_FOR_FORMAT[formats.TFRECORD]
    writer = file_adapters.ADAPTER_FOR_FORMAT[formats.ARRAY_RECORD]
    for split in info.splits.values():
        for path in split.filepaths:
            if not path.exists():
                raise UserError(f'{path} is missing; the set there is not complete')
    print(f'Converting {source} from TFRecord to ArrayRecord: {target}', flush=True)
    with files.atomic_folder(target, exists='keep') as folder:
        for split in info.splits.values():
            old, count = split.filename_template, split.num_shards
            new = old.replace(data_dir=folder, filetype_suffix=formats.ARRAY_RECORD.file_suffix)
            paths = zip(old.sharded_filepaths(count), new.sharded_filepaths(count), strict=True)
            for number, (path, out) in enumerate(paths):
                try:
                    records = [record.numpy() for record in reader.make_tf_data(os.fspath(path))]
                except Exception as error:  # TensorFlow's errors of broken files.
                    raise UserError(f'{path} is broken ({type(error).__name__})') from error
                if len(records) != split.shard_lengths[number]:
                    raise UserError(
                        f'{path} has {len(records)} records; its description says '
                        f'{split.shard_lengths[number]}'
                    )
                try:
                    writer.write_examples(out, enumerate(records))
                except RuntimeError as error:  # ArrayRecord's
                    _raise_if_full(error, target)
                    raise
                print(f'  {split.name}: file {number + 1} of {count}', flush=True)
        _copy_description(builder, source, folder)
    return target


def _copy_description(builder: Any, source: pathlib.Path, folder: pathlib.Path) -> None:
    """All but the records: features, label names, the description with its new format."""
    for path in source.iterdir():
        if path.is_file() and '.tfrecord' not in path.name:
            shutil.copyfile(path, folder / path.name)
    if not (folder / 'features.json').exists():  # Sets prepared by TFDS before 4.0.
        builder.info.features.save_config(folder)
    path = folder / 'dataset_info.json'
    description = json.loads(path.read_text(encoding='utf-8'))
    description['fileFormat'] = 'array_record'
    path.write_text(json.dumps(description, indent=2), encoding='utf-8')


def _raise_if_full(error: Exception, place: object) -> None:
    """Raises the OSError of a full disk, which TensorFlow and ArrayRecord tell in a text only."""
    reason = os.strerror(errno.ENOSPC)
    if reason.lower() in str(error).lower():
        raise OSError(errno.ENOSPC, reason, str(place)) from error


def _download(name: str, builder: Any, manual_dir: str) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    manual = files.expand(manual_dir) if manual_dir else None
    if instructions and not (manual and manual.is_dir() and any(manual.iterdir())):
        raise UserError(
            f'some of its files must be downloaded by hand into the folder that '
            f'--config.tfds_manual_dir names ({manual_dir or "not given"}). '
            + ' '.join(instructions.split())
        )
    print(f'Preparing {name} in {builder.data_path} (once; it may be downloaded)', flush=True)
    # TFDS's ten attempts take minutes to say that there is no network; five take some seconds.
    downloader.MAX_RETRIES = 5
    config = tfds.download.DownloadConfig(manual_dir=manual)
    try:
        builder.download_and_prepare(file_format='array_record', download_config=config)
    except Exception as error:
        # Network errors are OSErrors as well, but they come without a file.
        if isinstance(error, OSError) and (
            error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        ):
            raise
        _raise_if_full(error, builder.data_path)
        request = getattr(error, 'request', None)  # of the errors of the package requests
        address = getattr(request, 'url', '')
        reason = next(iter(str(error).strip().splitlines()), '') or 'no reason given'
        reason = f'{address} cannot be reached' if address else f'{type(error).__name__}: {reason}'
        raise UserError(
            f'{reason}. If this machine has no network: run `python -m vit_jax.data.prepare '
            f'--dataset {name} --data_dir DIR` on one that has, copy DIR here and give '
            '--config.tfds_data_dir=DIR'
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the top of the file.

    Returns:
      The exit code: 0, or 1 after a `UserError`, whose message is printed or written to
        `--error_file`.
    """
    parser = argparse.ArgumentParser(
        prog='python -m vit_jax.data.prepare', description=__doc__.split('\n')[0]
    )
    parser.add_argument(
        '--dataset', required=True, help='name of a TFDS set: tf_flowers, name/config, name:version'
    )
    parser.add_argument(
        '--data_dir', default='', help='where TFDS sets are (default: ~/tensorflow_datasets)'
    )
    parser.add_argument(
        '--manual_dir', default='', help='where files that were downloaded by hand are'
    )
    parser.add_argument('--error_file', default='', help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    streams.guard(go_on=True)
    logging.getLogger('urllib3').setLevel(logging.ERROR)  # It reports every attempt to download.
    try:
        folder = prepare(options.dataset, data_dir=options.data_dir, manual_dir=options.manual_dir)
    except UserError as error:
        if options.error_file:
            pathlib.Path(options.error_file).write_text(str(error))
        else:
            print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'{options.dataset} is ready in {folder}', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
