"""Vision Transformer, hybrid, MLP-Mixer and DeiT in PyTorch: the other side of check_parity.py.

Written from the papers (ViT https://arxiv.org/abs/2010.11929, Big Transfer 1912.11370, Mixer
2105.01601, DeiT 2012.12877) and the published format of the weights, on purpose without a line of
vit_jax: two programs that agree are evidence only if they were not made from one another.

    weights = read_weights('ViT-B_16.npz')
    outputs = build(weights, classifier='token', image_size=224)(images)
    outputs['logits']

Shapes: B batch, N tokens, D width, H heads, K head size, C classes. Images are [B, height, width,
3] in [-1, 1], as everywhere in this project. A model returns a dict in the order of the
computation: 'resnet' [B, h, w, F] (hybrids), 'patch_embedding' [B, N, D], the tokens after every
block, 'encoderblock_0' or 'MixerBlock_0' [B, N, D], 'pre_logits' (what the head reads; of a DeiT
[B, 2, D]) and 'logits' [B, C] if there is a head.
"""

import itertools
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP_NORM_EPSILON = 1e-6
STANDARDISATION_EPSILON = 1e-5  # added to the standard deviation
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
    'gelu': F.gelu,
    'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x),
    'relu': F.relu,
    'silu': F.silu,
    'tanh': torch.tanh,
}


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


def build(
    weights: Mapping[str, np.ndarray],
    *,
    classifier: str,
    image_size: int | tuple[int, int],
    act: str = 'gelu_tanh',
    layer_norm_eps: float = 1e-6,
    representation_act: str = 'tanh',
) -> 'Reference':
    """The model that the names and shapes of the weights describe, with these weights.

    Args:
        weights: name -> float32 array; not copied.
        classifier: of a Vision Transformer: 'token', 'gap', 'max', 'avgmax' (mean, maximum, and the
            mean of both, of the patch tokens), 'unpooled' or 'token_unpooled'.
        image_size: side or (height, width) of its images, pixels; it is tried on a black one.
        act: activation function of the MLPs, a name in `ACTIVATIONS`.
        layer_norm_eps: epsilon of LayerNorm.
        representation_act: activation function of `pre_logits`.

    Returns:
        A module in evaluation mode: images to a dict of outputs, see the top of this file.

    Raises:
        KeyError: an array is missing.
        ValueError, RuntimeError: an array belongs to no part of the model, or does not fit.
    """
    acts = ACTIVATIONS[act], ACTIVATIONS[representation_act]
    model = Reference(weights, classifier, acts, layer_norm_eps)
    with torch.inference_mode():
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        first = next(n for n in ('conv_root', 'embedding', 'stem') if f'{n}/kernel' in weights)
        model(torch.zeros(1, height, width, weights[f'{first}/kernel'].shape[2]))
    if unused := weights.keys() - model.used:
        raise ValueError(f'weights of no part of the model: {", ".join(sorted(unused))}')
    return model


