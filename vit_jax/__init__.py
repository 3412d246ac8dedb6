"""vit_jax: Vision Transformers in JAX/Flax, from released weights to a deployed model.

Start reading at `vit_jax/main.py` (the command line) and `vit_jax/train.py` (the training loop).
"""

__version__ = '0.1.0'
