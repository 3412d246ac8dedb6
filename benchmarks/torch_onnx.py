"""Exports a Hugging Face folder by torch.onnx: the other side of benchmark_export.py.

python benchmarks/torch_onnx.py FOLDER OUT.onnx --opset 20
"""

import argparse
import sys
import warnings


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('folder', metavar='FOLDER', help='config.json and weights of a ViT')
    parser.add_argument('output', metavar='OUT.onnx', help='the file to write')
    parser.add_argument('--opset', type=int, default=20, help="version of ONNX's operators")
    args = parser.parse_args()

    # Not at the top: they take seconds, and --help should not.
    import torch
    import transformers
    from torch import nn

    class Logits(nn.Module):
        """The model without transformers' output classes, which torch.onnx does not know."""

        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            """[batch, 3, side, side] in [-1, 1] to logits [batch, C]."""
            return self.model(image).logits

    transformers.utils.logging.disable_progress_bar()
    model = transformers.ViTForImageClassification.from_pretrained(
        args.folder, local_files_only=True
    )
    side = model.config.image_size
    with warnings.catch_warnings():
        # Deprecations inside PyTorch, which are not ours to heed.
        warnings.simplefilter('ignore')
        torch.onnx.export(
            Logits(model.eval()),
            (torch.zeros(2, 3, side, side),),
            args.output,
            input_names=['image'],
            output_names=['logits'],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            opset_version=args.opset,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    return 0


if __name__ == '__main__':
    sys.exit(main())
