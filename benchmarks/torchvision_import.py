"""Importing torchvision in a process that compares with it."""

import sys
from typing import Any

_operators: list[Any] = []  # as long as the process lives, or the declarations go with it


def load() -> Any:
    """The module, also where its compiled operators do not fit PyTorch's build.

    They are for object detection; declared, they need not work.
    """
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
        for name in [n for n in sys.modules if n.split('.')[0] == 'torchvision']:
            del sys.modules[name]
        _operators.append(torch.library.Library('torchvision', 'DEF'))
        for name in ('nms', 'qnms'):
            _operators[0].define(f'{name}(Tensor a) -> Tensor')
        import torchvision
    return torchvision
