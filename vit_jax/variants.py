"""The table of models: every name, and what it is made of.

Sizes are those of the ViT paper (Table 1), "How to train your ViT?" (Table 2), the MLP-Mixer paper
(Table 1), the DeiT paper (Table 1) and the released checkpoints. A name spells family, size and
patch size: `ViT-B_16` is the Base model on 16 x 16 patches; `R26+ViT-S_32` the Small model on the
features of a ResNet-26, 32 pixels to a token; `DeiT-S_16` has a distillation token and two heads.
Families that came later have the names of timm, the number at whose end is an image size.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

# hidden_size, mlp_dim, num_heads, num_layers
_SIZES = {
    'Ti': (192, 768, 3, 12),
    'S': (384, 1536, 6, 12),
    'B': (768, 3072, 12, 12),
    'L': (1024, 4096, 16, 24),
    'H': (1280, 5120, 16, 32),
}


def _vit(
    size: str, patch: int, dropout_rate: float = 0.0, classifier: str = 'token', suffix: str = ''
) -> dict:
    hidden_size, mlp_dim, num_heads, num_layers = _SIZES[size]
    return dict(
        model_name=f'ViT-{size}_{patch}{suffix}',
        patches=dict(size=(patch, patch)),
        hidden_size=hidden_size,
        transformer=dict(
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            attention_dropout_rate=0.0,
            dropout_rate=dropout_rate,
        ),
        classifier=classifier,
        representation_size=None,
    )


def _hybrid(size: str, name: str, num_layers: tuple[int, ...], patch: int = 1, **kwargs) -> dict:
    return _vit(size, patch, **kwargs) | dict(
        model_name=name, resnet=dict(num_layers=num_layers, width_factor=1)
    )


# The same of the families that came later.
_LATER_SIZES = {
    'tiny': (192, 768, 3, 12),
    'wee': (256, 1280, 4, 14),
    'little': (320, 1792, 5, 14),
    'small': (384, 1536, 6, 12),
    'medium': (512, 2048, 8, 12),
    'mediumd': (512, 2048, 8, 20),
    'betwixt': (640, 2560, 10, 12),
    'base': (768, 3072, 12, 12),
    'so150m': (896, 2304, 14, 18),
    'so150m2': (832, 2176, 13, 21),
    'large': (1024, 4096, 16, 24),
    'so400m': (1152, 4304, 16, 27),
    'huge': (1280, 5120, 16, 32),
    'giant': (1408, 6144, 16, 40),
    'giantopt': (1536, 6144, 16, 40),
    'gigantic': (1664, 8192, 16, 48),
    'dinov2 giant': (1536, 4096, 24, 40),
    'huge_plus': (1280, 5120, 20, 32),
    '7b': (4096, 8192, 32, 40),
    'eva02 tiny': (192, 512, 3, 12),
    'eva02 small': (384, 1024, 6, 12),
    'eva02 base': (768, 2048, 12, 12),
    'eva02 large': (1024, 2730, 16, 24),
}


def _later(
    name: str, size: str, patch: int, encoder: Mapping[str, Any] | None = None, **arguments: Any
) -> dict:
    """A model of timm's name; `encoder` and `arguments` are what a plain ViT has not."""
    hidden_size, mlp_dim, num_heads, num_layers = _LATER_SIZES[size]
    transformer = dict(
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        attention_dropout_rate=0.0,
        dropout_rate=0.0,
        **(encoder or {}),
    )
    return (
        dict(
            model_name=name,
            patches=dict(size=(patch, patch)),
            hidden_size=hidden_size,
            transformer=transformer,
            classifier='token',
            representation_size=None,
            act='gelu',
        )
        | arguments
    )


def _dinov2() -> Iterator[dict]:
    """DINOv2 (https://arxiv.org/abs/2304.07193), with registers (https://arxiv.org/abs/2309.16588)."""
    for registers in (0, 4):
        more: dict[str, Any] = {'registers': registers} if registers else {}
        name = f'patch14{"_reg4" if registers else ""}_dinov2'
        for size in ('small', 'base', 'large'):
            yield _later(f'vit_{size}_{name}', size, 14, dict(layer_scale=True), **more)
        gated = dict(layer_scale=True, gated_mlp=True)
        yield _later(f'vit_giant_{name}', 'dinov2 giant', 14, gated, **more, act='silu')


