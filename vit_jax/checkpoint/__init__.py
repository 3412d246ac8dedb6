"""Weights: reading and writing released files, fitting them to a model, checkpoints of a run.

The names of the original release (`load`, `load_pretrained`) keep their meaning.
"""

from vit_jax.checkpoint import adapt
from vit_jax.checkpoint.adapt import Report
from vit_jax.checkpoint.arrays import Weights
from vit_jax.checkpoint.formats import load, load_pretrained, open_weights
from vit_jax.checkpoint.npz import save

__all__ = ['Report', 'Weights', 'adapt', 'load', 'load_pretrained', 'open_weights', 'save']
