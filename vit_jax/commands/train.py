"""Fine-tunes the model of a config; --help lists every knob. As `python -m vit_jax.main`."""

import sys


def main() -> None:
    """Runs the command line, and exits with its status."""
    from vit_jax import main as training  # half a second, which --help of all commands needs not

    sys.path.insert(0, '')  # as `python -m` does: a config file imports what lies in this folder
    training.run()