def _dinov3() -> Iterator[dict]:
    """DINOv3 (https://arxiv.org/abs/2508.10104), with and without biases of queries and values."""
    for biases, suffix in (('', ''), ('qv', '_qkvb')):
        for size in ('small', 'small_plus', 'base', 'large', 'huge_plus', '7b'):
            if size == '7b' and biases:  # there is none
                continue
            gated = size in ('small_plus', 'huge_plus', '7b')
            encoder: dict[str, Any] = dict(layer_scale=True, qkv_bias=biases)
            encoder |= dict(add_position_embedding=False) | (dict(gated_mlp=True) if gated else {})
            yield _later(
                f'vit_{size}_patch16_dinov3{suffix}',
                'small' if size == 'small_plus' else size,
                16,
                encoder,
                registers=4,
                rotary=dict(form='dinov3', theta=100.0),
                act='silu' if gated else 'gelu',
                layer_norm_eps=1e-5,
            )


def _eva02() -> Iterator[dict]:
    """EVA-02 (https://arxiv.org/abs/2303.11331), and its CLIP image towers."""
    gated: dict[str, Any] = dict(gated_mlp=True, qkv_bias='qv')
    rotary = dict(rotary=dict(form='axial', theta=10_000.0, grid=16), act='silu')
    for size in ('tiny', 'small', 'base', 'large'):
        norm = dict(mlp_norm=True) if size in ('base', 'large') else {}
        mean: dict[str, Any] = dict(classifier='gap', class_token=True, fc_norm=True)
        yield _later(
            f'eva02_{size}_patch14_224', f'eva02 {size}', 14, gated | norm, **rotary, **mean
        )
    norms = dict(mlp_norm=True, attention_norm=True)
    for size, patch in (('base', 16), ('large', 14)):
        name = f'eva02_{size}_patch{patch}_clip_224'
        yield _later(name, f'eva02 {size}', patch, gated | norms, **rotary)


def _deit3() -> Iterator[dict]:
    """DeiT III (https://arxiv.org/abs/2204.07118)."""
    for size in ('small', 'medium', 'base', 'large', 'huge'):
        patch = 14 if size == 'huge' else 16
        yield _later(f'deit3_{size}_patch{patch}_224', size, patch, dict(layer_scale=True))


def _timm_gap() -> Iterator[dict]:
    """Models of register tokens and average pooling that timm trained."""
    gap: dict[str, Any] = dict(classifier='gap')
    scaled = dict(layer_scale=True)
    for size in ('medium', 'betwixt'):
        side = 240 if size == 'medium' else 256
        yield _later(f'vit_{size}_patch16_gap_{side}', size, 16, scaled, **gap)
    for size, registers in (
        *(('wee', 1), ('little', 1), ('little', 4), ('medium', 1), ('medium', 4)),
        *(('mediumd', 4), ('betwixt', 1), ('betwixt', 4), ('base', 4)),
    ):
        yield _later(
            f'vit_{size}_patch16_reg{registers}_gap_256',
            size,
            16,
            {} if size == 'base' else scaled,
            **gap,
            registers=registers,
            fc_norm=True,
        )
    positions: dict[str, Any] = dict(register_positions=True)
    yield _later('vit_so150m_patch16_reg4_gap_256', 'so150m', 16, **gap, registers=4, **positions)
    yield _later(
        'vit_so150m2_patch16_reg1_gap_256',
        'so150m2',
        16,
        scaled,
        **gap,
        registers=1,
        fc_norm=True,
        **positions,
    )


def _siglip() -> Iterator[dict]:
    """Image towers of SigLIP (https://arxiv.org/abs/2303.15343) and SigLIP 2."""
    for size, patch, side in (
        *(('base', 16, 224), ('base', 32, 256), ('large', 16, 256), ('so400m', 14, 224)),
        *(('so400m', 16, 256), ('giantopt', 16, 256)),
    ):
        name = f'vit_{size}_patch{patch}_siglip_{side}'
        yield _later(name, size, patch, classifier='map', act='gelu_tanh')


