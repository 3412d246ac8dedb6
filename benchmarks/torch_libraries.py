"""Models of transformers and timm with published weights: the other side of check_parity.py.

Like torch_reference.py this reads the published names by its own code, not by vit_jax's, and its
models take and return the same: images [B, height, width, 3] in [-1, 1] to a dict of outputs.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

# Where transformers has another name for an activation function; timm has the same ones.
_TRANSFORMERS_ACTIVATIONS = {'gelu_tanh': 'gelu_pytorch_tanh'}

# Our variant -> timm's model. (timm has Mixers, too, but does not read their published files.)
_TIMM_SIZES = {'Ti': 'tiny', 'S': 'small', 'B': 'base', 'L': 'large', 'H': 'huge'}
_TIMM_OTHERS = {
    'R+ViT-Ti_16': 'vit_tiny_r_s16_p8_224',
    'R26+ViT-S_32': 'vit_small_r26_s32_224',
    'R50+ViT-B_16': 'vit_base_r50_s16_224',
    'R50+ViT-L_32': 'vit_large_r50_s32_224',
}


def transformers_model(
    weights: Mapping[str, np.ndarray],
    image_size: tuple[int, int],
    *,
    act: str,
    layer_norm_eps: float,
    representation_act: str = 'tanh',
) -> 'Recorded':
    """The ViT of transformers that the shapes of the weights describe, with these weights.

    Args:
        weights: name (published or Linen) -> float32 array, of a ViT with class token; not copied.
            `pre_logits` is the pooler of transformers' `ViTModel`; its class for classification
            leaves that out.
        image_size: (height, width), pixels.
        act: activation function, one of `torch_reference.ACTIVATIONS`.
        layer_norm_eps: epsilon of LayerNorm.
        representation_act: activation function of the pooler.

    Returns:
        The model.

    Raises:
        ValueError, RuntimeError: an array has no place in the model, or is missing.
    """
    import transformers

    *patch, channels, width = weights['embedding/kernel'].shape
    queries = [n for n in weights if n.endswith('/query/kernel')]
    pooled = 'pre_logits/bias' in weights
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=len(queries),
        num_attention_heads=weights[queries[0]].shape[1],
        intermediate_size=next(
            a.shape[0] for n, a in weights.items() if n.endswith('/Dense_0/bias')
        ),
        hidden_act=_TRANSFORMERS_ACTIVATIONS.get(act, act),
        pooler_act=_TRANSFORMERS_ACTIVATIONS.get(representation_act, representation_act),
        layer_norm_eps=layer_norm_eps,
        image_size=image_size,
        patch_size=patch,
        num_channels=channels,
        pooler_output_size=len(weights['pre_logits/bias']) if pooled else None,
    )
    with torch.device('meta'):
        vit = transformers.ViTModel(config, add_pooling_layer=pooled)
        features = len(weights['pre_logits/bias']) if pooled else width
        head = nn.Linear(features, len(weights['head/bias'])) if 'head/bias' in weights else None
    recorded = _transformers(vit, head)
    recorded.model.load_state_dict(_transformers_state(weights), strict=True, assign=True)
    return recorded.requires_grad_(False)


def transformers_folder(folder: str | os.PathLike[str], assumed: tuple[Any, Any]) -> 'Recorded':
    """The model of a Hugging Face folder, as transformers itself loads it, with all settings.

    The class is the one that config.json names.

    Args:
        folder: of config.json, weights and, mostly, the settings of an image processor.
        assumed: (mean, standard deviation) of the input, in units of white, where it has none: the
            library does not say, either.

    Raises:
        ValueError: transformers misses an array of its model, or finds one of another shape.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
        (name,) = json.load(file)['architectures']

    def load(**options: Any) -> tuple[Any, list[str]]:
        model, info = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
        return model, [*map(str, info['missing_keys']), *map(str, info['mismatched_keys'])]

    model, missing = load()
    if missing and all('pooler' in key for key in missing):  # the folder has none
        model, missing = load(add_pooling_layer=False)
    if missing:
        raise ValueError(f'from_pretrained misses arrays of these shapes: {sorted(missing)}')
    heads = [
        module
        for name, module in model.named_modules()
        if name in ('classifier', 'cls_classifier', 'distillation_classifier')
    ]

    def compute(images: torch.Tensor) -> dict[str, torch.Tensor]:
        read: list[torch.Tensor] = []
        handles = [
            head.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
            for head in heads
        ]
        if not heads:
            return {'pre_logits': _features(model, images)}
        result = model(pixel_values=images)
        for handle in handles:
            handle.remove()
        features = read[0] if len(read) == 1 else torch.stack(read, dim=1)
        return {'pre_logits': features, 'logits': result.logits}

    return _with_input(
        Recorded(model, _parts(model), compute), *_transformers_input(folder, assumed)
    )


