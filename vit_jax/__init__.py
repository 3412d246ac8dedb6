"""vit_jax: Vision Transformers in JAX/Flax, from released weights to a deployed model.

Start reading at `vit_jax/main.py` (the command line) and `vit_jax/train.py` (the training loop).
"""

import importlib

__version__ = '0.1.0'


def __getattr__(name: str):
    """`from vit_jax import model_folder` and `predict`, imported when they are asked for."""
    if name in ('model_folder', 'predict'):
        return importlib.import_module(f'vit_jax.inference.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
