"""`vit_jax finetune`: from photos to a model, in the time there is. Begin with `finetune.py`."""
