"""Models as StableHLO: one file for CPU and NVIDIA GPU, any batch size, run without this package.

    import jax
    from jax import export

    with open('flowers.stablehlo', 'rb') as f:
        model = export.deserialize(bytearray(f.read()))
    outputs = model.call(images)  # {'logits': [batch, classes] float32}

The weights are inside. What a user needs to know besides (input, class names, preprocessing, where
the model came from) stands in a JSON file beside it, `flowers.stablehlo.json`.

Format: https://docs.jax.dev/en/latest/export/export.html. A file is readable for at least six
months after the JAX that wrote it; keep the model folder to export again.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_jax
from vit_jax import files
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.export import verify
from vit_jax.inference import model_folder

PLATFORMS = ('cpu', 'cuda')
LAYOUTS = ('NHWC', 'NCHW')

# The serialised form is a flatbuffer, whose offsets have 31 bits.
_LARGEST = 2**31 - 2**20


def build(
    model: model_folder.Model,
    *,
    outputs: Sequence[str] = ('logits',),
    layout: str = 'NHWC',
    preprocessing: bool = False,
) -> bytes:
    """A model as a function of images, serialised.

    The precision of matrix products is left to the device, as in this package: exact on a CPU; on
    an NVIDIA GPU TF32 unless `jax_default_matmul_precision` says otherwise where it is compiled.

    Args:
        model: what `model_folder.load` gives.
        outputs: names among `verify.OUTPUTS`.
        layout: 'NHWC' for images [batch, S, S, 3], 'NCHW' for [batch, 3, S, S].
        preprocessing: False: images are float32 in [-1, 1]. True: they are uint8 in [0, 255], of
            the model's size, and normalised inside.

    Returns:
        The content of a file; the function in it gives a dict of float32 arrays.

    Raises:
        UserError: the model has no such output, or is too large for one file.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params)) * 4
    if size > _LARGEST:
        raise UserError(
            f'a StableHLO file holds at most 2 GiB, and the weights of this model take '
            f'{size / 2**30:.1f} GiB; --format onnx writes them into a file of their own'
        )
    compute = verify.forward(model.model, outputs)
    params = jax.tree.map(jnp.asarray, model.params)

    def function(image: jax.Array) -> dict[str, jax.Array]:
        if layout == 'NCHW':
            image = image.transpose(0, 2, 3, 1)
        if preprocessing:
            image = normalize(image.astype(jnp.float32))
        return compute(params, image)

    shape, dtype = _input(model.image_size, layout, preprocessing)
    symbolic = jax.export.symbolic_shape(', '.join(map(str, shape)))
    # What the session asks for would be written into the file.
    with jax.default_matmul_precision('default'):
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct(symbolic, dtype)
        )
    return bytes(exported.serialize())


def write(
    path: pathlib.Path,
    model: model_folder.Model,
    *,
    outputs: Sequence[str] = ('logits',),
    layout: str = 'NHWC',
    preprocessing: bool = False,
) -> None:
    """Writes `path` and, beside it, its description, `<path>.json`.

    Args:
        path: the file; one that is there is replaced.
        model: see `build`.
        outputs: see `build`.
        layout: see `build`.
        preprocessing: see `build`.
    """
    content = build(model, outputs=outputs, layout=layout, preprocessing=preprocessing)
    shape, dtype = _input(model.image_size, layout, preprocessing)
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), np.float32)
    shapes = jax.eval_shape(verify.forward(model.model, outputs), model.params, image)
    description = {
        'format': 'vit_jax StableHLO',
        'format_version': 1,
        'platforms': list(PLATFORMS),
        'input': {
            'shape': list(shape),
            'dtype': np.dtype(dtype).name,
            'layout': layout,
            'value_range': [0, 255] if preprocessing else [-1, 1],
        },
        'outputs': {name: ['batch', *shapes[name].shape[1:]] for name in outputs},
        'image_size': model.image_size,
        'class_names': list(model.class_names),
        'preprocessing': model.preprocess.to_dict(),
        'model_name': model.model_config.get('model_name'),
        'source': model.source,
        'versions': {'vit_jax': vit_jax.__version__, 'jax': jax.__version__},
    }
    with files.atomic_group(path, overwrite=True) as folder:
        (folder / path.name).write_bytes(content)
        files.write_json(folder / f'{path.name}.json', description)


def _input(size: int, layout: str, preprocessing: bool) -> tuple[tuple[int | str, ...], Any]:
    """Shape (the first length is the name 'batch') and type of the input."""
    if layout not in LAYOUTS:
        raise UserError(f'unknown layout {layout!r}; known: {", ".join(LAYOUTS)}')
    shape = ('batch', size, size, 3) if layout == 'NHWC' else ('batch', 3, size, size)
    return shape, np.uint8 if preprocessing else np.float32
