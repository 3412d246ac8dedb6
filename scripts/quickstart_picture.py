"""Shows what the model that quickstart.sh trained says about some images of its test split.

Writes `images/*.png`, named by position and true digit, and `predictions.png` into the workdir.

Example:
    python scripts/quickstart_picture.py runs/quickstart
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use('agg')  # a file, no window
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from vit_jax import model_folder, predict
from vit_jax.data import sources

ROWS, COLUMNS = 2, 5


def save_test_images(workdir: pathlib.Path, count: int) -> list[tuple[str, str]]:
    """Writes images spread evenly over the test split of a run.

    Args:
      workdir: of a finished run.
      count: how many.

    Returns:
      Path and class name of each.
    """
    config = json.loads((workdir / 'config.json').read_text())
    _, source = sources.open_sources(
        config['dataset'], train_split=config['pp']['train'], test_split=config['pp']['test']
    )
    folder = workdir / 'images'
    folder.mkdir(exist_ok=True)
    saved = []
    for index in np.linspace(0, len(source) - 1, count).round().astype(int):
        example = source[int(index)]
        name = source.class_names[example.label]
        path = folder / f'test_{index:04d}_is_{name}.png'
        Image.fromarray(example.image).save(path)
        saved.append((str(path), name))
    return saved


def draw(path: pathlib.Path, model: model_folder.Model, images: list[tuple[str, str]]) -> int:
    """Draws images with predicted class, its probability and the truth.

    Args:
      path: of the picture to write.
      model: what predicts.
      images: path and true class name of each.

    Returns:
      How many predictions are right.
    """
    truths = dict(images)
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(2 * COLUMNS, 2.5 * ROWS))
    right = 0
    for axis, (image, probabilities) in zip(
        axes.flat, predict.predict(model, list(truths)), strict=True
    ):
        best = int(np.argmax(probabilities))
        predicted, truth = model.class_names[best], truths[image]
        right += predicted == truth
        axis.imshow(Image.open(image), interpolation='nearest')
        axis.set_title(
            f'{predicted}  ({100 * probabilities[best]:.1f} %)\ntruth: {truth}',
            color='darkgreen' if predicted == truth else 'crimson',
            fontsize=11,
        )
        axis.axis('off')
    figure.suptitle('Predicted digit, its probability, and the truth')
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return right


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('workdir', type=pathlib.Path, help='of a finished run on digits')
    workdir = parser.parse_args().workdir
    images = save_test_images(workdir, ROWS * COLUMNS)
    picture = workdir / 'predictions.png'
    right = draw(picture, model_folder.load(workdir / 'model'), images)
    print(f'{right} of {len(images)} images of the test split are recognised: see {picture}')


if __name__ == '__main__':
    main()
