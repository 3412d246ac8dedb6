"""What input weights were made for: what their folder says of it, or is known of their family.

Mean and deviation go into the first layer (`formats.open_weights`); how an image becomes pixels is
a `Preprocess`, which predicting, evaluating and exporting use.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.checkpoint.arrays import Weights, derive
from vit_jax.checkpoint.resize import resize_position_embedding_bicubic
from vit_jax.data import resample
from vit_jax.data.normalization import CLIP, HALF, IMAGENET, NORMALIZATIONS, Normalization
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.variants import in_words, prefix_positions, sides, token_grid

_SQUARE, _SHORT = {'height': 224, 'width': 224}, {'shortest_edge': 224}
_CENTRE = {'do_center_crop': True, 'crop_size': 224}


def _scaled(normalization: Normalization) -> dict[str, Any]:
    return dict(zip(('image_mean', 'image_std'), normalization, strict=True))


# What transformers 5.23 has for the keys that a preprocessor_config.json leaves out, by the class
# that it names; `int_is_short`: a size of one number is that of the short side.
_PROCESSORS: dict[str, dict[str, Any]] = {
    'ViT': {'resample': 2, 'size': _SQUARE, **_scaled(HALF)},
    'DeiT': {'resample': 3, 'size': {'height': 256, 'width': 256}, **_scaled(HALF), **_CENTRE},
    'Siglip': {'resample': 3, 'size': _SQUARE, **_scaled(HALF), 'int_is_short': True},
    'DINOv3ViT': {'resample': 2, 'size': _SQUARE, **_scaled(IMAGENET)},
    **dict.fromkeys(
        ('CLIP', 'Bit'),
        {'resample': 3, 'size': _SHORT, **_scaled(CLIP), **_CENTRE, 'int_is_short': True},
    ),
}
# The processor that the models of a type come with, and the normalisation that their files state.
_FAMILIES: dict[str, tuple[str, Normalization]] = {
    'vit': ('ViT', HALF),
    'deit': ('DeiT', IMAGENET),
    'vit_mae': ('ViT', IMAGENET),
    'vit_msn': ('ViT', IMAGENET),
    'ijepa': ('ViT', IMAGENET),
    'dinov2': ('Bit', IMAGENET),
    'dinov2_with_registers': ('Bit', IMAGENET),
    'dinov3_vit': ('DINOv3ViT', IMAGENET),
    'clip': ('CLIP', CLIP),
    'clip_vision_model': ('CLIP', CLIP),
    'siglip': ('Siglip', HALF),
    'siglip_vision_model': ('Siglip', HALF),
}
# Settings of a processor that change pixels, and the only values that are computed here.
_FIXED = {
    'do_pad': False,
    'do_flip_channel_order': False,
    'rescale_offset': False,
    'offset': False,
    'crop_pct': None,
}


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """What is known of the input of a model.

    Attributes:
      image_size: side or (height, width) of the images, pixels; 0 where nothing tells.
      normalization: of the channels; None where nothing tells.
      preprocess: from decoded images to pixels; None where nothing tells, or `refused` says why.
      refused: what is stated and not computed here; '' if there is nothing.
      notes: what is to be known, a sentence each.
      resizes: how the model's class fits its positions to images of another size, see
        `hugging_face_families.Family`; `preprocess` may be of another size than `image_size` then.
    """

    image_size: int | tuple[int, int] = 0
    normalization: Normalization | None = None
    preprocess: Preprocess | None = None
    refused: str = ''
    notes: tuple[str, ...] = ()
    resizes: str = ''


def of_timm(config: Mapping[str, Any]) -> ModelInput:
    """Reads the config.json of a timm folder, by the rules of timm 1.0.31's `data.config`."""
    stated = config.get('pretrained_cfg') or config
    arguments = config.get('model_args') or {}
    told = arguments.get('img_size') or tuple(stated.get('input_size') or ())[1:]
    image_size, size = (_size(told), _size(told)) if told else (0, 224)
    notes: tuple[str, ...] = ()
    if stated.get('mean') and stated.get('std'):
        normalization: Normalization = (tuple(stated['mean']), tuple(stated['std']))
    else:
        name = str(config.get('architecture', ''))
        imagenet = 'pretrained_cfg' in config or name.startswith('deit')
        normalization = IMAGENET if imagenet else HALF
        notes = (f'its config.json has no mean and std: {_words(normalization)} is assumed',)
    interpolation = stated.get('interpolation') or 'bicubic'
    mode, share = stated.get('crop_mode') or 'center', stated.get('crop_pct') or 0.875
    if mode not in ('center', 'squash') or interpolation not in resample.INTERPOLATIONS:
        refused = f'crop_mode {mode!r} and interpolation {interpolation!r} of its config.json'
        return ModelInput(image_size, normalization, refused=refused, notes=notes)
    height, width = (math.floor(side / float(share)) for side in sides(size))
    resize = height, width
    whole = mode == 'squash' and resize == sides(size)
    try:
        preprocess = Preprocess(
            size,
            0 if whole else resize,
            eval='squash' if whole else {'squash': 'squash_crop', 'center': 'resize_crop'}[mode],
            interpolation=interpolation,
            antialias=True,
            centre='half_even',
        )
    except UserError as why:
        return ModelInput(image_size, normalization, refused=str(why), notes=notes)
    return ModelInput(image_size, normalization, preprocess, notes=notes)


