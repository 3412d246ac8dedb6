"""A check of `parity.check`: does it notice when our side ignores what a folder states?

Of each setting there are two folders with the same made-up weights: one states it, the other the
common value. Loaded from its own folder, our model has to agree with the library; loaded from the
other, and so without the setting, it must not.
"""

import importlib.util
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks import parity
from vit_jax import files
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

_CONFIG = {
    'hidden_size': 96,
    'num_hidden_layers': 1,
    'num_attention_heads': 6,
    'intermediate_size': 96,
    'hidden_act': 'gelu_pytorch_tanh',
    'layer_norm_eps': 1e-6,
    'patch_size': 8,
    'pooler_output_size': 40,
}
_TIMM = {
    'embed_dim': 96, 'depth': 1, 'num_heads': 6, 'mlp_ratio': 1.0, 'patch_size': 8, 'img_size': 32,
    'fc_norm': False,
}  # fmt: skip
# What is stated -> (file, the setting, the common value, whose folder it is): a ViT with a head of
# transformers, its base model, whose features are pooled with a layer of their own, its DINOv3, or
# timm's ViT.
_CASES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any], str]] = {
    'relu': ('config', {'hidden_act': 'relu'}, {'hidden_act': 'gelu_pytorch_tanh'}, 'head'),
    'erf GELU': ('config', {'hidden_act': 'gelu'}, {'hidden_act': 'gelu_pytorch_tanh'}, 'head'),
    'epsilon 1e-2': ('config', {'layer_norm_eps': 1e-2}, {'layer_norm_eps': 1e-6}, 'head'),
    '12 heads': ('config', {'num_attention_heads': 12}, {'num_attention_heads': 6}, 'head'),
    'pooling': ('config', {'pooler_act': 'relu'}, {'pooler_act': 'tanh'}, 'base'),
    'not square': ('config', {'image_size': [32, 48]}, {'image_size': [48, 32]}, 'head'),
    'rotary': ('config', {'rope_theta': 30.0}, {'rope_theta': 100.0}, 'dinov3'),
    'normalisation': (
        'preprocessor_config',
        {'image_mean': [0.4, 0.5, 0.6], 'image_std': [0.2, 0.2, 0.3]},
        {'image_mean': [0.5] * 3, 'image_std': [0.5] * 3},
        'head',
    ),
    'scale of pixels': (
        'preprocessor_config', {'rescale_factor': 1 / 127.5}, {'rescale_factor': 1 / 255}, 'head',
    ),
    'mean of patches': (
        'config',
        {'model_args': _TIMM | {'global_pool': 'avg'}}, {'model_args': _TIMM}, 'timm',
    ),
}  # fmt: skip


def run(say: Callable[[Any], None] = print, cases: Sequence[str] = tuple(_CASES)) -> bool:
    """Goes over the cases; whether each ended as it should.

    Args:
        say: shows a line to the user.
        cases: which ones.
    """
    good = True
    for name in cases:
        file, stated, common, kind = _CASES[name]
        if kind == 'timm' and importlib.util.find_spec('timm') is None:
            say(f'{name:16} left out: timm is not installed')
            continue
        with tempfile.TemporaryDirectory() as place:
            folder, other = pathlib.Path(place, 'stated'), pathlib.Path(place, 'other')
            of_config = stated if file == 'config' else {}
            _write(folder, kind, {'image_size': 32, **of_config})
            shutil.copytree(folder, other)
            for where, settings in ((folder, stated), (other, common)):
                path = where / f'{file}.json'
                files.write_json(path, json.loads(path.read_text()) | settings)
            as_stated, ignored = _ends(folder, folder), _ends(folder, other)
        as_expected = as_stated != 'FAIL' and ignored != 'PASS'
        good &= as_expected
        mark = '' if as_expected else '  WRONG'
        say(f'{name:16} as stated: {as_stated:8} ignored: {ignored:8}{mark}')
    return good


def _write(folder: pathlib.Path, kind: str, settings: Mapping[str, Any]) -> None:
    """A folder with made-up weights of trained scale."""
    if kind == 'timm':
        import timm
        from safetensors.torch import save_file

        model = _made_up(timm.create_model('vit_tiny_patch16_224', num_classes=5, **_TIMM))
        folder.mkdir()
        save_file(model.state_dict(), folder / 'model.safetensors')
        described = {'architecture': 'vit_tiny_patch16_224', 'num_classes': 5}
        described['pretrained_cfg'] = {'input_size': [3, 32, 32], 'num_classes': 5}
        files.write_json(folder / 'config.json', described)
        return
    import transformers

    transformers.utils.logging.disable_progress_bar()
    classes = {
        'base': transformers.ViTModel,
        'head': transformers.ViTForImageClassification,
        'dinov3': transformers.DINOv3ViTModel,
    }
    stated = {**_CONFIG, **settings}
    stated |= {'num_register_tokens': 2} if kind == 'dinov3' else {'num_labels': 5}
    config = classes[kind].config_class(**stated)
    _made_up(classes[kind](config)).save_pretrained(folder)
    files.write_json(
        folder / 'preprocessor_config.json',
        {
            'image_processor_type': 'ViTImageProcessor', 'do_resize': True, 'resample': 2,
            'size': {'height': 32, 'width': 32}, 'do_rescale': True, 'rescale_factor': 1 / 255,
            'do_normalize': True, 'image_mean': [0.5] * 3, 'image_std': [0.5] * 3,
        },
    )  # fmt: skip


def _made_up(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _ends(folder: pathlib.Path, ours: pathlib.Path) -> str:
    """How the check of a folder ends with our model loaded from another."""
    try:
        result = parity.check(
            str(folder), ours=model_folder.load(ours), limit=2, batch=2, say=lambda line: None
        )
    except UserError:
        return 'refused'
    return 'PASS' if result['passed'] else 'FAIL'
