"""Exports a Hugging Face folder by torch.onnx: the other side of benchmark_export.py.

python -m benchmarks.torch_onnx FOLDER OUT.onnx
"""

import sys
import warnings
from typing import Any

import torch
import transformers


class Logits(torch.nn.Module):
    """The model without transformers' output classes, which torch.onnx does not know."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[batch, 3, side, side] in [-1, 1] to logits [batch, C]."""
        return self.model(image).logits


def main(folder: str, output: str) -> None:
    """Writes `output`, opset 20, of the ViT in `folder`."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.ViTForImageClassification.from_pretrained(folder, local_files_only=True)
    side: Any = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # deprecations inside PyTorch
        torch.onnx.export(
            Logits(model.eval()),
            (torch.zeros(2, 3, side, side),),
            output,
            input_names=['image'],
            output_names=['logits'],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            opset_version=20,
            external_data=False,
            dynamo=True,
            verbose=False,
        )


if __name__ == '__main__':
    main(*sys.argv[1:])
