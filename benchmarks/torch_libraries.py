"""Models of transformers and timm with published weights: the other side of check_parity.py.

Like torch_reference.py this reads the published names by its own code, not by vit_jax's, and its
models take and return the same: images [B, height, width, 3] in [-1, 1] to a dict of outputs.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

# The names of the forms of GELU in each library.
_TRANSFORMERS_GELU = {'tanh': 'gelu_pytorch_tanh', 'erf': 'gelu'}
_TIMM_GELU = {'tanh': 'gelu_tanh', 'erf': 'gelu'}

# Our variant -> timm's model. (timm has Mixers, too, but does not read their published files.)
_TIMM_SIZES = {'Ti': 'tiny', 'S': 'small', 'B': 'base', 'L': 'large', 'H': 'huge'}
_TIMM_OTHERS = {
    'R+ViT-Ti_16': 'vit_tiny_r_s16_p8_224',
    'R26+ViT-S_32': 'vit_small_r26_s32_224',
    'R50+ViT-B_16': 'vit_base_r50_s16_224',
    'R50+ViT-L_32': 'vit_large_r50_s32_224',
}


def transformers_model(weights: Mapping[str, np.ndarray], gelu: str) -> 'TransformersViT':
    """The ViT of transformers that the shapes of the weights describe, with these weights.

    Args:
        weights: name (published or Linen) -> float32 array, of a ViT with class token; not copied.
            `pre_logits` is the pooler of transformers' `ViTModel`; its class for classification
            leaves that out.
        gelu: 'tanh' or 'erf', the default of transformers.

    Returns:
        The model.

    Raises:
        ValueError, RuntimeError: an array has no place in the model, or is missing.
    """
    import transformers

    patch, _, _, width = weights['embedding/kernel'].shape
    positions = weights['Transformer/posembed_input/pos_embedding'].shape[1] - 1
    queries = [n for n in weights if n.endswith('/query/kernel')]
    pooled = 'pre_logits/bias' in weights
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=len(queries),
        num_attention_heads=weights[queries[0]].shape[1],
        intermediate_size=next(
            a.shape[0] for n, a in weights.items() if n.endswith('/Dense_0/bias')
        ),
        hidden_act=_TRANSFORMERS_GELU[gelu],
        layer_norm_eps=1e-6,
        image_size=round(positions**0.5) * patch,
        patch_size=patch,
        pooler_output_size=len(weights['pre_logits/bias']) if pooled else None,
    )
    with torch.device('meta'):
        vit = transformers.ViTModel(config, add_pooling_layer=pooled)
        features = len(weights['pre_logits/bias']) if pooled else width
        head = nn.Linear(features, len(weights['head/bias'])) if 'head/bias' in weights else None
    model = TransformersViT(vit, head)
    model.load_state_dict(_transformers_state(weights), strict=True, assign=True)
    return model.requires_grad_(False)


def transformers_folder(folder: str | os.PathLike[str], gelu: str) -> 'TransformersViT':
    """The ViT of a Hugging Face folder, loaded by transformers itself.

    Args:
        folder: with config.json and weights.
        gelu: 'tanh' or 'erf', whatever config.json says; the epsilon of LayerNorm becomes 1e-6.

    Returns:
        The model.

    Raises:
        ValueError: transformers misses an array of its model, or does not expect one.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded: Any = transformers.ViTForImageClassification.from_pretrained(
        folder,
        hidden_act=_TRANSFORMERS_GELU[gelu],
        layer_norm_eps=1e-6,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    for what in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        if info[what]:
            raise ValueError(f'from_pretrained reports {what}: {sorted(map(str, info[what]))}')
    return TransformersViT(model.vit, model.classifier).requires_grad_(False)


class TransformersViT(nn.Module):
    """A ViT of transformers that returns what is compared.

    Args:
        vit: `transformers.ViTModel`.
        classifier: the head, or None.
    """

    def __init__(self, vit: Any, classifier: nn.Module | None):
        super().__init__()
        self.vit, self.classifier = vit, classifier
        self.eval()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images to 'patch_embedding', 'encoderblock_0', ..., 'pre_logits', 'logits'."""
        outputs: dict[str, torch.Tensor] = {}
        parts = {'patch_embedding': self.vit.embeddings.patch_embeddings} | {
            f'encoderblock_{i}': layer for i, layer in enumerate(self.vit.layers)
        }
        with _recorded(parts, outputs):
            result = self.vit(images.permute(0, 3, 1, 2))
        features = result.pooler_output
        if features is None:
            features = result.last_hidden_state[:, 0]
        outputs['pre_logits'] = features
        if self.classifier is not None:
            outputs['logits'] = self.classifier(features)
        return outputs


class TimmModel(nn.Module):
    """A timm model with weights that timm itself reads from a `.npz` file of published names.

    Args:
        name: of the model in timm, see `timm_name`.
        weights: name (published) -> float32 array. timm has no `pre_logits`.
        image_size: height and width, pixels.
        gelu: 'tanh' or 'erf', timm's default.
    """

    def __init__(self, name: str, weights: Mapping[str, np.ndarray], image_size: int, gelu: str):
        import timm

        super().__init__()
        classes = len(weights['head/bias']) if 'head/bias' in weights else 0
        self.model = timm.create_model(
            name, num_classes=classes, img_size=image_size, act_layer=_TIMM_GELU[gelu]
        )
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'weights.npz')
            np.savez(path, allow_pickle=False, **weights)
            self.model.load_pretrained(path)
        self.has_head = classes > 0
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images to 'patch_embedding', the tokens after every block, 'pre_logits', 'logits'."""
        parts = {'patch_embedding': self.model.patch_embed}
        parts |= {f'encoderblock_{i}': layer for i, layer in enumerate(self.model.blocks)}
        outputs: dict[str, torch.Tensor] = {}
        with _recorded(parts, outputs):
            x = self.model.forward_features(images.permute(0, 3, 1, 2))
        outputs['pre_logits'] = self.model.forward_head(x, pre_logits=True)
        if self.has_head:
            outputs['logits'] = self.model.forward_head(x)
        return outputs


def timm_name(variant: str) -> str:
    """What timm calls a variant ('vit_base_patch16_224'); '' where it has no such model."""
    if match := re.fullmatch(r'ViT-(\w+)_(\d+)', variant):
        return f'vit_{_TIMM_SIZES[match[1]]}_patch{match[2]}_224'
    return _TIMM_OTHERS.get(variant, '')


@contextlib.contextmanager
def _recorded(parts: Mapping[str, nn.Module], outputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within it, what each module of `parts` returns is put into `outputs` under its name."""
    handles = [
        part.register_forward_hook(
            lambda _module, _inputs, result, name=name: outputs.update({name: result})
        )
        for name, part in parts.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _transformers_state(weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Published (or Linen) names to those of transformers 5."""
    modules = [
        ('embedding', 'vit.embeddings.patch_embeddings.projection'),
        ('Transformer/encoder_norm', 'vit.layernorm'),
        ('pre_logits', 'vit.pooler.dense'),
        ('head', 'classifier'),
    ]
    block = r'Transformer/encoderblock_(\d+)/'
    layer = r'vit.layers.\1.'
    modules += [
        (f'{block}LayerNorm_0', f'{layer}layernorm_before'),
        (f'{block}LayerNorm_[12]', f'{layer}layernorm_after'),
        (f'{block}MlpBlock_[03]/Dense_0', f'{layer}mlp.fc1'),
        (f'{block}MlpBlock_[03]/Dense_1', f'{layer}mlp.fc2'),
    ]
    for theirs, ours in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o')):
        attention = f'{block}MultiHeadDotProductAttention_[01]/{theirs}'
        modules.append((attention, f'{layer}attention.{ours}_proj'))

    state = {}
    for name, array in weights.items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if name == 'cls':
            state['vit.embeddings.cls_token'] = tensor
            continue
        if name == 'Transformer/posembed_input/pos_embedding':
            state['vit.embeddings.position_embeddings'] = tensor
            continue
        module, kind = name.rsplit('/', 1)
        targets = [re.sub(p, t, module) for p, t in modules if re.fullmatch(p, module)]
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
