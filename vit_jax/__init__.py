"""vit_jax: Vision Transformers in JAX/Flax, from released weights to a deployed model.

Start reading at `vit_jax/main.py` (the command line) and `vit_jax/train.py` (the training loop).
"""

import importlib

__version__ = '0.1.0'


def __getattr__(name: str):
    """`model_folder`, and `predict(model, files)`, imported when they are asked for."""
    if name == 'model_folder':
        return importlib.import_module('vit_jax.inference.model_folder')
    if name == 'predict':
        return importlib.import_module('vit_jax.inference.predict').predict
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