def of_hugging_face(
    folder: pathlib.Path, config: Mapping[str, Any], resizes: str = ''
) -> ModelInput:
    """Reads preprocessor_config.json of a folder, by the rules of transformers 5.23.

    Args:
      folder: that it is in, or not.
      config: the model's config.json (of a model of two towers, the image tower's).
      resizes: how the model's class fits its positions to images of another size, or ''.
    """
    size = _size(config['image_size']) if config.get('image_size') else 0
    kind, known = _FAMILIES.get(str(config.get('model_type')), ('ViT', HALF))
    found, unknown = _processor(folder), ''
    notes: tuple[str, ...] = ()
    if found is None:
        found = _scaled(known)
        notes = (
            f'it has no preprocessor_config.json: {_words(known)}, as most models of its type have '
            'it, is assumed (--normalization for another)',
        )
    else:
        name = str(found.get('image_processor_type') or found.get('feature_extractor_type') or '')
        stem = name
        for ending in ('Fast', 'Pil', 'ImageProcessor', 'FeatureExtractor'):
            stem = stem.removesuffix(ending)
        unknown = '' if stem in ('', *_PROCESSORS) else f'the image processor {name[:100]!r}'
        kind = stem if stem in _PROCESSORS else kind
    settings = _PROCESSORS[kind] | found
    for key, value in _FIXED.items():
        if settings.get(key, value) != value:
            raise UserError(
                f'{folder}: its preprocessor_config.json has {key}={settings[key]!r}, which is not '
                'computed here. Preprocess as it says, and keep the parameters with '
                'checkpoint.save'
            )
    normalization = _hugging_face_normalization(settings)
    try:
        if unknown:
            raise _UnknownError(f'{unknown} of its preprocessor_config.json')
        preprocess, more = _hugging_face_pixels(settings, 0 if resizes else size)
    except (_UnknownError, UserError) as why:
        return ModelInput(size, normalization, refused=str(why), notes=notes)
    # Of what is assumed, the size of the images is not.
    if size and notes:
        preprocess = preprocess.at(size)
    return ModelInput(size, normalization, preprocess, notes=notes or more, resizes=resizes)


def of_torchvision(config: Mapping[str, Any]) -> ModelInput:
    """Reads the config.json that `export` writes beside weights for torchvision."""
    size = _size((config.get('arguments') or {}).get('image_size', 0))
    normalization = (tuple(config['mean']), tuple(config['std']))
    told = config.get('preprocessing')
    return ModelInput(size, normalization, Preprocess.from_dict(told) if told else None)


def exact(told: ModelInput, ours: ModelInput) -> ModelInput:
    """What a folder tells that `export` wrote, in whose header of weights stands what was meant.

    The configurations of other libraries have no word for images that are not antialiased. Where
    that is all that differs, the header counts; else somebody has changed the configuration since.
    """
    if told.preprocess is None or ours.preprocess is None:
        return told
    as_told = {name: getattr(told.preprocess, name) for name in ('antialias', 'centre')}
    same = dataclasses.replace(ours.preprocess, inception_crop=True, **as_told) == told.preprocess
    return dataclasses.replace(told, preprocess=ours.preprocess) if same else told


