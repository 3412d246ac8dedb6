"""A run of seconds on coloured digits with their captions."""

import ml_collections

from vit_jax.configs import lit_digits


def get_config() -> ml_collections.ConfigDict:
    config = lit_digits.get_config()
    config.model.image.hidden_size, config.model.image.patches.size = 16, (8, 8)
    config.model.image.transformer.update(mlp_dim=32, num_heads=2, num_layers=1)
    config.model.text.update(hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2)
    config.model.out_dim = 16
    config.pp.train, config.pp.test = 'train[:200]', 'train[-41:]'
    config.batch, config.batch_eval = 32, 24
    config.total_steps, config.warmup_steps = 12, 2
    config.progress_every, config.eval_every, config.checkpoint_every = 1, 6, 6
    config.report = False
    # Adam's division would blow up differences in the last bit.
    config.optimizer, config.optim_dtype, config.base_lr = 'sgd', 'float32', 0.01
    return config
