"""Vision Transformer, hybrid, MLP-Mixer and DeiT in PyTorch: the other side of check_parity.py.

Written from the papers (ViT https://arxiv.org/abs/2010.11929, Big Transfer 1912.11370, Mixer
2105.01601, DeiT 2012.12877) and the published format of the weights, on purpose without a line of
vit_jax: two programs that agree are evidence only if they were not made from one another.

    weights = read_weights('ViT-B_16.npz')
    outputs = build(weights, classifier='token')(images)
    outputs['logits']

Shapes: B batch, N tokens, D width, H heads, K head size, C classes. Images are [B, height, width,
3] in [-1, 1], as everywhere in this project. A model returns a dict in the order of the
computation: 'resnet' [B, h, w, F] (hybrids), 'patch_embedding' [B, N, D], the tokens after every
block, 'encoderblock_0' or 'MixerBlock_0' [B, N, D], 'pre_logits' (what the head reads) [B, D], and
'logits' [B, C] if there is a head.
"""

import os
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LAYER_NORM_EPSILON = 1e-6
GROUP_NORM_EPSILON = 1e-6
STANDARDISATION_EPSILON = 1e-5  # added to the standard deviation
GELU_FORMS = {'tanh': 'tanh', 'erf': 'none'}  # our name -> the argument of torch's gelu


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a `.npz` file of weights in the published naming (or Linen's), by NumPy alone.

    Args:
        path: a file whose keys are parameter paths, as Google published them; the weights may be
            under `opt/target/` or `params/`.

    Returns:
        Name (without such a prefix) -> float32 array.

    Raises:
        ValueError: an array of another type than float32.
    """
    with np.load(path, allow_pickle=False) as file:
        names = file.files
        prefixes = (p for p in ('opt/target/', 'params/') if any(n.startswith(p) for n in names))
        prefix = next(prefixes, '')
        weights = {n.removeprefix(prefix): file[n] for n in names if n.startswith(prefix)}
    for name, array in weights.items():
        if array.dtype != np.float32:
            raise ValueError(f'{path}: {name} is {array.dtype}, expected float32')
    return weights


def build(weights: Mapping[str, np.ndarray], *, classifier: str, gelu: str = 'tanh') -> nn.Module:
    """The model that the names and shapes of the weights describe, with these weights.

    Args:
        weights: name -> float32 array; not copied.
        classifier: of a Vision Transformer: 'token', 'gap', 'unpooled' or 'token_unpooled'.
        gelu: 'tanh', as the weights were trained, or 'erf', PyTorch's default.

    Returns:
        A module in evaluation mode: images to a dict of outputs, see the top of this file.

    Raises:
        KeyError: an array is missing.
        ValueError: an array belongs to no part of the model.
    """
    reader = _Reader(weights)
    mixer = 'stem/kernel' in weights
    model = MlpMixer(reader, gelu) if mixer else VisionTransformer(reader, classifier, gelu)
    if unused := weights.keys() - reader.used:
        raise ValueError(f'weights of no part of the model: {", ".join(sorted(unused))}')
    return model.eval().requires_grad_(False)


class _Reader:
    """Hands out arrays as parameters and remembers which."""

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self.weights = weights
        self.used: set[str] = set()

    def __contains__(self, module: str) -> bool:
        return any(name.startswith(f'{module}/') for name in self.weights)

    def get(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return torch.from_numpy(np.ascontiguousarray(self.weights[name]))

    def either(self, parent: str, *names: str) -> str:
        """The module of `parent` that is there: the generations of files number differently."""
        return next((f'{parent}/{n}' for n in names if f'{parent}/{n}' in self), parent)

    def linear(self, module: str, inputs: int = 1) -> nn.Linear:
        """A dense layer; the first `inputs` axes of its kernel are inputs, the rest outputs."""
        kernel = self.get(f'{module}/kernel')
        rows = int(np.prod(kernel.shape[:inputs]))
        layer = nn.Linear(rows, kernel.numel() // rows, device='meta')
        layer.weight = nn.Parameter(kernel.reshape(rows, -1).T)
        layer.bias = nn.Parameter(self.get(f'{module}/bias').reshape(-1))
        return layer

    def layer_norm(self, module: str) -> nn.LayerNorm:
        scale = self.get(f'{module}/scale')
        layer = nn.LayerNorm(scale.shape[0], eps=LAYER_NORM_EPSILON, device='meta')
        layer.weight, layer.bias = nn.Parameter(scale), nn.Parameter(self.get(f'{module}/bias'))
        return layer

    def patches(self, module: str) -> nn.Conv2d:
        """A convolution whose kernel [height, width, input, output] does not overlap itself."""
        kernel = self.get(f'{module}/kernel').permute(3, 2, 0, 1)
        size = (kernel.shape[2], kernel.shape[3])
        layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], size, stride=size, device='meta')
        layer.weight, layer.bias = nn.Parameter(kernel), nn.Parameter(self.get(f'{module}/bias'))
        return layer


class Mlp(nn.Module):
    """Dense, GELU, dense, over the last axis."""

    def __init__(self, reader: _Reader, module: str, gelu: str):
        super().__init__()
        self.expand = reader.linear(f'{module}/Dense_0')
        self.contract = reader.linear(f'{module}/Dense_1')
        self.gelu = GELU_FORMS[gelu]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        return self.contract(F.gelu(self.expand(x), approximate=self.gelu))


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V for each head, then a projection of all heads together."""

    def __init__(self, reader: _Reader, module: str):
        super().__init__()
        self.heads = reader.weights[f'{module}/query/kernel'].shape[1]
        self.query = reader.linear(f'{module}/query')
        self.key = reader.linear(f'{module}/key')
        self.value = reader.linear(f'{module}/value')
        self.out = reader.linear(f'{module}/out', inputs=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, D] to [B, N, D]."""
        q, k, v = (
            f(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, N, K]
            for f in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Attention, then MLP; each on normalised tokens, and added to the tokens."""

    def __init__(self, reader: _Reader, module: str, gelu: str):
        super().__init__()
        self.norm1 = reader.layer_norm(f'{module}/LayerNorm_0')
        self.norm2 = reader.layer_norm(reader.either(module, 'LayerNorm_2', 'LayerNorm_1'))
        attention = ('MultiHeadDotProductAttention_1', 'MultiHeadDotProductAttention_0')
        self.attention = SelfAttention(reader, reader.either(module, *attention))
        self.mlp = Mlp(reader, reader.either(module, 'MlpBlock_3', 'MlpBlock_0'), gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, D] to [B, N, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT; with `conv_root` among the weights a hybrid, with `dist` a DeiT."""

    def __init__(self, reader: _Reader, classifier: str, gelu: str):
        super().__init__()
        self.classifier = classifier
        self.resnet = ResNet(reader) if 'conv_root' in reader else None
        self.embedding = reader.patches('embedding')
        self.distilled = 'dist' in reader.weights
        tokens = [name for name in ('cls', 'dist') if name in reader.weights]
        if bool(tokens) != (classifier in ('token', 'token_unpooled')):
            raise ValueError(f'classifier {classifier!r}, but the weights have tokens {tokens}')
        self.tokens = nn.ParameterList([nn.Parameter(reader.get(name)) for name in tokens])
        positions = reader.get('Transformer/posembed_input/pos_embedding')
        self.positions = nn.Parameter(positions)
        self.blocks = nn.ModuleList()
        while f'Transformer/encoderblock_{len(self.blocks)}' in reader:
            name = f'Transformer/encoderblock_{len(self.blocks)}'
            self.blocks.append(EncoderBlock(reader, name, gelu))
        self.norm = reader.layer_norm('Transformer/encoder_norm')
        self.pre_logits = reader.linear('pre_logits') if 'pre_logits' in reader else None
        self.hidden = reader.linear('head_hidden') if 'head_hidden' in reader else None
        self.head = reader.linear('head') if 'head' in reader else None
        self.head_dist = reader.linear('head_dist') if 'head_dist' in reader else None

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images to outputs, see the top of the file; of a DeiT 'pre_logits' is [B, 2, D]."""
        outputs = {}
        x = images.permute(0, 3, 1, 2)
        if self.resnet is not None:
            x = self.resnet(x)
            outputs['resnet'] = x.permute(0, 2, 3, 1)
        x = self.embedding(x).flatten(2).transpose(1, 2)
        outputs['patch_embedding'] = x
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in self.tokens), x], dim=1)
        x = x + self.positions
        for i, block in enumerate(self.blocks):
            x = outputs[f'encoderblock_{i}'] = block(x)
        x = self.norm(x)
        if self.distilled:
            x = x[:, :2]
        elif self.classifier == 'token':
            x = x[:, 0]
        elif self.classifier == 'gap':
            x = x.mean(dim=1)
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        outputs['pre_logits'] = x
        if self.hidden is not None:
            x = torch.relu(self.hidden(x))
        if self.head is not None and self.head_dist is not None:
            outputs['logits'] = (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        elif self.head is not None:
            outputs['logits'] = self.head(x)
        return outputs


class StandardisedConv(nn.Module):
    """Convolution with a kernel of mean 0 and deviation 1 per output channel; "SAME" padding."""

    def __init__(self, reader: _Reader, module: str, stride: int = 1):
        super().__init__()
        kernel = reader.get(f'{module}/kernel').permute(3, 2, 0, 1)
        self.weight, self.stride = nn.Parameter(kernel), stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, F, h, w] to [B, G, ceil(h / stride), ceil(w / stride)]."""
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = w.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        x = _same_padding(x, w.shape[2], self.stride, 0.0)
        return F.conv2d(x, w / (std + STANDARDISATION_EPSILON), stride=self.stride)


class ResidualUnit(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut, which is projected where shapes change."""

    def __init__(self, reader: _Reader, module: str, stride: int):
        super().__init__()
        self.project = None
        if f'{module}/conv_proj' in reader:
            self.project = StandardisedConv(reader, f'{module}/conv_proj', stride)
            self.norm = _group_norm(reader, f'{module}/gn_proj')
        self.convs = nn.ModuleList(
            StandardisedConv(reader, f'{module}/conv{i}', stride if i == 2 else 1)
            for i in (1, 2, 3)
        )
        self.norms = nn.ModuleList(_group_norm(reader, f'{module}/gn{i}') for i in (1, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, F, h, w] to [B, G, ceil(h / stride), ceil(w / stride)]."""
        y = torch.relu(self.norms[0](self.convs[0](x)))
        y = torch.relu(self.norms[1](self.convs[1](y)))
        y = self.norms[2](self.convs[2](y))
        return torch.relu(y + (x if self.project is None else self.norm(self.project(x))))


class ResNet(nn.Module):
    """Root (7x7 convolution and pooling, each of stride 2) and any number of stages."""

    def __init__(self, reader: _Reader):
        super().__init__()
        self.conv, self.norm = (
            StandardisedConv(reader, 'conv_root', 2),
            _group_norm(reader, 'gn_root'),
        )
        self.units = nn.ModuleList()
        stage = 1
        while f'block{stage}' in reader:
            unit = 1
            while f'block{stage}/unit{unit}' in reader:
                stride = 2 if unit == 1 and stage > 1 else 1
                self.units.append(ResidualUnit(reader, f'block{stage}/unit{unit}', stride))
                unit += 1
            stage += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, height, width] to [B, F, h, w]."""
        x = torch.relu(self.norm(self.conv(x)))
        x = F.max_pool2d(_same_padding(x, 3, 2, -torch.inf), 3, stride=2)
        for unit in self.units:
            x = unit(x)
        return x


class MlpMixer(nn.Module):
    """MLPs over tokens and over channels in turn, mean over tokens, head."""

    def __init__(self, reader: _Reader, gelu: str):
        super().__init__()
        self.stem = reader.patches('stem')
        self.blocks = nn.ModuleList()
        while f'MixerBlock_{len(self.blocks)}' in reader:
            self.blocks.append(MixerBlock(reader, f'MixerBlock_{len(self.blocks)}', gelu))
        self.norm = reader.layer_norm('pre_head_layer_norm')
        self.head = reader.linear('head') if 'head' in reader else None

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images to outputs, see the top of the file."""
        x = self.stem(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        outputs = {'patch_embedding': x}
        for i, block in enumerate(self.blocks):
            x = outputs[f'MixerBlock_{i}'] = block(x)
        x = outputs['pre_logits'] = self.norm(x).mean(dim=1)
        if self.head is not None:
            outputs['logits'] = self.head(x)
        return outputs


class MixerBlock(nn.Module):
    """One block of a Mixer."""

    def __init__(self, reader: _Reader, module: str, gelu: str):
        super().__init__()
        self.norm1 = reader.layer_norm(f'{module}/LayerNorm_0')
        self.tokens = Mlp(reader, f'{module}/token_mixing', gelu)
        self.norm2 = reader.layer_norm(f'{module}/LayerNorm_1')
        self.channels = Mlp(reader, f'{module}/channel_mixing', gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, D] to [B, N, D]."""
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


def _group_norm(reader: _Reader, module: str) -> nn.GroupNorm:
    scale = reader.get(f'{module}/scale').reshape(-1)  # [1, 1, 1, F] in the files
    layer = nn.GroupNorm(32, len(scale), eps=GROUP_NORM_EPSILON, device='meta')
    layer.weight = nn.Parameter(scale)
    layer.bias = nn.Parameter(reader.get(f'{module}/bias').reshape(-1))
    return layer


def _same_padding(x: torch.Tensor, kernel: int, stride: int, value: float) -> torch.Tensor:
    """TensorFlow's "SAME": ceil(size / stride) outputs, the odd one of the padding at the end."""
    padding = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding, value=value)