def _clip() -> Iterator[dict]:
    """Image towers of CLIP (https://arxiv.org/abs/2103.00020): OpenAI's have QuickGELU."""
    for act, name in (('gelu', ''), ('quick_gelu', '_quickgelu')):
        for size, patch in (
            *(('base', 32), ('base', 16), ('large', 14), ('huge', 14)),
            *((('giant', 14), ('gigantic', 14)) if act == 'gelu' else ()),
        ):
            yield _later(
                f'vit_{size}_patch{patch}_clip{name}_224',
                size,
                patch,
                dict(pre_norm=True),
                patch_bias=False,
                act=act,
                layer_norm_eps=1e-5,
            )


def _ijepa() -> Iterator[dict]:
    """I-JEPA (https://arxiv.org/abs/2301.08243)."""
    for size, patch, side in (('huge', 14, 224), ('huge', 16, 448), ('giant', 16, 224)):
        yield _later(f'vit_{size}_patch{patch}_gap_{side}', size, patch, classifier='gap')


def _mixer(size: str, patch: int, hidden_dim: int, num_blocks: int, tokens_mlp_dim: int) -> dict:
    return dict(
        model_name=f'Mixer-{size}_{patch}',
        patches=dict(size=(patch, patch)),
        hidden_dim=hidden_dim,
        num_blocks=num_blocks,
        tokens_mlp_dim=tokens_mlp_dim,
        channels_mlp_dim=4 * hidden_dim,
    )


VARIANTS: dict[str, dict] = {
    config['model_name']: config
    for config in (
        _vit('Ti', 16),
        _vit('S', 8),
        _vit('S', 16),
        _vit('S', 32),
        _vit('B', 8),
        _vit('B', 16),
        _vit('B', 32),
        _vit('L', 16, dropout_rate=0.1),
        _vit('L', 32),
        _vit('H', 14, dropout_rate=0.1),
        # Mean of all tokens instead of a class token, and no pre_logits: what the GSAM weights are.
        _vit('S', 8, classifier='gap', suffix='-gap-norep'),
        _vit('S', 16, classifier='gap', suffix='-gap-norep'),
        _vit('S', 32, classifier='gap', suffix='-gap-norep'),
        _vit('B', 16, classifier='gap', suffix='-gap-norep'),
        _vit('B', 32, classifier='gap', suffix='-gap-norep'),
        # Hybrids. "R" is the root alone, whose stride of 4 makes a patch of 8 cover 32 pixels (the
        # name says 16). "R50" in front of B_16 has three stages of 3, 4 and 9 units, not the four
        # of a ResNet-50, so that a token covers 16 pixels.
        _hybrid('Ti', 'R+ViT-Ti_16', (), patch=8),
        _hybrid('S', 'R26+ViT-S_32', (2, 2, 2, 2)),
        _hybrid('B', 'R26+ViT-B_32', (2, 2, 2, 2)),
        _hybrid('B', 'R50+ViT-B_16', (3, 4, 9), dropout_rate=0.1),
        _hybrid('L', 'R50+ViT-L_32', (3, 4, 6, 3), dropout_rate=0.1),
        _mixer('S', 8, 512, 8, 256),
        _mixer('S', 16, 512, 8, 256),
        _mixer('S', 32, 512, 8, 256),
        _mixer('B', 16, 768, 12, 384),
        _mixer('B', 32, 768, 12, 384),
        _mixer('L', 16, 1024, 24, 512),
        # Distillation token and two heads.
        *(
            _vit(size, 16) | dict(model_name=f'DeiT-{size}_16', distilled=True)
            for size in ('Ti', 'S', 'B')
        ),
        # A hidden layer in front of the head, as in the course model of PaddleViT.
        _vit('B', 16, suffix='-mlp-head') | dict(mlp_head=True),
        *_dinov2(),
        *_dinov3(),
        *_eva02(),
        *_deit3(),
        *_timm_gap(),
        *_siglip(),
        *_clip(),
        *_ijepa(),
    )
}

