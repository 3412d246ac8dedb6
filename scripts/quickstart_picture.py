"""Shows what the model that quickstart.sh trained says about some images of its test split.

Writes into the workdir: `images/*.png`, the first image of each class, and `predictions.png`.

Example:
    python scripts/quickstart_picture.py runs/quickstart
"""

import argparse
import pathlib

import matplotlib

matplotlib.use('agg')  # a file, no window
import sys

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import files
from vit_jax.data import decode, sources
from vit_jax.inference import model_folder, predict

COLUMNS = 5


def save_test_images(workdir: pathlib.Path) -> list[tuple[str, str]]:
    """Writes the first image of each class in the test split of a run.

    Args:
      workdir: of a finished run.

    Returns:
      Path and class name of each, in label order.
    """
    config = files.read_json(workdir / 'config.json')
    _, source = sources.open_sources(
        config['dataset'], train_split=config['pp']['train'], test_split=config['pp']['test']
    )
    first: dict[int, int] = {}
    for index in range(len(source)):
        first.setdefault(source[index].label, index)
    folder = workdir / 'images'
    folder.mkdir(exist_ok=True)
    saved = []
    for label, index in sorted(first.items()):
        name = source.class_names[label]
        path = folder / f'{name}_test_{index:04d}.png'
        Image.fromarray(decode.decode(source[index].image, key=name)).save(path)
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
    rows = -(-len(images) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(2 * COLUMNS, 2.8 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    right = 0
    results = predict.predict(model, list(truths))
    # Not strict: the last row may have places left.
    for (image, probabilities), axis in zip(results, axes.flat, strict=False):
        best = int(np.argmax(probabilities))
        predicted, truth = model.class_names[best], truths[image]
        right += predicted == truth
        axis.imshow(Image.open(image), interpolation='nearest')
        axis.set_title(
            f'{predicted}  ({100 * probabilities[best]:.1f} %)\ntruth: {truth}',
            color='darkgreen' if predicted == truth else 'crimson',
            fontsize=11,
        )
    figure.suptitle('Predicted digit, its probability, and the truth')
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return right


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('workdir', type=pathlib.Path, help='of a finished run on digits')
    workdir = parser.parse_args().workdir
    images = save_test_images(workdir)
    picture = workdir / 'predictions.png'
    right = draw(picture, model_folder.load(workdir / 'model'), images)
    print(
        f'{right} of {len(images)} images (the first of each class in the test split) are '
        f'recognised: see {picture}'
    )


if __name__ == '__main__':
    main()
