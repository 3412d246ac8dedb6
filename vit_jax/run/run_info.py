"""What a run is: `config.json` and `versions.json` in its workdir."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

import vit_jax
from vit_jax import files

CONFIG_FILE = 'config.json'
VERSIONS_FILE = 'versions.json'

# The packages of which versions.json tells the versions: those of pyproject.toml, and those that
# these are made of. A list, because a checkout that is not installed knows no requirements.
_PACKAGES = (
    'absl-py', 'etils', 'filelock', 'flatbuffers', 'flax', 'fsspec', 'gcsfs', 'grain', 'jax',
    'jax-cuda12-plugin', 'jaxlib', 'jinja2', 'matplotlib', 'ml_collections', 'numpy', 'onnx',
    'onnxruntime', 'opencv-python-headless', 'optax', 'optuna', 'orbax-checkpoint', 'pillow',
    'pillow-heif', 'protobuf', 'pyarrow', 'rich', 's3fs', 'safetensors', 'scikit-learn',
    'scipy', 'sentencepiece', 'simplejpeg', 'tensorboard', 'tensorflow-cpu',
    'tensorflow-datasets', 'threadpoolctl', 'tokenizers',
)  # fmt: skip


def write(
    workdir: str | os.PathLike,
    config: ml_collections.ConfigDict | Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes `config.json` and `versions.json` into the workdir.

    The latter holds the versions of Python and the packages, the git revision and the command line.
    Only the first process should call it.

    Args:
      workdir: folder of the run; made if it does not exist.
      config: the configuration with every value filled in.
      others: more to write, by file name.

    Raises:
      TypeError: a value of the configuration has no JSON form.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    config = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    files.write_json(workdir / CONFIG_FILE, config)
    for name, value in (others or {}).items():
        files.write_json(workdir / name, value)
    files.write_json(
        workdir / VERSIONS_FILE,
        {
            'command': shlex.join([os.path.basename(sys.executable), *sys.orig_argv[1:]]),
            'git_revision': _git_revision(),
            'python': platform.python_version(),
            'platform': platform.platform(),
            'packages': _package_versions(),
        },
    )


def _git_revision() -> str | None:
    """The commit of the checkout this package runs from (`-dirty` if files differ), or None."""
    root = pathlib.Path(__file__).resolve().parents[2]
    # Installed into an environment, the package may lie in a checkout of something else.
    if not (root / '.git').exists():
        return None
    words = ('describe', '--always', '--abbrev=40', '--exclude=*', '--dirty')
    try:
        described = subprocess.run(
            ['git', '-C', str(root), *words], capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None  # no git, or no commit yet
    return described.stdout.strip()


def _package_versions() -> dict[str, str]:
    """Versions of this package and of those of `_PACKAGES` that are installed."""
    versions = {'vit_jax': vit_jax.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