# What each of the two towers of LiT is (https://arxiv.org/abs/2111.07991), and its input.
_LIT_TEXT_TRANSFORMER = dict(num_layers=12, vocab_size=16_000)


def _lit(name: str, size: str, out_dim: tuple[int | None, int], text_model: str, **text) -> dict:
    tokenizer = {'bert': 'bert', 'text_transformer': 'sentencepiece'}[text_model]
    return dict(
        model_name=name,
        out_dim=out_dim,
        image=_vit(size, 16),
        text_model=text_model,
        text=text,
        pp=dict(tokenizer_name=tokenizer, size=224, max_len=16),
    )


# Name -> the arguments of `models.LitModel`.
TWO_TOWERS: dict[str, dict] = {
    config['model_name']: config
    for config in (
        _lit('LiT-B16B', 'B', (768, 768), 'bert', config='base'),
        _lit('LiT-B16B_2', 'B', (None, 768), 'bert', config='base'),
        _lit('LiT-L16L', 'L', (None, 1024), 'bert', config='large'),
        _lit(
            'LiT-L16S',
            'L',
            (None, 1024),
            'text_transformer',
            width=384,
            mlp_dim=1536,
            num_heads=6,
            **_LIT_TEXT_TRANSFORMER,
        ),
        _lit(
            'LiT-L16Ti',
            'L',
            (None, 1024),
            'text_transformer',
            width=192,
            mlp_dim=768,
            num_heads=3,
            **_LIT_TEXT_TRANSFORMER,
        ),
    )
}


