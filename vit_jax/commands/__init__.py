"""The commands: `vit_jax NAME`, `python -m vit_jax NAME`. Each module has one, in its `main`.

They parse, call the package and print. At the top they import what takes no time, so that --help
and mistakes are quick.
"""

NAMES = (
    'train', 'finetune', 'sweep', 'predict', 'zeroshot', 'evaluate', 'export', 'convert', 'web',
    'report', 'embed', 'probe', 'soup', 'attention', 'summary', 'cost', 'inspect_checkpoint',
    'list_models', 'find_copies',
)  # fmt: skip
