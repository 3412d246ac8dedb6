"""Draws predictions of the model that quickstart.sh trained, on images of its test split.

Writes into the workdir: `images/*.png`, the first image of each class, and `predictions.png`.

Example:
    python scripts/quickstart_picture.py runs/quickstart
"""

import argparse
import pathlib
import sys

import numpy as np
from PIL import Image

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import files
from vit_jax.data import decode, sources
from vit_jax.inference import contact_sheet, model_folder, predict


def save_test_images(workdir: pathlib.Path) -> list[tuple[str, str]]:
    """Writes the first image of each class in the test split of a run; returns paths and names."""
    config = files.read_json(workdir / 'config.json')
    _, source = sources.open_sources(
        config['dataset'], train_split=config['pp']['train'], test_split=config['pp']['test']
    )
    folder = workdir / 'images'
    folder.mkdir(exist_ok=True)
    saved = []
    labels = [int(source[index].label) for index in range(len(source))]
    for label, index in zip(*np.unique(labels, return_index=True), strict=True):
        name = source.class_names[label]
        path = folder / f'{name}_test_{index:04d}.png'
        Image.fromarray(decode.decode(source[index].image, key=name)).save(path)
        saved.append((str(path), name))
    return saved


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('workdir', type=pathlib.Path, help='of a finished run on digits')
    workdir = parser.parse_args().workdir
    images = save_test_images(workdir)
    model = model_folder.load(workdir / 'model')
    found = list(predict.predict(model, [path for path, _ in images]))
    right = sum(
        model.class_names[probabilities.argmax()] == truth
        for (_, probabilities), (_, truth) in zip(found, images, strict=True)
    )
    picture = workdir / 'predictions.png'
    title = 'Test images, named by the truth, and the most probable digits'
    with files.atomic_file(picture) as part:
        contact_sheet.save(part, found, model.class_names, title=title)
    print(
        f'{right} of {len(images)} images (the first of each class in the test split) are '
        f'recognised: see {picture}'
    )


if __name__ == '__main__':
    main()
