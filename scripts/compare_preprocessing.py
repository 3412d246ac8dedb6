"""Measures what differences in preprocessing cost: grey levels, and how often the answer stays.

The images go through the model as in its evaluation, and once more for each mistake that programs
make around a model: another resize, another range of values, and so on. The table is Markdown; the
one in docs/serving.md was made with this.

Example:
    python scripts/compare_preprocessing.py --model flowers.onnx photos/
"""

import argparse
import io
import pathlib
import runpy
import sys
import types

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import cli

EXAMPLE = pathlib.Path(__file__).resolve().parent.parent / 'docs' / 'serving' / 'classify.py'
BATCH = 20


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.make_parser(__doc__)
    parser.add_argument('--model', required=True, help='as for vit_jax predict')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='file, folder or pattern')
    args = parser.parse_args()
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    # Not at the top: they take time, and --help should not.
    from vit_jax.data.preprocess import Preprocess
    from vit_jax.errors import UserError
    from vit_jax.inference import classifier, predict

    images = predict.find_images(args.images)
    model = classifier.open_classifier(args.model, labels='none')
    if model.preprocess.describe() != Preprocess(model.preprocess.size[0]).describe():
        raise UserError(
            f'{args.model} sees {model.preprocess.describe()}; this compares with squares that are '
            'squashed without antialiasing'
        )
    _compare(model, images)


def _compare(model, images: list[str]) -> None:
    import numpy as np

    from vit_jax.data.decode import load_image
    from vit_jax.inference import predict

    differences = _differences(model.preprocess.crop)
    totals = {name: [0.0, 0.0, 0] for name in differences}  # mean and largest |levels|, agreements
    for first in range(0, len(images), BATCH):
        paths = images[first : first + BATCH]
        upright = [predict.read_image(path) for path in paths]
        right = np.stack([load_image(image, model.preprocess) for image in upright])
        answer = np.argmax(model.logits(right), axis=1)
        for name, (make, _) in differences.items():
            pixels = np.stack([make(*pair) for pair in zip(paths, upright, strict=True)])
            gap = np.abs(pixels - right)
            total = totals[name]
            total[0] += gap.mean(axis=(1, 2, 3)).sum()
            total[1] = max(total[1], gap.max())
            total[2] += int((np.argmax(model.logits(pixels), axis=1) == answer).sum())
        print(f'\r{first + len(paths)} of {len(images)} images', end='', file=sys.stderr)
    print(file=sys.stderr)
    print(f'| what differs | grey levels, mean | largest | same answer, of {len(images)} |')
    print('|---|---:|---:|---:|')
    for name, (_, in_levels) in differences.items():
        mean, largest, agree = totals[name]
        levels = (f'{mean / len(images):.3g}', f'{largest:.3g}') if in_levels else ('', '')
        print(f'| {name} | {levels[0]} | {levels[1]} | {agree} ({agree / len(images):.1%}) |')


def _differences(side: int) -> dict:
    """All that is compared.

    Returns:
      By name: a function (path, upright pixels) -> float32 [side, side, 3], grey levels or what the
      model takes for them; and whether it is a difference of grey levels.
    """
    import cv2
    import numpy as np
    from PIL import Image, ImageOps

    from vit_jax.data import decode, image_files
    from vit_jax.data.resample import resize_bilinear

    example = types.SimpleNamespace(**runpy.run_path(str(EXAMPLE)))

    def pillow_pixels(path):
        image = image_files.open_image(decode.read_file(path))
        return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))

    def pillow_resize(image, size, method):
        return np.asarray(Image.fromarray(image).resize(size, method), np.float32)

    def crop(image, short, method):
        """Short side to `short`, keeping proportions; then the square in the middle."""
        height, width = image.shape[:2]
        scale = short / min(height, width)
        size = max(side, round(width * scale)), max(side, round(height * scale))
        resized = pillow_resize(image, size, method)
        y, x = (size[1] - side) // 2, (size[0] - side) // 2
        return resized[y : y + side, x : x + side]

    def as_levels(values):
        """The grey levels from which a model that takes [-1, 1] would get these values."""
        return np.float32((values + 1) * 127.5)

    def recompressed(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, 'JPEG', quality=75)
        return np.asarray(Image.open(buffer, formats=['JPEG']))

    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    bilinear, bicubic = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC

    def squash(image):
        return resize_bilinear(image, side)

    return {
        '`docs/serving/classify.py`': (
            lambda path, _: example.read_image(path, {'crop': side}), True),
        'its resize alone, on the same decoded pixels': (
            lambda _, image: example.resize(image, (side, side)), True),
        "JPEG decoded with libjpeg's accurate transform (Pillow's default)": (
            lambda path, _: squash(pillow_pixels(path)), True),
        'pixels rounded to whole grey levels (uint8)': (
            lambda _, image: np.rint(squash(image)), True),
        'resized in uint8 (`cv2.resize` of bytes)': (
            lambda _, image: np.float32(cv2.resize(image, (side, side))), True),
        'resized with antialiasing (Pillow, Hugging Face, torchvision)': (
            lambda _, image: pillow_resize(image, (side, side), bilinear), True),
        'nearest pixel instead of bilinear': (
            lambda _, image: np.float32(
                cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST)), True),
        f'short side to {round(side * 256 / 224)}, crop of {side} from the middle': (
            lambda _, image: crop(image, round(side * 256 / 224), bilinear), True),
        f'the same, 0.9 and bicubic (timm): {round(side / 0.9)}, then {side}': (
            lambda _, image: crop(image, round(side / 0.9), bicubic), True),
        'JPEG once more, quality 75': (lambda _, image: squash(recompressed(image)), True),
        'BGR instead of RGB (OpenCV)': (lambda _, image: squash(image)[..., ::-1], True),
        'range [0, 1] instead of [-1, 1]': (
            lambda _, image: as_levels(squash(image) / 255), False),
        "ImageNet's mean and deviation instead of [-1, 1]": (
            lambda _, image: as_levels((squash(image) / 255 - mean) / deviation), False),
        'range [0, 255] instead of [-1, 1]': (lambda _, image: as_levels(squash(image)), False),
        'a photo that was taken upright, lying (EXIF orientation ignored)': (
            lambda _, image: squash(np.ascontiguousarray(np.rot90(image))), True),
    }  # fmt: skip


if __name__ == '__main__':
    sys.exit(main())
