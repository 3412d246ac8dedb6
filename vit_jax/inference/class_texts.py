"""Texts that stand for classes: prompts, and the embeddings of classes, which are kept on disk."""

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import vit_jax
from vit_jax import files
from vit_jax.checkpoint import npz
from vit_jax.data import remote
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.inference.two_tower import TwoTowers

_log = logging.getLogger(__name__)

# Of the paper's evaluation, one prompt; {} stands for the name of a class.
PROMPTS = ('a photo of a {}',)
# CLIP's 80 for ImageNet, in its order: https://github.com/openai/CLIP (MIT licence),
# notebooks/Prompt_Engineering_for_ImageNet.ipynb.
CLIP80 = (
    'a bad photo of a {}.',
    'a photo of many {}.',
    'a sculpture of a {}.',
    'a photo of the hard to see {}.',
    'a low resolution photo of the {}.',
    'a rendering of a {}.',
    'graffiti of a {}.',
    'a bad photo of the {}.',
    'a cropped photo of the {}.',
    'a tattoo of a {}.',
    'the embroidered {}.',
    'a photo of a hard to see {}.',
    'a bright photo of a {}.',
    'a photo of a clean {}.',
    'a photo of a dirty {}.',
    'a dark photo of the {}.',
    'a drawing of a {}.',
    'a photo of my {}.',
    'the plastic {}.',
    'a photo of the cool {}.',
    'a close-up photo of a {}.',
    'a black and white photo of the {}.',
    'a painting of the {}.',
    'a painting of a {}.',
    'a pixelated photo of the {}.',
    'a sculpture of the {}.',
    'a bright photo of the {}.',
    'a cropped photo of a {}.',
    'a plastic {}.',
    'a photo of the dirty {}.',
    'a jpeg corrupted photo of a {}.',
    'a blurry photo of the {}.',
    'a photo of the {}.',
    'a good photo of the {}.',
    'a rendering of the {}.',
    'a {} in a video game.',
    'a photo of one {}.',
    'a doodle of a {}.',
    'a close-up photo of the {}.',
    'a photo of a {}.',
    'the origami {}.',
    'the {} in a video game.',
    'a sketch of a {}.',
    'a doodle of the {}.',
    'a origami {}.',
    'a low resolution photo of a {}.',
    'the toy {}.',
    'a rendition of the {}.',
    'a photo of the clean {}.',
    'a photo of a large {}.',
    'a rendition of a {}.',
    'a photo of a nice {}.',
    'a photo of a weird {}.',
    'a blurry photo of a {}.',
    'a cartoon {}.',
    'art of a {}.',
    'a sketch of the {}.',
    'a embroidered {}.',
    'a pixelated photo of a {}.',
    'itap of the {}.',
    'a jpeg corrupted photo of the {}.',
    'a good photo of a {}.',
    'a plushie {}.',
    'a photo of the nice {}.',
    'a photo of the small {}.',
    'a photo of the weird {}.',
    'the cartoon {}.',
    'art of the {}.',
    'a drawing of the {}.',
    'a photo of the large {}.',
    'a black and white photo of a {}.',
    'the plushie {}.',
    'a dark photo of a {}.',
    'itap of a {}.',
    'graffiti of the {}.',
    'a toy {}.',
    'itap of my {}.',
    'a photo of a cool {}.',
    'a photo of a small {}.',
    'a tattoo of the {}.',
)
NAMED = {'clip80': CLIP80}
_MAX_PROMPTS = 10_000


def read_prompts(words: str) -> tuple[str, ...]:
    """The prompts that a user means.

    Args:
      words: a prompt with {} in the place of the name; a name in `NAMED`; a file of prompts, one
        per line; '' for `PROMPTS`.

    Raises:
      UserError: it is none of these.
    """
    if not words:
        return PROMPTS
    if words in NAMED:
        return NAMED[words]
    if '{}' in words:
        return (words,)
    if not files.expand(words).is_file():
        raise UserError(
            f'{words!r} is no prompt, which has {{}} in the place of the name, no file of prompts, '
            f'and none of {", ".join(NAMED)}'
        )
    lines = [line.strip() for line in files.read_text(files.expand(words)).splitlines()]
    found = tuple(line for line in lines if line)
    if not 1 <= len(found) <= _MAX_PROMPTS:
        raise UserError(f'{words} has {len(found):,} prompts; expected 1 to {_MAX_PROMPTS:,}')
    return found


def embed_classes(
    towers: 'TwoTowers', class_names: Sequence[str], prompts: Sequence[str], *, cache: bool
) -> np.ndarray:
    """What images are compared with: of each class the mean of its prompts, of length 1.

    As in CLIP (https://arxiv.org/abs/2103.00020, section 3.1.4): the embedding of each prompt has
    length 1, and so has the mean of them in the end.

    Args:
      towers: the model.
      class_names: the classes.
      prompts: texts with {} in the place of the name.
      cache: whether the result is kept in the cache folder (`remote.cache_folder()/texts`), and
        taken from there where model, names and prompts are the same.

    Returns:
      float32 [classes, C].

    Raises:
      UserError: a prompt without {}.
    """
    for prompt in prompts:
        if '{}' not in prompt:
            raise UserError(f'a prompt has {{}} in the place of the name; {prompt!r} has not')
    file = None
    if cache:
        key = _key(towers, class_names, prompts)
        file = remote.cache_folder() / 'texts' / f'{key}.npz'
        if (found := _read(file, len(class_names))) is not None:
            return found
    texts = [prompt.replace('{}', name) for name in class_names for prompt in prompts]
    each = towers.embed_texts(texts).reshape(len(class_names), len(prompts), -1)
    classes = each.mean(1)
    classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
    if file is not None:
        _write(file, classes)
    return classes


def _key(towers: 'TwoTowers', class_names: Sequence[str], prompts: Sequence[str]) -> str:
    """Tells apart all that the embeddings depend on."""
    model, digest = towers.model, hashlib.sha256()
    told: Any = [model.text_model, model.text, model.sizes[1], model.pp, str(model.dtype)]
    told += [vit_jax.__version__, list(class_names), list(prompts)]
    digest.update(repr(told).encode('utf-8', 'surrogatepass'))
    digest.update(towers.vocabulary.read_bytes())
    for name, array in sorted(npz.flatten(towers.params['txt']).items()):
        digest.update(f'{name} {array.shape}'.encode())
        digest.update(np.ascontiguousarray(array, np.float32).data)
    return digest.hexdigest()


def _read(file: os.PathLike[str], classes: int) -> np.ndarray | None:
    """What `_write` wrote; None where there is nothing that can be used."""
    if not os.path.isfile(file):
        return None
    try:
        found = np.asarray(npz.open_file(file, whole=True).read()['classes'])
    except (UserError, KeyError) as error:
        _log.warning('%s is damaged and made anew (%s)', file, error)
        return None
    lengths = np.linalg.norm(found, axis=-1) if found.ndim == 2 else np.zeros(1)
    if len(found) != classes or not np.allclose(lengths, 1, atol=1e-3):
        _log.warning('%s is damaged and made anew', file)
        return None
    return found


def _write(file: Any, classes: np.ndarray) -> None:
    """Keeps embeddings; where the folder cannot be written, it says so and goes on."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        npz.save(file, {'classes': classes})
    except (OSError, UserError) as error:
        _log.warning('the embeddings of the texts are not kept: %s', error)
