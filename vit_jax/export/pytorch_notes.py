"""The pages that go with exported models, and what the user is told when one is written."""

from collections.abc import Mapping
from typing import Any

from vit_jax import variants

_EXACT_PIXELS = """\
## Preprocessing

The model was trained on pixels that are resized to {size} x {size} bilinearly *without*
antialiasing (aspect ratio not kept), then mapped from [0, 255] to [-1, 1]. {how}
{measured}
To preprocess exactly:

```python
import cv2, numpy as np, torch
from PIL import Image

pixels = np.asarray(Image.open('photo.jpg').convert('RGB'), np.float32)
pixels = cv2.resize(pixels, ({size}, {size}), interpolation=cv2.INTER_LINEAR)
images = torch.from_numpy((pixels - 127.5) / 127.5).permute(2, 0, 1)[None]
```
"""
# Ti/16 (DeiT weights) on 260 flower photos of 500 x 375 pixels and less, at 224 px: the pixels of
# transformers 5.23 and timm 1.0.31, and the most probable of 1000 classes, against this package's.
_MEASURED = """
Measured with a Ti/16 on 260 photos of flowers, at 224 pixels: the pixels differ by 2.4 grey levels
(of 255) on average, by 10 in the photo that differs most; the most probable of 1000 ImageNet
classes is the same for 241 of the 260.
"""


def warnings(to: str, config: Mapping[str, Any]) -> list[str]:
    """What the user should know about an export, a sentence each.

    Args:
        to: 'timm', 'huggingface' or 'torchvision'.
        config: the architecture.
    """
    notes = []
    if to == 'torchvision' or (to == 'timm' and variants.is_mixer(config)):
        page = 'NOTE.md' if to == 'torchvision' else 'README.md'
        notes.append(
            'this class computes GELU in its erf form, which changes logits by 1e-3 to 2e-2; '
            f'{page} in the folder says how to set the tanh form'
        )
    if config.get('resnet') is not None:
        notes.append(
            'timm standardises convolution weights with another epsilon: logits differ by about '
            '1e-5 to 1e-4'
        )
    if to == 'torchvision':
        notes.append('input is [-1, 1]: mean and standard deviation 0.5, not those of ImageNet')
    else:
        notes.append(
            f'{to} resizes images with antialiasing, this package without: README.md in '
            'the folder says how far its pixels are and how to preprocess exactly'
        )
    return notes


def hugging_face(image_size: int, model_class: str) -> str:
    """README.md of a Hugging Face folder.

    Args:
        image_size: side of the input, pixels.
        model_class: of transformers.
    """
    pooling = ''
    if model_class == 'ViTModel':
        pooling = (
            '\nA model without `pre_logits` has no pooler: '
            "`ViTModel.from_pretrained('this_folder', add_pooling_layer=False)`.\n"
        )
    return f"""\
# A Vision Transformer, written by vit_jax

```python
from transformers import AutoImageProcessor, {model_class}

model = {model_class}.from_pretrained('this_folder')
processor = AutoImageProcessor.from_pretrained('this_folder')
```
{pooling}
`config.json` asks for the tanh form of GELU (`gelu_pytorch_tanh`) and LayerNorm epsilon 1e-6, with
which the logits equal vit_jax's to about 1e-5. (transformers' defaults, `gelu` and 1e-12, would
change them by 1e-3 and more.)

""" + _EXACT_PIXELS.format(
        size=image_size,
        how='`processor` resizes with antialiasing, which\ngives other pixels for large photos.',
        measured=_MEASURED,
    )


def timm(image_size: int, *, mixer: bool, hybrid: bool) -> str:
    """README.md of a timm folder.

    Args:
        image_size: side of the input, pixels.
        mixer: whether the model is an MLP-Mixer.
        hybrid: whether it has a ResNet in front.
    """
    tanh = (
        '`config.json` asks for the tanh form of GELU (`act_layer="gelu_tanh"`), with which the '
        "logits\nequal vit_jax's to about 1e-5.\n"
    )
    if mixer:
        tanh = """\
timm's Mixer takes no GELU form from a configuration and computes the erf form, 1e-3 and more
away. For the tanh form, with which the logits equal vit_jax's to about 1e-5:

```python
for block in model.blocks:
    block.mlp_tokens.act = block.mlp_channels.act = torch.nn.GELU(approximate='tanh')
```
"""
    if hybrid:
        tanh += """
timm standardises the weights of the ResNet's convolutions by sqrt(variance + 1e-8) instead of
(standard deviation + 1e-5), which moves the logits by up to about 1e-4.
"""
    return f"""\
# A model written by vit_jax

```python
import timm, torch

model = timm.create_model('local-dir:this_folder', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

{tanh}
""" + _EXACT_PIXELS.format(
        size=image_size,
        how="timm's transform squashes and\nnormalises the same way, but its resize antialiases.",
        measured=_MEASURED,
    )


def torchvision(image_size: int) -> str:
    """NOTE.md of a torchvision folder.

    Args:
        image_size: side of the input, pixels.
    """
    return """\
# A state dict for torchvision's VisionTransformer, written by vit_jax

```python
import json, torch, torchvision
from safetensors.torch import load_file

model = torchvision.models.VisionTransformer(**json.load(open('config.json'))['arguments'])
model.load_state_dict(load_file('model.safetensors'))
for module in model.modules():  # the tanh form of GELU, as the model was trained
    if isinstance(module, torch.nn.GELU):
        module.approximate = 'tanh'
model.eval()
```

With the loop the logits equal vit_jax's to about 1e-5. Without it torchvision computes the erf form
of GELU. Measured, what that costs in logits: at most 8.5e-4, 2.0e-4 on average, with random
weights and logits of standard deviation 1; at most 2.3e-2 with trained weights (DeiT-Ti/16, 20
photos). The most probable class rarely changes.

Input is [-1, 1]: mean 0.5 and standard deviation 0.5, not the ImageNet values of torchvision's own
weights.

""" + _EXACT_PIXELS.format(
        size=image_size,
        how="torchvision's own\ntransforms (resize to 256, centre crop, ImageNet mean) do not fit.",
        measured='',
    )
