"""Says what is on images, by ONNX Runtime; needs onnxruntime, numpy and Pillow, nothing else.

pip install onnxruntime numpy pillow
python classify.py flowers.onnx photo.jpg another.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Classifier:
    """An ONNX file written by vit_jax export; its metadata tell all that is needed to use it."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.class_names = json.loads(metadata['class_names'])
        self.preprocessing = json.loads(metadata['preprocessing'])
        self.low, self.high = json.loads(metadata['value_range'])
        self.layout = metadata['layout']
        self.output = metadata['output']  # 'logits' or 'probabilities'
        self.multi_label = 'multi_label' in metadata  # classes do not exclude each other
        self.numbers = json.loads(metadata.get('task', '{}')).get('kind') == 'numbers'
        self.takes_bytes = self.session.get_inputs()[0].type == 'tensor(uint8)'

    def __call__(self, paths):
        """Probabilities, [images, classes], or numbers, of image files; one batch, of any size."""
        # [images, height, width, 3], 0 to 255
        pixels = np.stack([read_image(path, self.preprocessing) for path in paths])
        if self.takes_bytes:
            pixels = np.rint(pixels).astype(np.uint8)
        else:
            pixels = pixels * np.float32((self.high - self.low) / 255) + np.float32(self.low)
        if self.layout == 'NCHW':
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        (scores,) = self.session.run([self.output], {'image': pixels})
        if self.output == 'probabilities' or self.numbers:
            return scores
        return 1 / (1 + np.exp(-scores)) if self.multi_label else softmax(scores)


def read_image(path, settings):
    """An image as the model was evaluated on: float32 [height, width, 3], RGB, 0 to 255."""
    with Image.open(path, formats=['JPEG', 'PNG', 'WEBP', 'BMP']) as image:
        # As people see it, whatever the camera stored.
        image = ImageOps.exif_transpose(image).convert('RGB')
    crop, form = _pair(settings['crop']), settings.get('eval', 'squash')
    whole = crop if form == 'squash' else _pair(settings.get('resize') or settings['crop'])
    if form == 'resize_crop':  # keeps the proportions
        scale = max(whole[0] / image.height, whole[1] / image.width)
        whole = tuple(
            max(least, int(side * scale + 1e-6))
            for least, side in zip(whole, (image.height, image.width), strict=True)
        )
    interpolation = settings.get('interpolation', 'bilinear')
    if settings.get('antialias'):
        filter_ = Image.Resampling[interpolation.upper()]
        pixels = np.asarray(image.resize(whole[::-1], filter_), np.float32)
    elif interpolation == 'bilinear':
        pixels = resize(np.asarray(image), whole)
    else:
        raise SystemExit(f'{interpolation} without antialiasing is not in this example')
    half = round if settings.get('centre') == 'half_even' else int
    top, left = (half((a - b) / 2) for a, b in zip(whole, crop, strict=True))
    return pixels[top : top + crop[0], left : left + crop[1]]


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def resize(image, size):
    """Squashes [height, width, 3] to (height, width): bilinear, not antialiased, not rounded.

    Pillow's own resize would average over more pixels when it makes an image smaller.
    """
    top, bottom, down = _neighbours(image.shape[0], size[0])
    left, right, across = _neighbours(image.shape[1], size[1])
    down, across = down[:, None, None], across[:, None]
    rows = image[top].astype(np.float32) * (1 - down) + image[bottom].astype(np.float32) * down
    return rows[:, left] * (1 - across) + rows[:, right] * across


def _neighbours(length, new):
    """For each new pixel the two old ones around its centre, and the weight of the second."""
    centre = np.clip((np.arange(new) + 0.5) * (length / new) - 0.5, 0, length - 1)
    first = centre.astype(int)
    return first, np.minimum(first + 1, length - 1), (centre - first).astype(np.float32)


def softmax(logits):
    """Probabilities of each row."""
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


if __name__ == '__main__':
    classifier = Classifier(sys.argv[1])
    for path, probabilities in zip(sys.argv[2:], classifier(sys.argv[2:]), strict=True):
        print(path)
        for label in np.argsort(-probabilities)[:5]:
            print(f'  {classifier.class_names[label]}  {probabilities[label]:.4f}')