class Reference(nn.Module):
    """The model; a method for each layer, called with the layer's name among the weights.

    Args:
        weights: see `build`.
        classifier: see `build`.
        acts: activation functions of the MLPs and of `pre_logits`.
        epsilon: of LayerNorm.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        classifier: str,
        acts: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
        epsilon: float,
    ):
        super().__init__()
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in weights.items()}
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        )
        self.classifier, self.acts, self.epsilon = classifier, acts, epsilon
        self.used: set[str] = set()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images to outputs, see the top of the file."""
        x = images.permute(0, 3, 1, 2)
        return self.mixer(x) if self.has('stem') else self.vision_transformer(x)

    def vision_transformer(self, x: Tensor) -> dict[str, Tensor]:
        """ViT; with `conv_root` among the weights a hybrid, with `dist` a DeiT."""
        outputs = {}
        if self.has('conv_root'):
            x = self.resnet(x)
            outputs['resnet'] = x.permute(0, 2, 3, 1)
        x = outputs['patch_embedding'] = self.patches(x, 'embedding')
        tokens = [name for name in ('cls', 'dist') if name in self.weights]
        if self.classifier in ('token', 'token_unpooled') and not tokens:
            raise ValueError(
                f'classifier {self.classifier!r}, but the weights have tokens {tokens}'
            )
        x = torch.cat([*(self.get(name).expand(len(x), -1, -1) for name in tokens), x], dim=1)
        x = x + self.get('Transformer/posembed_input/pos_embedding')
        for i in itertools.count():
            if not self.has(name := f'Transformer/encoderblock_{i}'):
                break
            x = outputs[f'encoderblock_{i}'] = self.encoder_block(x, name)
        if self.has('Transformer/encoder_norm'):
            x = self.layer_norm(x, 'Transformer/encoder_norm')
        distilled = 'dist' in tokens
        patches = x[:, len(tokens) :]
        if distilled:
            x = x[:, :2]
        elif self.classifier == 'token':
            x = x[:, 0]
        elif self.classifier == 'gap':
            x = patches.mean(dim=1)
        elif self.classifier == 'max':
            x = patches.amax(dim=1)
        elif self.classifier == 'avgmax':
            x = (patches.mean(dim=1) + patches.amax(dim=1)) / 2
        if self.has('fc_norm'):
            x = self.layer_norm(x, 'fc_norm')
        if self.has('pre_logits'):
            x = self.acts[1](self.linear(x, 'pre_logits'))
        outputs['pre_logits'] = x
        if self.has('head_hidden'):
            x = torch.relu(self.linear(x, 'head_hidden'))
        if self.has('head') and distilled:
            heads = self.linear(x[:, 0], 'head'), self.linear(x[:, 1], 'head_dist')
            outputs['logits'] = (heads[0] + heads[1]) / 2
        elif self.has('head'):
            outputs['logits'] = self.linear(x, 'head')
        return outputs

    def mixer(self, x: Tensor) -> dict[str, Tensor]:
        """MLPs over tokens and over channels in turn, mean over tokens, head."""
        x = self.patches(x, 'stem')
        outputs = {'patch_embedding': x}
        for i in itertools.count():
            if not self.has(name := f'MixerBlock_{i}'):
                break
            y = self.layer_norm(x, f'{name}/LayerNorm_0').transpose(1, 2)
            x = x + self.mlp(y, f'{name}/token_mixing').transpose(1, 2)
            y = self.layer_norm(x, f'{name}/LayerNorm_1')
            x = outputs[name] = x + self.mlp(y, f'{name}/channel_mixing')
        x = outputs['pre_logits'] = self.layer_norm(x, 'pre_head_layer_norm').mean(dim=1)
        if self.has('head'):
            outputs['logits'] = self.linear(x, 'head')
        return outputs

    def encoder_block(self, x: Tensor, name: str) -> Tensor:
        """Attention, then MLP; each on normalised tokens [B, N, D], and added to the tokens."""
        y = self.layer_norm(x, f'{name}/LayerNorm_0')
        x = x + self.attention(y, self.either(name, 'MultiHeadDotProductAttention_', '10'))
        y = self.layer_norm(x, self.either(name, 'LayerNorm_', '21'))
        return x + self.mlp(y, self.either(name, 'MlpBlock_', '30'))

    def attention(self, x: Tensor, name: str) -> Tensor:
        """softmax(Q K^T / sqrt(K)) V for each head, then a projection of all heads together."""
        heads = self.get(f'{name}/query/kernel').shape[1]
        q, k, v = (
            self.linear(x, f'{name}/{part}').unflatten(2, (heads, -1)).transpose(1, 2)
            for part in ('query', 'key', 'value')  # [B, H, N, K]
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), f'{name}/out', inputs=2)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        """Dense, activation, dense, over the last axis."""
        x = self.acts[0](self.linear(x, f'{name}/Dense_0'))
        return self.linear(x, f'{name}/Dense_1')

    def linear(self, x: Tensor, name: str, inputs: int = 1) -> Tensor:
        """A dense layer; the first `inputs` axes of its kernel are inputs, the rest outputs."""
        kernel = self.get(f'{name}/kernel').flatten(0, inputs - 1).flatten(1)
        return x @ kernel + self.get(f'{name}/bias').flatten()

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        """Over the last axis."""
        scale, bias = self.get(f'{name}/scale'), self.get(f'{name}/bias')
        return F.layer_norm(x, scale.shape, scale, bias, self.epsilon)

    def patches(self, x: Tensor, name: str) -> Tensor:
        """Images to [B, N, D]: a convolution, kernel [height, width, input, D], without overlap."""
        kernel = self.get(f'{name}/kernel').permute(3, 2, 0, 1)
        x = F.conv2d(x, kernel, self.get(f'{name}/bias'), stride=kernel.shape[2:])
        return x.flatten(2).transpose(1, 2)

    def resnet(self, x: Tensor) -> Tensor:
        """Root (7x7 convolution and pooling, each of stride 2) and any number of stages."""
        x = torch.relu(self.group_norm(self.conv(x, 'conv_root', 2), 'gn_root'))
        x = F.max_pool2d(_same_padding(x, 3, 2, -torch.inf), 3, stride=2)
        stage = unit = 1
        while self.has(f'block{stage}'):
            while self.has(name := f'block{stage}/unit{unit}'):
                x = self.residual_unit(x, name, 2 if unit == 1 and stage > 1 else 1)
                unit += 1
            stage, unit = stage + 1, 1
        return x

    def residual_unit(self, x: Tensor, name: str, stride: int) -> Tensor:
        """1x1, 3x3, 1x1 convolution beside a shortcut, which is projected where shapes change."""
        y = torch.relu(self.group_norm(self.conv(x, f'{name}/conv1'), f'{name}/gn1'))
        y = torch.relu(self.group_norm(self.conv(y, f'{name}/conv2', stride), f'{name}/gn2'))
        y = self.group_norm(self.conv(y, f'{name}/conv3'), f'{name}/gn3')
        if self.has(f'{name}/conv_proj'):
            x = self.group_norm(self.conv(x, f'{name}/conv_proj', stride), f'{name}/gn_proj')
        return torch.relu(y + x)

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        """Convolution, kernel of mean 0 and deviation 1 per output channel, "SAME" padding."""
        w = self.get(f'{name}/kernel').permute(3, 2, 0, 1)
        w = w - w.mean(dim=(1, 2, 3), keepdim=True)
        std = w.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        x = _same_padding(x, w.shape[2], stride, 0.0)
        return F.conv2d(x, w / (std + STANDARDISATION_EPSILON), stride=stride)

    def group_norm(self, x: Tensor, name: str) -> Tensor:
        """32 groups of channels; scale and bias are [1, 1, 1, F] in the files."""
        scale, bias = (self.get(f'{name}/{part}').flatten() for part in ('scale', 'bias'))
        return F.group_norm(x, 32, scale, bias, GROUP_NORM_EPSILON)

    def get(self, name: str) -> Tensor:
        """The weight of this name, which is noted as used."""
        self.used.add(name)
        return self.weights[name]

    def has(self, name: str) -> bool:
        """Whether there are weights of this layer."""
        return any(key.startswith(f'{name}/') for key in self.weights)

    def either(self, parent: str, name: str, numbers: str) -> str:
        """The layer of `parent` that is there: the generations of files number differently."""
        names = [f'{parent}/{name}{number}' for number in numbers]
        return next(filter(self.has, names), parent)


def _same_padding(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """TensorFlow's "SAME": ceil(size / stride) outputs, the odd one of the padding at the end."""
    padding = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding, value=value)