def fit_positions(
    weights: Weights,
    config: Mapping[str, Any],
    image_size: int | tuple[int, int],
    *,
    resize: bool,
) -> tuple[Weights, int | tuple[int, int]]:
    """Makes positions and images of one size, where a folder has two and its class resizes.

    Args:
      weights: of a folder.
      config: arguments of the model.
      image_size: that its positions are for.
      resize: resize the positions, as the class does; else images are made as large as these.

    Returns:
      (the weights, their note included; the size of the images).
    """
    made = weights.preprocess
    if not (weights.resizes and made) or made.crop == image_size:
        return weights, image_size
    encoder = weights.params['Transformer']
    rotary = 'posembed_input' not in encoder  # which fit any image
    note = (
        f'its images have {in_words(made.crop)} pixels, its positions are those of '
        f'{in_words(image_size)}: '
    )
    if not (resize or rotary):
        note += 'they stay so, and images are made as large'
        return dataclasses.replace(weights, notes=(*weights.notes, note)), image_size
    try:
        grids = [token_grid(config, size) for size in (made.crop, image_size)]
    except ValueError as error:
        raise UserError(
            f'{weights.path}: its preprocessor_config.json makes images of {in_words(made.crop)} '
            f'pixels, which {" ".join(error.args)} (crop_size there, or size)'
        ) from error
    if rotary:
        return dataclasses.replace(weights, image_size=made.crop), made.crop
    prefix, antialias = prefix_positions(config), weights.resizes.endswith('antialiased')

    def resized(rows: np.ndarray) -> np.ndarray:
        patches = resize_position_embedding_bicubic(rows[:, prefix:], *grids, antialias=antialias)
        return np.concatenate([rows[:, :prefix], patches], axis=1)

    rows = derive(resized, encoder['posembed_input']['pos_embedding'])
    encoder = {**encoder, 'posembed_input': {'pos_embedding': rows}}
    note += f'these are resized ({weights.resizes}), as its class does'
    weights = dataclasses.replace(
        weights,
        params={**weights.params, 'Transformer': encoder},
        notes=(*weights.notes, note),
        image_size=made.crop,
    )
    return weights, made.crop


class _UnknownError(Exception):
    """Pixels that are not computed here; the message says which."""


def _processor(folder: pathlib.Path) -> dict[str, Any] | None:
    """The settings of the image processor; of a processor of images and text its part."""
    places = (('processor_config.json', 'image_processor'), ('preprocessor_config.json', ''))
    for name, key in places:
        if (folder / name).is_file():
            stored = files.read_json(folder / name)
            found = stored.get(key) if key else stored
            if isinstance(found, dict):
                return found
    return None


def _hugging_face_normalization(settings: Mapping[str, Any]) -> Normalization:
    """(p f - mean) / std of grey levels p, in units of white: f is 1 / 255 unless it is stated."""
    factor = 255 * float(settings.get('rescale_factor', 1 / 255))
    if not settings.get('do_rescale', True):
        factor = 255.0
    if math.isclose(factor, 1, rel_tol=1e-6):
        factor = 1.0
    mean, std = settings['image_mean'], settings['image_std']
    if not settings.get('do_normalize', True):
        mean, std = 0.0, 1.0
    mean, std = (
        tuple(map(float, v)) if isinstance(v, list | tuple) else (float(v),) * 3
        for v in (mean, std)
    )
    return tuple(m / factor for m in mean), tuple(s / factor for s in std)