def _transformers_input(
    folder: str | os.PathLike[str], assumed: tuple[Any, Any]
) -> tuple[Any, Any]:
    """(mean, standard deviation) of the input, in units of white, as its image processor has it."""
    import transformers

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except OSError:  # it has none
        return assumed
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255
    if not processor.do_normalize:
        return 0.0, 1 / scale
    mean, std = (np.asarray(x, np.float64) for x in (processor.image_mean, processor.image_std))
    return mean / scale, std / scale


def _with_input(model: 'Recorded', mean: Any, std: Any) -> 'Recorded':
    """The model for input in [-1, 1], of one that takes (white - mean) / std."""
    mean, std = (torch.as_tensor(values, dtype=torch.float64) for values in (mean, std))
    model.register_forward_pre_hook(
        lambda _module, inputs: (((inputs[0].double() + 1) / 2 - mean) / std).to(inputs[0])
    )
    return model


def _features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """What a model of transformers without a head gives of images [B, 3, height, width], [B, D]."""
    kind = model.config.model_type
    if hasattr(model, 'get_image_features'):  # of image and text
        result = model.get_image_features(pixel_values=images)
        return getattr(result, 'pooler_output', result)
    if kind == 'vit_mae':  # nothing is masked, and the patches keep their order
        encoder = getattr(model, 'vit', model)
        encoder.config.mask_ratio = 0.0
        patches = encoder.embeddings.patch_embeddings.num_patches
        noise = torch.arange(patches).expand(len(images), -1)
        return encoder(images, noise=noise).last_hidden_state[:, 0]
    result = model(pixel_values=images)
    for name in ('image_embeds', 'pooler_output'):
        if result.get(name) is not None:
            return result[name]
    tokens = result.last_hidden_state
    return tokens.mean(dim=1) if kind == 'ijepa' else tokens[:, 0]