def get_config(name: str) -> ml_collections.ConfigDict:
    """The architecture of a variant, as a new `ConfigDict` that may be changed.

    Args:
      name: a key of `VARIANTS`, such as 'ViT-B_16'.

    Returns:
      ViT: model_name, patches.size, hidden_size, transformer.{mlp_dim, num_heads, num_layers,
      attention_dropout_rate, dropout_rate}, classifier, representation_size (an int that may be
      set, or None); resnet.{num_layers, width_factor}, rotary.{form, theta, grid}, distilled,
      mlp_head only for the variants that are about these. Mixer: model_name, patches.size,
      hidden_dim, num_blocks, tokens_mlp_dim, channels_mlp_dim. Both: act, layer_norm_eps, None for
      what the weights were trained with, or the released models' where there are none.

    Raises:
      ValueError: no such variant, and the message names the nearest; or one of `TWO_TOWERS`.
    """
    if name in TWO_TOWERS:
        raise ValueError(f'{name} has an image and a text tower: models.get_model makes it')
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(f'unknown model {name!r}; nearest: {near!r}; known: {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict(VARIANTS[name])
    if not is_mixer(config) and config.representation_size is None:
        config.representation_size = ml_collections.config_dict.placeholder(int)
    for name, kind in (('act', str), ('layer_norm_eps', float)):
        if name not in config:
            config[name] = ml_collections.config_dict.placeholder(kind)
    return config


def two_towers(
    image: str, text_model: str, text: Mapping[str, Any], out_dim: Any, max_len: int = 16
) -> ml_collections.ConfigDict:
    """An image and a text tower to be trained, for `config.model`.

    Args:
      image: name of the image tower, see `get_config`.
      text_model: 'bert' or 'text_transformer', with a vocabulary of BERT or of SentencePiece.
      text: arguments of `models.text`'s class; `vocab_size` is that of the vocabulary.
      out_dim: size of the embeddings, or a pair for images and texts; None leaves out a projection.
      max_len: tokens of a text.

    Returns:
      The arguments of `models.LitModel`; the temperature begins with 10, as in LiT.
    """
    tokenizer = {'bert': 'bert', 'text_transformer': 'sentencepiece'}[text_model]
    config = ml_collections.ConfigDict(
        dict(
            model_name=f'{image} with {text_model}',
            text_model=text_model,
            text=dict(text),
            out_dim=out_dim,
            pp=dict(tokenizer_name=tokenizer, max_len=max_len),
            temperature_init=10.0,
        )
    )
    config.image = get_config(image)
    return config


def has_two_towers(config: Mapping[str, Any]) -> bool:
    """Whether an architecture has an image and a text tower: the arguments of `models.LitModel`."""
    return 'text_model' in config


def image_tower(config: Any) -> Any:
    """Of two towers that of images; else the architecture itself."""
    return config['image'] if has_two_towers(config) else config


def is_mixer(config: Mapping[str, Any]) -> bool:
    """Whether an architecture is an MLP-Mixer's (else it is a Vision Transformer's)."""
    return 'num_blocks' in config


def tokens_in_front(config: Mapping[str, Any]) -> dict[str, int]:
    """The learned tokens in front of the patches of a ViT, in their order, and how many there are.

    Args:
      config: an architecture, see `get_config`; a Mixer's has none.

    Returns:
      'cls' (class token), 'dist' (distillation token) and 'registers', those that it has.
    """
    if is_mixer(config):
        return {}
    class_token = config.get('class_token')
    if class_token is None:
        class_token = config.get('classifier', 'token').startswith('token')
    counts = {
        'cls': int(class_token),
        'dist': int(class_token and bool(config.get('distilled'))),
        'registers': config.get('registers', 0),
    }
    return {name: count for name, count in counts.items() if count}


def prefix_tokens(config: Mapping[str, Any]) -> int:
    """How many tokens stand in front of the patches, see `tokens_in_front`."""
    return sum(tokens_in_front(config).values())


def prefix_positions(config: Mapping[str, Any]) -> int:
    """How many of the tokens in front of the patches have a position embedding, the first ones."""
    registers = 0 if config.get('register_positions') else config.get('registers', 0)
    return prefix_tokens(config) - registers


def pooled_width(config: Mapping[str, Any]) -> int:
    """How many numbers of an image stand in front of `pre_logits` and the head."""
    if is_mixer(config):
        return config['hidden_dim']
    return config['hidden_size'] * (2 if config.get('classifier') == 'token_gap' else 1)


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of images of which one number, the side, is given, or both."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def in_words(size: int | tuple[int, int]) -> str:
    """A size of images for people: '224', or '32 x 128' (height x width)."""
    height, width = sides(size)
    return str(height) if height == width else f'{height} x {width}'


def token_stride(config: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels from one token to the next, down and across.

    That is the patch size, for hybrids times the ResNet's stride. An image whose sides are
    multiples of it gives a grid of side // stride tokens, see `token_grid`.

    Args:
      config: an architecture, see `get_config`.
    """
    height, width = config['patches']['size']
    hybrid = config.get('resnet')
    stride = 1 if hybrid is None else resnet_stride(hybrid['num_layers'])
    return height * stride, width * stride


def token_grid(config: Mapping[str, Any], image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the patches of an image.

    Args:
      config: an architecture, see `get_config`.
      image_size: side or (height, width), pixels.

    Raises:
      ValueError: the image is not a whole number of patches; says what is, and names the nearest
        sizes, without their unit.
    """
    stride, size = token_stride(config), sides(image_size)
    if any(side < 1 or side % step for side, step in zip(size, stride, strict=True)):
        nearest = []
        for more in (0, 1):
            rows, columns = ((a // b + more) * b for a, b in zip(size, stride, strict=True))
            if rows and columns:
                square = isinstance(image_size, int) and rows == columns
                nearest.append(str(rows) if square else f'({rows},{columns})')
        words = ' or '.join(nearest)
        what = 'the patch size' if 'resnet' not in config else "the hybrid's pixels per token,"
        raise ValueError(f'is not a multiple of {what} {in_words(stride)}: use', words)
    return size[0] // stride[0], size[1] // stride[1]


def resnet_stride(num_layers: Sequence[int]) -> int:
    """Pixels between neighbouring positions of the feature map: 4 after the root, then doubling."""
    return 4 * 2 ** max(0, len(num_layers) - 1)