def _hugging_face_pixels(
    settings: Mapping[str, Any], image_size: int | tuple[int, int]
) -> tuple[Preprocess, tuple[str, ...]]:
    """(from decoded images to pixels, notes) for a model of this size; 0: nothing tells it."""
    number = settings['resample']
    if type(number) is not int or not 0 <= number < len(resample.INTERPOLATIONS):
        raise _UnknownError(f'resample {number!r} of its preprocessor_config.json')
    crops = settings.get('do_center_crop', False)
    size, kept, notes = settings['size'], False, []
    if isinstance(size, dict):
        kept = 'shortest_edge' in size
        if set(size) not in ({'shortest_edge'}, {'height', 'width'}):
            raise _UnknownError(f'size {size!r} of its preprocessor_config.json')
        size = size['shortest_edge'] if kept else (size['height'], size['width'])
    elif isinstance(size, int):
        kept = settings.get('int_is_short', False)
    elif not isinstance(size, list):
        raise _UnknownError(f'size {size!r} of its preprocessor_config.json')
    resize = _size(size)
    crop = settings.get('crop_size') if crops else resize
    crop = _size((crop['height'], crop['width']) if isinstance(crop, dict) else crop)
    if not settings.get('do_resize', True):
        if crops:
            raise _UnknownError(
                'do_resize=false with do_center_crop of its preprocessor_config.json'
            )
        kept = False
        notes.append(
            'its preprocessor_config.json resizes nothing: images of another size are squashed'
        )
    elif kept and not crops:
        raise _UnknownError('size.shortest_edge without do_center_crop, which keeps no size,')
    whole = not kept and crop == resize
    preprocess = Preprocess(
        crop,
        0 if whole else resize,
        eval='squash' if whole else 'resize_crop' if kept else 'squash_crop',
        interpolation=resample.INTERPOLATIONS[number],
        antialias=True,
    )
    if image_size and image_size != crop:
        notes.append(
            f'its preprocessor_config.json makes images of {in_words(crop)} pixels and the model '
            f'takes {in_words(image_size)}: the same is done at that size'
        )
        preprocess = preprocess.at(image_size)
    return preprocess, tuple(notes)


def _size(size: Any) -> int | tuple[int, int]:
    """A side, or (height, width), as JSON has them."""
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    height, width = (int(side) for side in pair)
    return height if height == width else (height, width)


def _words(normalization: Normalization) -> str:
    name = next((k for k, v in NORMALIZATIONS.items() if v == normalization), '')
    named = {'half': 'input in [-1, 1]', 'imagenet': "ImageNet's mean and deviation"}
    return named.get(name) or "OpenAI CLIP's mean and deviation"


def to_timm(preprocess: Preprocess) -> dict[str, Any]:
    """How evaluation makes pixels, in the words of timm's `pretrained_cfg`.

    Its resizing is always antialiased, and there is no word for that.

    Raises:
      UserError: timm does not compute it.
    """
    resize = sides(preprocess.resize or preprocess.crop)
    if preprocess.eval == 'squash':
        resize = preprocess.size
    share = preprocess.size[0] / resize[0]
    shares = (share, math.nextafter(share, 0), math.nextafter(share, 1))
    for crop_pct in shares:
        if tuple(math.floor(side / crop_pct) for side in preprocess.size) == resize:
            return {
                'interpolation': preprocess.interpolation,
                'crop_pct': crop_pct,
                'crop_mode': 'center' if preprocess.eval == 'resize_crop' else 'squash',
            }
    raise UserError(
        f'timm has one crop_pct for height and width, and this model sees {preprocess.describe()}: '
        'choose another form with --eval'
    )


def to_hugging_face(preprocess: Preprocess, channels: int = 3) -> dict[str, Any]:
    """How evaluation makes pixels, as a preprocessor_config.json for input in [-1, 1].

    Its resizing is always antialiased, and there is no word for that.

    Raises:
      UserError: transformers does not compute it.
    """
    resize = preprocess.resize or preprocess.crop
    if preprocess.eval == 'squash':
        resize = preprocess.crop
    height, width = sides(resize)
    size = {'height': height, 'width': width}
    if preprocess.eval == 'resize_crop':
        if height != width:
            raise UserError(
                f'transformers has no word for images that are scaled to cover {in_words(resize)} '
                'pixels: choose another form with --eval, or one number with --resize'
            )
        size = {'shortest_edge': height}
    crops = preprocess.eval != 'squash'
    crop = dict(zip(('height', 'width'), preprocess.size, strict=True))
    return {
        # The ViT's of transformers 4 ignores a crop.
        'image_processor_type': 'CLIPImageProcessor' if crops else 'ViTImageProcessor',
        'do_resize': True,
        'size': size,
        'resample': resample.INTERPOLATIONS.index(preprocess.interpolation),
        **({'do_center_crop': True, 'crop_size': crop} if crops else {}),
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': [0.5] * channels,
        'image_std': [0.5] * channels,
    }
