"""The table of released checkpoints: where they are, how large, for which images, how good.

Sizes are those of the buckets' listings; where a listing is not known, the size of the float32
weights (`size_is_listed` is False then). Accuracies are published figures: the README of the
original release, "How to train your ViT?" (https://arxiv.org/abs/2106.10270). AugReg released
52,268 files; here are the recommended ones of the original's README, and those that timm names.
"""

import dataclasses
import re
from collections.abc import Iterator

IMAGENET21K_CLASSES = 21_843
IMAGENET_CLASSES = 1_000


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One released file.

    Attributes:
        address: 'gs://bucket/path'.
        variant: name from `models.variants.VARIANTS`.
        resolution: side of the images that the weights are for, pixels.
        num_classes: classes of the head.
        mib: size of the file, MiB.
        size_is_listed: whether `mib` is the size in the bucket's listing (to its rounding).
        accuracy: published accuracy, as text; '' where none is.
    """

    address: str
    variant: str
    resolution: int
    num_classes: int
    mib: float
    size_is_listed: bool = True
    accuracy: str = ''

    @property
    def name(self) -> str:
        """What `--config.pretrained` takes: the address without gs:// and without vit_models/."""
        return self.address.removeprefix('gs://').removeprefix('vit_models/')


def augreg_variant(filename: str) -> str:
    """The variant of an AugReg file: 'R26_S_32-i21k-300ep-...' is 'R26+ViT-S_32'.

    Args:
        filename: name in the bucket, of a pre-trained or a fine-tuned checkpoint.

    Returns:
        The name; '' if this is no name of an AugReg file.
    """
    match = re.match(r'(?:(R\d*)_)?(Ti|S|B|L)_(\d+)-i', filename)
    if not match:
        return ''
    resnet, size, patch = match.groups()
    return f'{f"{resnet}+" if resnet else ""}ViT-{size}_{patch}'


def _original() -> Iterator[Checkpoint]:
    """ImageNet-21k pre-training (heads all zeros), and the same fine-tuned on ImageNet."""
    pretrained = {
        'ViT-B_8': (393.72, ''),
        'ViT-B_16': (393.69, 'ImageNet 84.53 %, CIFAR-10 99.02 % after fine-tuning'),
        'ViT-B_32': (400.01, 'ImageNet 81.66 %, CIFAR-10 98.88 % after fine-tuning'),
        'ViT-L_16': (1249.3, 'ImageNet 85.05 %, CIFAR-10 99.14 % after fine-tuning'),
        'ViT-L_32': (1259.5, 'ImageNet 81.89 %, CIFAR-10 99.09 % after fine-tuning'),
        'ViT-H_14': (2519.0, ''),
        'R26+ViT-B_32': (450.23, ''),
        'R50+ViT-B_16': (439.85, 'ImageNet 85.08 %, CIFAR-10 98.94 % after fine-tuning'),
        'R50+ViT-L_32': (1341.4, ''),
    }
    for variant, (mib, accuracy) in pretrained.items():
        address = f'gs://vit_models/imagenet21k/{variant}.npz'
        yield Checkpoint(address, variant, 224, IMAGENET21K_CLASSES, mib, True, accuracy)
    finetuned = [
        ('ViT-B_8', 384, 334.78, True, ''),
        ('ViT-B_16', 384, 331.40, True, ''),
        ('ViT-B_16', 224, 330.29, True, 'ImageNet 81.2 %'),
        ('ViT-B_32', 384, 336.89, True, ''),
        ('ViT-L_16', 384, 1167.4, True, ''),
        ('ViT-L_16', 224, 1160.91, False, 'ImageNet 82.7 %'),
        ('ViT-L_32', 384, 1169.71, False, ''),
        ('R50+ViT-B_16', 384, 377.57, True, ''),
    ]
    for variant, resolution, mib, listed, accuracy in finetuned:
        suffix = '-224' if resolution == 224 else ''
        address = f'gs://vit_models/imagenet21k+imagenet2012/{variant}{suffix}.npz'
        yield Checkpoint(address, variant, resolution, IMAGENET_CLASSES, mib, listed, accuracy)


