"""Exports a Hugging Face folder by torch.onnx: the other side of benchmark_export.py."""

import argparse
import warnings
from collections.abc import Mapping
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


def build(setup: Mapping[str, str]) -> Any:
    """Writes `output`, opset 20, of the ViT in `folder`; there are no steps to time."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.ViTForImageClassification.from_pretrained(
        setup['folder'], local_files_only=True
    )
    side: Any = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # deprecations inside PyTorch
        torch.onnx.export(
            Logits(model.eval()),
            (torch.zeros(2, 3, side, side),),
            setup['output'],
            input_names=['image'],
            output_names=['logits'],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            opset_version=20,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    return argparse.Namespace(facts={})
