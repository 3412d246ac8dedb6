"""What tests need that compare models with those of PyTorch."""

import numpy as np

from vit_jax.analysis import compare
from vit_jax.checkpoint import npz


def randomise(module):
    """Random weights of realistic scale, also where a new model has zeros or ones."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                inputs = parameter.shape[-1] if parameter.ndim == 2 else parameter[0].numel()
                parameter.copy_(values * inputs**-0.5)
            else:
                scale = ('norm' in name and 'weight' in name) or 'lambda' in name
                parameter.copy_(values * 0.2 + float(scale))
    return module.eval()


def images(model):
    shape = (3, *model.preprocess.size, 3)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def compute(model, x, dtype='float32'):
    module = model.model.clone(dtype=np.dtype(dtype))

    def apply(params, x):
        return module.apply({'params': params}, x, train=False)

    return np.asarray(compare.compiled(apply, model.params, np.dtype(dtype))(x))


def distance(found, expected):
    """Relative to the largest."""
    return np.abs(found - expected).max() / np.abs(expected).max()


def check_equal(found, expected):
    """Trees of parameters, bit for bit."""
    found, expected = npz.flatten(found), npz.flatten(expected)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key, strict=True)
