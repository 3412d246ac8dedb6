"""Draws augmentation.jpg: what each augmentation makes of one photo.

photos=tests/fixtures/data/photos
python docs/pictures/augmentation.py $photos/rose.jpg --with $photos/sunflower.jpg
"""

import argparse
import functools
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from PIL import Image, ImageDraw

from vit_jax.data import augment, host_augment, pillow_operations, randaugment
from vit_jax.data.preprocess import Preprocess

HERE = pathlib.Path(__file__).parent
SIDE, TILE, COLUMNS, CAPTION = 224, 84, 10, 13  # pixels; tiles in a row
Tile = tuple[str, np.ndarray]


def photo_of(path: pathlib.Path) -> np.ndarray:
    """The middle of a photo, uint8 [SIDE, SIDE, 3]."""
    with Image.open(path) as image:
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.convert('RGB').crop((left, top, left + side, top + side))
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def crops(whole: np.ndarray) -> Iterator[Tile]:
    """Of the whole photo: the crops of training, and mirroring."""
    middle = Preprocess(SIDE, eval='resize_crop').evaluate(whole)
    yield 'evaluation', middle
    inception = Preprocess(SIDE)
    for seed in range(2):
        yield 'inception_crop', inception.train(whole, np.random.default_rng(seed))
    small = Preprocess(SIDE, inception_crop=False, resize_small=256)
    yield 'resize_small', small.train(whole, np.random.default_rng(1))
    yield 'flip', middle[:, ::-1]
    yield 'flip_vertical', middle[::-1]


def mixed(photo: np.ndarray, other: np.ndarray) -> Iterator[Tile]:
    """Erasing, mixup and CutMix, as the training step does them."""
    pair = np.stack([other, photo]).astype(np.float32)
    places = np.arange(2, dtype=np.int32)
    for step in range(2):
        key = augment.step_key(0, step, augment.ERASE)
        yield 'random_erasing', np.asarray(augment.random_erasing(pair, places, key, 1.0)[1])
    previous = functools.partial(jax.numpy.roll, shift=1, axis=0)
    for name, step in (('mixup', 8), ('cutmix', 5)):
        key = augment.step_key(0, step, augment.MIX)
        blend = augment.Mix(**{name: 1.0}, classes=2)
        yield name, np.asarray(blend({'image': pair, 'label': places}, key, previous)['image'][1])


def on_the_host(photo: np.ndarray) -> Iterator[Tile]:
    """Whole recipes, and the operations of both kinds of RandAugment."""
    made = host_augment.HostAugment
    for name, change, seeds in (  # seeds that show something of each kind
        ('randaug=2,15', made(host_augment.randaug_of('2,15')), (0, 3, 4, 5)),
        ('randaug=rand-m9', made(host_augment.randaug_of('rand-m9-inc1')), (2, 3, 6, 9)),
        ('three_augment', made(three_augment=True), (11, 1, 8)),
        ('color_jitter=0.3', made(color_jitter=0.3), (2, 4, 7)),
    ):
        for seed in seeds:
            pixels = photo.copy()
            change(pixels, np.random.default_rng(seed))
            yield name, pixels
    for name, operation in randaugment.OPERATIONS.items():
        yield name, operation(photo, 1.5, np.random.default_rng(0))
    for name, of_timm in pillow_operations.OPERATIONS.items():
        picture = of_timm(Image.fromarray(photo), 0.9, 1)
        yield f'timm {name.removesuffix("Increasing")}', np.asarray(picture)


def draw(tiles: list[Tile], path: pathlib.Path) -> None:
    """Writes the tiles, COLUMNS in a row, each with its name below."""
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new('RGB', (COLUMNS * (TILE + 4), rows * (TILE + CAPTION)), 'white')
    pen = ImageDraw.Draw(sheet)
    for index, (name, pixels) in enumerate(tiles):
        x, y = index % COLUMNS * (TILE + 4), index // COLUMNS * (TILE + CAPTION)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + TILE), name, fill='black', font_size=9)
    sheet.save(path, quality=80)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('photo', type=pathlib.Path)
    parser.add_argument('--with', dest='other', type=pathlib.Path, required=True, help='to mix')
    parser.add_argument('--output', type=pathlib.Path, default=HERE / 'augmentation.jpg')
    args = parser.parse_args()
    photo, other = photo_of(args.photo), photo_of(args.other)
    with Image.open(args.photo) as image:
        whole = np.asarray(image.convert('RGB'))
    draw([*crops(whole), *mixed(photo, other), *on_the_host(photo)], args.output)


if __name__ == '__main__':
    main()
