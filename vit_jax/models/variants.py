"""The table of models: every name, and what it is made of.

Sizes are those of the ViT paper (Table 1), "How to train your ViT?" (Table 2) and the released
checkpoints. A name spells family, size and patch size: `ViT-B_16` is the Base model on 16 x 16
patches.
"""

import difflib

import ml_collections

# hidden_size, mlp_dim, num_heads, num_layers
_SIZES = {
    'Ti': (192, 768, 3, 12),
    'S': (384, 1536, 6, 12),
    'B': (768, 3072, 12, 12),
    'L': (1024, 4096, 16, 24),
    'H': (1280, 5120, 16, 32),
}


def _vit(
    size: str, patch: int, dropout_rate: float = 0.0, classifier: str = 'token', suffix: str = ''
) -> dict:
    hidden_size, mlp_dim, num_heads, num_layers = _SIZES[size]
    return dict(
        model_name=f'ViT-{size}_{patch}{suffix}',
        patches=dict(size=(patch, patch)),
        hidden_size=hidden_size,
        transformer=dict(
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            attention_dropout_rate=0.0,
            dropout_rate=dropout_rate,
        ),
        classifier=classifier,
        representation_size=None,
    )


VARIANTS: dict[str, dict] = {
    config['model_name']: config
    for config in (
        _vit('Ti', 16),
        _vit('S', 16),
        _vit('S', 32),
        _vit('B', 8),
        _vit('B', 16),
        _vit('B', 32),
        _vit('L', 16, dropout_rate=0.1),
        _vit('L', 32),
        _vit('H', 14, dropout_rate=0.1),
        # Mean of all tokens instead of a class token, and no pre_logits: what the GSAM weights are.
        _vit('S', 16, classifier='gap', suffix='-gap-norep'),
        _vit('S', 32, classifier='gap', suffix='-gap-norep'),
        _vit('B', 16, classifier='gap', suffix='-gap-norep'),
        _vit('B', 32, classifier='gap', suffix='-gap-norep'),
    )
}


def get_config(name: str) -> ml_collections.ConfigDict:
    """The architecture of a variant, as a new `ConfigDict` that may be changed.

    Args:
      name: a key of `VARIANTS`, such as 'ViT-B_16'.

    Returns:
      model_name, patches.size, hidden_size, transformer.{mlp_dim, num_heads, num_layers,
      attention_dropout_rate, dropout_rate}, classifier, representation_size (an int that may be
      set, or None).

    Raises:
      ValueError: no such variant; the message names the nearest.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(f'unknown model {name!r}; nearest: {near!r}; known: {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict(VARIANTS[name])
    if config.representation_size is None:
        config.representation_size = ml_collections.config_dict.placeholder(int)
    return config
