"""`vit_jax soup` in a checkout, installed or not."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax.commands.soup import main

if __name__ == '__main__':
    sys.exit(main())