def timm_folder(folder: str | os.PathLike[str]) -> 'Recorded':
    """The model of a timm folder, as timm itself loads it."""
    import timm

    model = timm.create_model(f'local-dir:{folder}', pretrained=True)

    def compute(images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = model.forward_features(images)
        outputs = {'logits': model.forward_head(x)} if model.num_classes else {}
        if 'distilled' not in type(model).__name__.lower():
            outputs = {'pre_logits': model.forward_head(x, pre_logits=True)} | outputs
        return outputs

    settings = timm.data.resolve_model_data_config(model)
    recorded = Recorded(model, _parts(model), compute)
    return _with_input(recorded, settings['mean'], settings['std'])


def _parts(model: nn.Module) -> list[nn.Module]:
    """Its modules that give the tokens of the patches, and those after each block."""
    pattern = re.compile(
        r'(?!text_model)(?:.*\.)?(?:patch_embed(?:dings?)?|stem|(?:layers?|blocks)\.\d+)'
    )
    return [module for name, module in model.named_modules() if pattern.fullmatch(name)]


def timm_model(
    name: str, weights: Mapping[str, np.ndarray], image_size: tuple[int, int], *, act: str
) -> 'Recorded':
    """A timm model with weights that timm itself reads from a `.npz` file of published names.

    Args:
        name: of the model in timm, see `timm_name`.
        weights: name (published) -> float32 array. timm has no `pre_logits`.
        image_size: height and width, pixels.
        act: activation function, one of `torch_reference.ACTIVATIONS`.
    """
    import timm

    classes = len(weights['head/bias']) if 'head/bias' in weights else 0
    model = timm.create_model(name, num_classes=classes, img_size=image_size, act_layer=act)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'weights.npz')
        np.savez(path, allow_pickle=False, **weights)
        model.load_pretrained(path)

    def compute(images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = model.forward_features(images)
        outputs = {'pre_logits': model.forward_head(x, pre_logits=True)}
        return outputs | ({'logits': model.forward_head(x)} if classes else {})

    return Recorded(model, [model.patch_embed, *model.blocks], compute)


class Recorded(nn.Module):
    """A model that returns what is compared: 'patch_embedding', 'encoderblock_0', ..., and more.

    Args:
        model: the model, with all its weights.
        parts: its modules that give the patch embedding and the tokens after each block, in order.
        compute: images [B, 3, height, width] -> 'pre_logits' and, if there is a head, 'logits'.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[nn.Module],
        compute: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    ):
        super().__init__()
        self.model, self.compute = model, compute
        names = ['patch_embedding', *(f'encoderblock_{i}' for i in range(len(parts) - 1))]
        self.parts = dict(zip(names, parts, strict=True))
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [B, height, width, 3] to outputs, in the order of the computation."""
        outputs: dict[str, torch.Tensor] = {}
        handles = [
            part.register_forward_hook(
                lambda _module, _inputs, result, name=name: outputs.update({name: _tokens(result)})
            )
            for name, part in self.parts.items()
        ]
        try:
            last = self.compute(images.permute(0, 3, 1, 2))
        finally:
            for handle in handles:
                handle.remove()
        return outputs | last


def _tokens(result: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, D], also of a map [B, D, h, w]."""
    return result.flatten(2).transpose(1, 2) if result.ndim == 4 else result


def timm_name(variant: str) -> str:
    """What timm calls a variant ('vit_base_patch16_224'); '' where it has no such model."""
    if match := re.fullmatch(r'ViT-(\w+)_(\d+)', variant):
        return f'vit_{_TIMM_SIZES[match[1]]}_patch{match[2]}_224'
    return _TIMM_OTHERS.get(variant, '')


def _transformers(vit: Any, classifier: nn.Module | None) -> Recorded:
    """`transformers.ViTModel` and the head, if there is one."""

    def compute(images: torch.Tensor) -> dict[str, torch.Tensor]:
        result = vit(images)
        features = result.pooler_output
        if features is None:
            features = result.last_hidden_state[:, 0]
        outputs = {'pre_logits': features}
        return outputs | ({} if classifier is None else {'logits': classifier(features)})

    modules = {'vit': vit} | ({} if classifier is None else {'classifier': classifier})
    parts = [vit.embeddings.patch_embeddings, *vit.layers]
    return Recorded(nn.ModuleDict(modules), parts, compute)


def _transformers_state(weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Published (or Linen) names to those of transformers 5."""
    block, layer = r'Transformer/encoderblock_(\d+)/', r'vit.layers.\1.'
    modules = {
        'embedding': 'vit.embeddings.patch_embeddings.projection',
        'Transformer/encoder_norm': 'vit.layernorm',
        'pre_logits': 'vit.pooler.dense',
        'head': 'classifier',
        f'{block}LayerNorm_0': f'{layer}layernorm_before',
        f'{block}LayerNorm_[12]': f'{layer}layernorm_after',
        f'{block}MlpBlock_[03]/Dense_0': f'{layer}mlp.fc1',
        f'{block}MlpBlock_[03]/Dense_1': f'{layer}mlp.fc2',
    }
    for theirs, ours in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o')):
        attention = f'{block}MultiHeadDotProductAttention_[01]/{theirs}'
        modules[attention] = f'{layer}attention.{ours}_proj'

    tokens = {
        'cls': 'vit.embeddings.cls_token',
        'Transformer/posembed_input/pos_embedding': 'vit.embeddings.position_embeddings',
    }
    state = {}
    for name, array in weights.items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if name in tokens:
            state[tokens[name]] = tensor
            continue
        module, kind = name.rsplit('/', 1)
        targets = [re.sub(p, t, module) for p, t in modules.items() if re.fullmatch(p, module)]
        if not targets:
            raise ValueError(f'transformers has no place for {name}')
        if kind != 'kernel':
            state[f'{targets[0]}.{"bias" if kind == "bias" else "weight"}'] = tensor.reshape(-1)
        elif module == 'embedding':
            state[f'{targets[0]}.weight'] = tensor.permute(3, 2, 0, 1)
        else:  # [D, H, K] to [H K, D]; [H, K, D] to [D, H K]; [inputs, outputs] to the reverse
            inputs = 2 if module.endswith('/out') else 1
            state[f'{targets[0]}.weight'] = tensor.flatten(0, inputs - 1).flatten(1).T
    return state