def _augreg() -> Iterator[Checkpoint]:
    """AugReg: pre-training, and its fine-tuning on ImageNet at 384 pixels, with its accuracy."""
    # Pre-training; its MiB; fine-tuning; its MiB (of the weights) and accuracy.
    recommended = [
        ('L_16', 'strong1-wd_0.1-do_0.0-sd_0.0', 1243, 0.01, 1162.40, 85.59),
        ('B_16', 'medium1-wd_0.1-do_0.0-sd_0.0', 391.4, 0.03, 331.34, 85.49),
        ('S_16', 'light1-wd_0.03-do_0.0-sd_0.0', 115, 0.03, 84.67, 83.73),
        ('R50_L_32', 'medium1-wd_0.1-do_0.1-sd_0.1', 1337, 0.01, 1255.39, 85.99),
        ('R26_S_32', 'light1-wd_0.1-do_0.0-sd_0.0', 170, 0.01, 139.12, 83.85),
        ('Ti_16', 'none-wd_0.03-do_0.0-sd_0.0', 37.2, 0.03, 22.09, 78.22),
        ('B_32', 'light1-wd_0.1-do_0.0-sd_0.0', 398, 0.01, 336.83, 83.59),
        ('S_32', 'none-wd_0.1-do_0.0-sd_0.0', 118, 0.01, 87.42, 79.58),
        ('R_Ti_16', 'none-wd_0.03-do_0.0-sd_0.0', 40, 0.03, 24.25, 75.40),
    ]
    # What timm chose instead, by accuracy after fine-tuning; the same architectures, so sizes.
    others = [
        ('L_16', 'medium1-wd_0.1-do_0.1-sd_0.1', 1242.4),
        ('B_8', 'medium1-wd_0.1-do_0.0-sd_0.0', 391.4),
        ('B_32', 'medium1-wd_0.03-do_0.0-sd_0.0', 397.7),
        ('S_32', 'light1-wd_0.03-do_0.0-sd_0.0', 118),
        ('R26_S_32', 'medium2-wd_0.03-do_0.0-sd_0.0', 170),
        ('R50_L_32', 'medium2-wd_0.1-do_0.0-sd_0.0', 1337),
    ]
    for model, recipe, mib, lr, finetuned_mib, accuracy in recommended:
        stem = f'gs://vit_models/augreg/{model}-i21k-300ep-lr_0.001-aug_{recipe}'
        variant = augreg_variant(f'{model}-i21k')
        yield Checkpoint(f'{stem}.npz', variant, 224, IMAGENET21K_CLASSES, mib)
        yield Checkpoint(
            f'{stem}--imagenet2012-steps_20k-lr_{lr}-res_384.npz',
            variant,
            384,
            IMAGENET_CLASSES,
            finetuned_mib,
            False,
            f'ImageNet {accuracy:.2f} %',
        )
    for model, recipe, mib in others:
        address = f'gs://vit_models/augreg/{model}-i21k-300ep-lr_0.001-aug_{recipe}.npz'
        variant = augreg_variant(f'{model}-i21k')
        yield Checkpoint(address, variant, 224, IMAGENET21K_CLASSES, mib)


def _sharpness_aware() -> Iterator[Checkpoint]:
    """Trained on ImageNet alone with SAM and GSAM; those of GSAM have no class token."""
    sam = {
        'S_16': 252.57,  # three times the weights: an optimizer's state is in it, too
        'B_16': 330.3,
        'B_32': 336.6,
        'L_16': 1160.9,
        'L_32': 1169.2,
    }
    for size, mib in sam.items():
        address = f'gs://vit_models/sam/ViT-{size}.npz'
        yield Checkpoint(address, f'ViT-{size}', 224, IMAGENET_CLASSES, mib)
    gsam = {'S_8': 84.13, 'S_16': 84.11, 'S_32': 87.27, 'B_16': 330.22, 'B_32': 336.54}
    for size, mib in gsam.items():
        address = f'gs://vit_models/gsam/ViT-{size}.npz'
        variant = f'ViT-{size}-gap-norep'
        yield Checkpoint(address, variant, 224, IMAGENET_CLASSES, mib, False)


def _mixer() -> Iterator[Checkpoint]:
    # The folder, the size, MiB, whether that is listed, accuracy.
    rows = [
        ('imagenet1k', 'B_16', 228.5, True, 'CIFAR-10 96.72 % after fine-tuning'),
        ('imagenet1k', 'L_16', 794.0, True, 'CIFAR-10 96.59 % after fine-tuning'),
        ('imagenet21k', 'B_16', 290.0, True, 'CIFAR-10 96.82 % after fine-tuning'),
        ('imagenet21k', 'L_16', 876.0, True, 'CIFAR-10 98.34 % after fine-tuning'),
        ('sam', 'B_16', 228.43, False, ''),
        ('sam', 'B_32', 230.0, False, ''),
        ('gsam', 'B_16', 228.0, True, ''),
        ('gsam', 'B_32', 230.0, True, ''),
        ('gsam', 'S_8', 79.0, True, ''),
        ('gsam', 'S_16', 71.0, True, ''),
        ('gsam', 'S_32', 73.0, True, ''),
    ]
    for folder, size, mib, listed, accuracy in rows:
        classes = IMAGENET21K_CLASSES if folder == 'imagenet21k' else IMAGENET_CLASSES
        variant = f'Mixer-{size}'
        address = f'gs://mixer_models/{folder}/{variant}.npz'
        yield Checkpoint(address, variant, 224, classes, mib, listed, accuracy)


CHECKPOINTS: tuple[Checkpoint, ...] = (*_original(), *_augreg(), *_sharpness_aware(), *_mixer())
