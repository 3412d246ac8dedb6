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
        self.side = int(metadata['image_size'])
        self.low, self.high = json.loads(metadata['value_range'])
        self.layout = metadata['layout']
        self.output = metadata['output']  # 'logits' or 'probabilities'
        self.takes_bytes = self.session.get_inputs()[0].type == 'tensor(uint8)'

    def __call__(self, paths):
        """Probabilities, [images, classes], of image files; one batch, of any size."""
        pixels = np.stack([read_image(path, self.side) for path in paths])  # [N, S, S, 3], 0 to 255
        if self.takes_bytes:
            pixels = np.rint(pixels).astype(np.uint8)
        else:
            pixels = pixels * np.float32((self.high - self.low) / 255) + np.float32(self.low)
        if self.layout == 'NCHW':
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        (scores,) = self.session.run([self.output], {'image': pixels})
        return softmax(scores) if self.output == 'logits' else scores


def read_image(path, side):
    """An image as the model was trained to see it: float32 [side, side, 3], RGB, 0 to 255."""
    with Image.open(path, formats=['JPEG', 'PNG', 'WEBP', 'BMP']) as image:
        upright = ImageOps.exif_transpose(image)  # as people see it, whatever the camera stored
        return resize(np.asarray(upright.convert('RGB')), side)


def resize(image, side):
    """Squashes [height, width, 3] to a square: bilinear, without antialiasing, not rounded.

    Pillow's own resize would average over more pixels when it makes an image smaller.
    """
    top, bottom, down = _neighbours(image.shape[0], side)
    left, right, across = _neighbours(image.shape[1], side)
    down, across = down[:, None, None], across[:, None]
    rows = image[top].astype(np.float32) * (1 - down) + image[bottom].astype(np.float32) * down
    return rows[:, left] * (1 - across) + rows[:, right] * across


def _neighbours(length, side):
    """For each new pixel the two old ones around its centre, and the weight of the second."""
    centre = np.clip((np.arange(side) + 0.5) * (length / side) - 0.5, 0, length - 1)
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
