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
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_jax
from vit_jax import files, models
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.export.expressible import in_units
from vit_jax.export.options import DEFAULT, Options
from vit_jax.export.outputs import forward
from vit_jax.inference import model_folder
from vit_jax.inference.task import ONE_CLASS

PLATFORMS = ('cpu', 'cuda')

# The serialised form is a flatbuffer, whose offsets have 31 bits.
_LARGEST = 2**31 - 2**20


def build(model: model_folder.Model, options: Options = DEFAULT) -> jax.export.Exported:
    """A model as a function of images, with any batch; it gives a dict of float32 arrays.

    The precision of matrix products is left to the device, as in this package: exact on a CPU; on
    an NVIDIA GPU TF32 unless `jax_default_matmul_precision` says otherwise where it is compiled.

    Args:
        model: what `model_folder.load` gives.
        options: see `Options`, of which opset, dtype and drop are for other formats.

    Raises:
        UserError: the model has no such output, or is too large for one file.
    """
    model = in_units(model)
    _check_size(model.params)
    compute = forward(model.model, options.outputs(model.model.num_classes))
    params = jax.tree.map(jnp.asarray, model.params)
    channels_last = options.layout == 'NHWC'

    def function(image: jax.Array) -> dict[str, jax.Array]:
        image = image if channels_last else image.transpose(0, 2, 3, 1)
        if options.preprocessing:
            image = normalize(image.astype(jnp.float32))
        return compute(params, image)

    height, width = model.preprocess.size
    sides, channels = f'{height}, {width}', model.channels
    shape = f'batch, {sides}, {channels}' if channels_last else f'batch, {channels}, {sides}'
    dtype = np.uint8 if options.preprocessing else np.float32
    image = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), dtype)
    # What the session asks for would be written into the file.
    with jax.default_matmul_precision('default'):
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(image)


def build_text(model: models.LitModel, params: Mapping[str, Any]) -> jax.export.Exported:
    """The text tower of a two-tower model as a function of tokens, int32 [batch, L].

    It gives {'features': float32 [batch, C], of length 1}.

    Raises:
        UserError: it is too large for one file.
    """
    needed = {name: leaf for name, leaf in params.items() if name != 'img'}
    _check_size(needed)
    weights = jax.tree.map(jnp.asarray, needed)

    def function(tokens: jax.Array) -> dict[str, Any]:
        return {'features': model.apply({'params': weights}, tokens=tokens)[1]}

    shape = jax.export.symbolic_shape(f'batch, {model.pp["max_len"]}')
    with jax.default_matmul_precision('default'):
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)
        return exported(jax.ShapeDtypeStruct(shape, np.int32))


def _check_size(params: Mapping[str, Any]) -> None:
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
    if size > _LARGEST:
        raise UserError(
            f'a StableHLO file holds at most 2 GiB, and the weights of this model take '
            f'{size / 2**30:.1f} GiB; --format onnx writes them into a file of their own'
        )


def write(
    path: pathlib.Path,
    model: model_folder.Model,
    options: Options = DEFAULT,
    told: Mapping[str, Any] | None = None,
) -> None:
    """Writes `path` (one that is there is replaced) and, beside it, its description, `<path>.json`.

    See `build`; `told` is more for the description.
    """
    exported = build(model, options)
    ours = {
        'input': {
            'layout': options.layout,
            'value_range': [0, 255] if options.preprocessing else [-1, 1],
        },
        'image_size': model.image_size,
        'class_names': list(model.class_names),
        'preprocessing': model.preprocess.to_dict(),
        'model_name': model.model_config.get('model_name'),
        **({'task': in_units(model).task.to_dict()} if model.task != ONE_CLASS else {}),
        'source': model.source,
        **(told or {}),
    }
    store(path, exported, ours)


def store(path: pathlib.Path, exported: jax.export.Exported, told: Mapping[str, Any]) -> None:
    """Writes a function of one array into `path`, and its description into `<path>.json`.

    Args:
        path: one that is there is replaced.
        exported: the function.
        told: the rest of the description; what `input` holds is added to shape and type.
    """
    (given,) = exported.in_avals
    shapes = jax.tree.unflatten(exported.out_tree, [aval.shape for aval in exported.out_avals])
    shape = {'shape': ['batch', *given.shape[1:]], 'dtype': given.dtype.name}
    description = {
        'format': 'vit_jax StableHLO',
        'format_version': 1,
        'platforms': list(PLATFORMS),
        **told,
        'input': {**shape, **told.get('input', {})},
        'outputs': {name: ['batch', *shape[1:]] for name, shape in shapes.items()},
        'versions': {'vit_jax': vit_jax.__version__, 'jax': jax.__version__},
    }
    with files.atomic_group(path, overwrite=True) as folder:
        (folder / path.name).write_bytes(exported.serialize())
        files.write_json(folder / f'{path.name}.json', description)
