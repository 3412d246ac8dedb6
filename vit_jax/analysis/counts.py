"""Parameters and multiply-accumulates of an architecture, by formula.

Nothing is built, traced or loaded: it takes about a millisecond. The
formulas give exactly the arrays of the real modules, which the tests hold against `jax.eval_shape`
for every variant; multiply-accumulates are those of convolutions and matrix products.

Letters: S size of the image, P patch size, N patches, T tokens (N and the class token, if any), D
width, M hidden width of the MLP, H heads, L blocks, C classes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vit_jax import variants
from vit_jax.errors import UserError

Shape = tuple[int, ...]
ImageSize = int | tuple[int, int]  # the side, or (height, width), pixels


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
      name: what it is, such as 'block'.
      shapes: of the arrays of parameters in one repetition.
      macs: multiply-accumulates of one repetition, for one image.
      repeat: how many of them there are.
      weightless_macs: those of `macs` whose factors are both activations (the two products of
        attention).
      last_macs: those of `macs` of the last matrix product, whose result no gradient needs.
    """

    name: str
    shapes: tuple[Shape, ...]
    macs: int = 0
    repeat: int = 1
    weightless_macs: int = 0
    last_macs: int = 0

    @property
    def parameters(self) -> int:
        """Parameters in all repetitions."""
        return self.repeat * sum(math.prod(shape) for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of a hybrid's ResNet: its kernel's shape, its output's height and width."""

    kernel: Shape
    size: tuple[int, int]

    @property
    def outputs(self) -> int:
        """Numbers in its output, for one image."""
        return math.prod(self.size) * self.kernel[-1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return math.prod(self.size) * math.prod(self.kernel)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers that the formulas are about, see the letters above.

    Attributes:
      tokens: T, the sequence that the blocks work on.
      patches: N.
      width: D.
      hidden: M, hidden width of the MLP (of a Mixer: over channels).
      heads: H; of a Mixer 0.
      blocks: L.
      tokens_hidden: hidden width of a Mixer's MLP over tokens; of a ViT 0.
    """

    tokens: int
    patches: int
    width: int
    hidden: int
    heads: int
    blocks: int
    tokens_hidden: int = 0


def sizes(model_config: Mapping[str, Any], image_size: ImageSize) -> Sizes:
    """The sizes of an architecture at an image size.

    Args:
      model_config: see `variants.get_config`.
      image_size: side or (height, width) of the images, pixels.

    Raises:
      UserError: the image is not a whole number of patches.
    """
    try:
        grid = variants.token_grid(model_config, image_size)
    except ValueError as error:
        raise UserError(
            f'image size {variants.in_words(image_size)}: '
            f'{model_config.get("model_name") or "the model"} takes multiples of '
            f'{variants.in_words(variants.token_stride(model_config))} pixels: use {error.args[1]}'
        ) from error
    patches = grid[0] * grid[1]
    if variants.is_mixer(model_config):
        return Sizes(
            patches,
            patches,
            model_config['hidden_dim'],
            model_config['channels_mlp_dim'],
            0,
            model_config['num_blocks'],
            model_config['tokens_mlp_dim'],
        )
    transformer = model_config['transformer']
    return Sizes(
        patches + variants.prefix_tokens(model_config),
        patches,
        model_config['hidden_size'],
        transformer['mlp_dim'],
        transformer['num_heads'],
        transformer['num_layers'],
    )


def parts(
    model_config: Mapping[str, Any], num_classes: int, image_size: ImageSize, channels: int = 3
) -> tuple[Part, ...]:
    """Everything a model consists of, in the order of the computation.

    Args:
      model_config: see `variants.get_config`.
      num_classes: C; 0 for a model without a head.
      image_size: S, pixels.
      channels: of the image.

    Returns:
      Parts that together have every parameter once.

    Raises:
      UserError: the image is not a whole number of patches.
    """
    s = sizes(model_config, image_size)
    if variants.is_mixer(model_config):
        return _mixer(model_config, s, num_classes, channels)
    return _vit(model_config, s, num_classes, image_size, channels)


def parameters(
    model_config: Mapping[str, Any], num_classes: int, image_size: ImageSize, channels: int = 3
) -> int:
    """How many parameters a model has; arguments as for `parts`."""
    return sum(part.parameters for part in parts(model_config, num_classes, image_size, channels))


def forward_macs(
    model_config: Mapping[str, Any], num_classes: int, image_size: ImageSize, channels: int = 3
) -> int:
    """Multiply-accumulates of one image's forward pass; arguments as for `parts`.

    ViT: N 3P^2 D + L (T (4D^2 + 2DM) + 2T^2 D) + DC. Norms, softmax, GELU and additions are not
    counted; they are 0.4 % of B/16's work and 1.3 % of Ti/16's.
    """
    return sum(
        part.repeat * part.macs for part in parts(model_config, num_classes, image_size, channels)
    )


def training_macs(
    model_config: Mapping[str, Any],
    num_classes: int,
    image_size: ImageSize,
    remat: str = '',
    channels: int = 3,
) -> int:
    """Multiply-accumulates of one image's training step; other arguments as for `parts`.

    Each product costs two more in the backward pass: the gradients of its two factors. The first
    layer needs only one, since the gradient of the image is not computed. Rematerialisation
    'full' repeats the blocks but for their last product, 'dots' the two products of attention.

    Args:
      model_config: see `parts`.
      num_classes: see `parts`.
      image_size: see `parts`.
      remat: see `models.encoder.Encoder`.
      channels: see `parts`.
    """
    total = 0
    for index, part in enumerate(parts(model_config, num_classes, image_size, channels)):
        macs = 3 * part.macs
        if index == 0:
            macs -= part.macs
        if remat == 'full' and part.name in ('block', 'residual unit'):
            macs += part.macs - part.last_macs
        if remat == 'dots' and part.name == 'block':
            macs += part.weightless_macs
        if remat == 'dots' and part.name == 'residual unit':
            macs += part.macs - part.last_macs  # convolutions are not kept by this policy
        total += part.repeat * macs
    return total


def unused_macs(
    model_config: Mapping[str, Any],
    image_size: ImageSize,
    *,
    training: bool = False,
    remat: str = '',
) -> int:
    """Multiply-accumulates for one image that belong to the architecture but are not done.

    Where only the first tokens are read in the end, nothing depends on what the last block makes of
    the others but their keys and values (see `models.encoder.Encoder`). `forward_macs` and
    `training_macs` count the whole, as published figures do.

    Args:
      model_config: see `parts`.
      image_size: see `parts`.
      training: of a training step; else of a forward pass.
      remat: of the training step, see `models.encoder.Encoder`.
    """
    if variants.is_mixer(model_config) or model_config.get('classifier', 'token') != 'token':
        return 0
    s = sizes(model_config, image_size)
    left_out = s.tokens - (2 if model_config.get('distilled') else 1)
    products = 2 * left_out * s.tokens * s.width
    last = left_out * s.width * s.hidden
    inner = 3 if model_config['transformer'].get('gated_mlp') else 2
    macs = left_out * 2 * s.width**2 + products + inner * last
    if not training:
        return macs
    return 3 * macs + {'full': macs - last, 'dots': products}.get(remat, 0)


def convolutions(
    model_config: Mapping[str, Any], image_size: ImageSize, channels: int = 3
) -> list[list[Convolution]]:
    """The convolutions of a hybrid's ResNet: the root, then one list per residual unit.

    Args:
      model_config: see `variants.get_config`; an architecture without ResNet has none.
      image_size: S, pixels.
      channels: of the image.
    """
    resnet = model_config.get('resnet')
    if not resnet:
        return []
    width = int(64 * resnet['width_factor'])
    size = _half(variants.sides(image_size))
    groups = [[Convolution((7, 7, channels, width), size)]]
    size, features = _half(size), width  # after the pooling
    for stage, units in enumerate(resnet['num_layers']):
        for unit in range(units):
            before, size = size, _half(size) if stage and not unit else size
            shapes = (1, 1, width, features), (3, 3, features, features)
            group = [Convolution(shapes[0], before), Convolution(shapes[1], size)]
            group.append(Convolution((1, 1, features, 4 * features), size))
            if width != 4 * features or before != size:  # the projection of the shortcut
                group.insert(0, Convolution((1, 1, width, 4 * features), size))
            groups.append(group)
            width = 4 * features
        features *= 2
    return groups


def _half(size: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // 2), -(-size[1] // 2)


def _vit(
    config: Mapping[str, Any], s: Sizes, num_classes: int, image_size: ImageSize, channels: int
) -> tuple[Part, ...]:
    d = s.width
    found = []
    for i, group in enumerate(convolutions(config, image_size, channels)):
        # Each convolution has a GroupNorm (scale and bias) behind it.
        shapes = tuple(x for c in group for x in (c.kernel, c.kernel[-1:], c.kernel[-1:]))
        name = 'residual unit' if i else 'ResNet root'
        found.append(Part(name, shapes, sum(c.macs for c in group)))
        channels = group[-1].kernel[-1]
    patch = (*config['patches']['size'], channels)
    bias = ((d,),) * config.get('patch_bias', True)
    found.append(Part('patch embedding', ((*patch, d), *bias), s.patches * math.prod(patch) * d))
    front = variants.tokens_in_front(config)
    words = {'cls': 'class', 'dist': 'distillation', 'registers': 'register'}
    if front:
        name = f'{" and ".join(words[token] for token in front)} token'
        found.append(Part(name, tuple((1, count, d) for count in front.values())))
    encoder = config['transformer']
    if encoder.get('add_position_embedding', True):
        positions = s.patches + variants.prefix_positions(config)
        found.append(Part('position embedding', ((1, positions, d),)))
    norm = ((d,), (d,))
    if encoder.get('pre_norm'):
        found.append(Part('pre-norm', norm))
    found.append(_block(encoder, s))
    if config.get('final_norm', True) and not config.get('fc_norm'):
        found.append(Part('norm', norm))
    classifier = config.get('classifier', 'token')
    read = {'unpooled': s.patches, 'token_unpooled': 1 + s.patches}.get(classifier, 1)
    width = variants.pooled_width(config)
    if classifier == 'map':
        found.append(_map_head(s))
    if config.get('fc_norm'):
        found.append(Part('norm', ((width,), (width,))))

    def dense(name: str, inputs: int, outputs: int, repeat: int = 1) -> None:
        shapes = ((inputs, outputs), (outputs,))
        found.append(Part(name, shapes, read * inputs * outputs, repeat))

    features = config.get('representation_size') or width
    if config.get('representation_size'):
        dense('pre_logits', width, features)
    if num_classes and config.get('mlp_head'):
        dense('hidden layer of the head', features, d)
        features = d
    if num_classes:
        dense('head', features, num_classes, 2 if config.get('distilled') else 1)
    return tuple(found)


def _block(encoder: Mapping[str, Any], s: Sizes) -> Part:
    """A block of a ViT."""
    d, m, t = s.width, s.hidden, s.tokens
    shapes = ((d,),) * 4 + _attention(s, encoder.get('qkv_bias', 'qkv')) + _mlp(s)
    inner = 2  # matrix products of the MLP
    if encoder.get('mlp_norm'):
        shapes += ((m,),) * 2
    if encoder.get('attention_norm'):
        shapes += ((d,),) * 2
    if encoder.get('layer_scale'):
        shapes += ((d,),) * 2
    if encoder.get('qk_norm'):
        shapes += ((d // s.heads,),) * 4
    if encoder.get('gated_mlp'):
        shapes += ((d, m), (m,))
        inner = 3
    products, last = 2 * t * t * d, t * d * m  # of attention; of the MLP's second layer
    macs = 4 * t * d * d + products + inner * last
    return Part('block', shapes, macs, s.blocks, weightless_macs=products, last_macs=last)


def _attention(s: Sizes, biases: str = 'qkv') -> tuple[Shape, ...]:
    heads = (s.heads, s.width // s.heads)
    return ((s.width, *heads),) * 3 + (heads,) * len(biases) + ((*heads, s.width), (s.width,))


def _mlp(s: Sizes) -> tuple[Shape, ...]:
    return (s.width, s.hidden), (s.hidden,), (s.hidden, s.width), (s.width,)


def _map_head(s: Sizes) -> Part:
    """Attention pooling of the patches with one query, and its MLP."""
    d, n = s.width, s.patches
    shapes = ((1, 1, d), (d,), (d,)) + _attention(s) + _mlp(s)
    products = 2 * n * d
    macs = 2 * d * d + 2 * n * d * d + products + 2 * d * s.hidden
    return Part('attention pooling', shapes, macs, weightless_macs=products)


def _mixer(
    config: Mapping[str, Any], s: Sizes, num_classes: int, channels: int
) -> tuple[Part, ...]:
    d, m, n, h = s.width, s.hidden, s.patches, s.tokens_hidden
    patch = tuple(config['patches']['size'])
    block = ((d,),) * 4 + ((n, h), (h,), (h, n), (n,), (d, m), (m,), (m, d), (d,))
    found = [
        Part('patch embedding', ((*patch, channels, d), (d,)), n * math.prod(patch) * channels * d),
        Part('block', block, 2 * d * n * h + 2 * n * d * m, s.blocks, last_macs=n * d * m),
        Part('norm', ((d,), (d,))),
    ]
    if num_classes:
        found.append(Part('head', ((d, num_classes), (num_classes,)), d * num_classes))
    return tuple(found)
