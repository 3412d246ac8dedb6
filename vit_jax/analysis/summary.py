"""The layers of a model: output shapes, parameters and FLOPs, as the real module has them.

The module is traced, not run: no weights are made, and no list of layers is kept here. FLOPs are
those of convolutions and matrix products, two per multiply-accumulate.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax import variants
from vit_jax.analysis import counts, tables
from vit_jax.errors import UserError
from vit_jax.export.expressible import pieces


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module, or a parameter that a module with submodules has itself.

    Attributes:
      path: names from the model down, ('Transformer', 'encoderblock_0', 'LayerNorm_0'); () is the
        model.
      kind: class of the module, or 'parameter'.
      output: shape of its output for a batch of one; () if it gives anything but one array.
      parameters: with those of the layers inside.
      flops: of the forward pass of one image, with those of the layers inside.
    """

    path: tuple[str, ...]
    kind: str
    output: tuple[int, ...]
    parameters: int
    flops: int


def layers(model: nn.Module, image_size: counts.ImageSize, channels: int = 3) -> list[Layer]:
    """Every layer of a model in the order of the computation, each after the one it lies in.

    Args:
      model: a module of `vit_jax.models`.
      image_size: side or (height, width) of the images, pixels.
      channels: of the images.

    Raises:
      UserError: the model takes no such image.
    """
    image = jax.ShapeDtypeStruct((1, *variants.sides(image_size), channels), jnp.float32)
    outputs: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}

    def record(call, args, kwargs, context):
        if context.method_name != '__call__':
            return call(*args, **kwargs)
        path = context.module.path
        outputs[path] = (type(context.module).__name__, ())  # takes its place before those inside
        result = call(*args, **kwargs)
        outputs[path] = (outputs[path][0], tuple(getattr(result, 'shape', ())))
        return result

    def init(x):
        return model.init(jax.random.key(0), x, train=False)['params']

    try:
        params = jax.eval_shape(init, image)
    except ValueError as e:
        raise UserError(f'image size {variants.in_words(image_size)}: {e}') from e

    def apply(params, x):
        return model.apply({'params': params}, x, train=False)

    with nn.intercept_methods(record):
        traced = jax.make_jaxpr(apply)(params, image)
    flops = dict[tuple[str, ...], int]()
    for path, count in products(traced.jaxpr):
        while path not in outputs:  # such as the name of a method
            path = path[:-1]
        flops[path] = flops.get(path, 0) + count
    arrays = {
        tuple(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    return list(_in_order(outputs, arrays, flops))


def _in_order(outputs, arrays, flops) -> Iterator[Layer]:
    """Layers, with the parameters that a module with submodules has itself behind the module."""
    containers = {path[:-1] for path in outputs if path}
    for path, (kind, output) in outputs.items():
        inside = len(path)
        yield Layer(
            path,
            kind,
            output,
            sum(math.prod(shape) for name, shape in arrays.items() if name[:inside] == path),
            sum(count for name, count in flops.items() if name[:inside] == path),
        )
        if path in containers:
            for name, shape in arrays.items():
                if name[:-1] == path:
                    yield Layer(name, 'parameter', shape, math.prod(shape), 0)


def products(jaxpr: Any) -> Iterator[tuple[tuple[str, ...], int]]:
    """Path of the module and FLOPs of each convolution and matrix product of a traced program.

    Args:
      jaxpr: `jax.make_jaxpr(function)(...).jaxpr`; of a loop, one pass is counted.

    Yields:
      Names from the outermost module on, and FLOPs.
    """
    for equation in jaxpr.eqns:
        stack = str(equation.source_info.name_stack).split('/')
        # The first name is the model's class; 'VisionTransformer._embed' is a method, no module.
        path = tuple(name for name in stack[1:] if '.' not in name)
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            left = equation.invars[0].aval.shape
            size = math.prod(left[axis] for axis in contracted)
            yield path, 2 * size * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == 'conv_general_dilated':
            kernel = equation.invars[1].aval.shape
            outputs = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
            size = math.prod(kernel) // outputs
            yield path, 2 * size * math.prod(equation.outvars[0].aval.shape)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
        ):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                yield from ((path + name, count) for name, count in products(inner))


def table(
    found: Sequence[Layer], *, title: str, style: str = 'terminal', expand: bool = False
) -> tables.Table:
    """The layers as a table.

    Args:
      found: what `layers` gave.
      title: above the table.
      style: one of `tables.FORMATS`. For a terminal, names are indented by what lies in what;
        Markdown would swallow the spaces and gets whole paths. CSV is for programs: every layer (''
        is the model), plain numbers.
      expand: every layer. Else those without parameters and products are left out, and of equal
        neighbours ('encoderblock_0', 'encoderblock_1', ...) the first is shown with what is in it,
        the others in one line.
    """
    if style == 'csv':
        names = ('layer', 'type', 'output_shape', 'parameters', 'flops')
        plain = [
            (
                '/'.join(layer.path),
                layer.kind,
                f'[{",".join(map(str, layer.output))}]' if layer.output else '',
                str(layer.parameters),
                str(layer.flops),
            )
            for layer in found
        ]
        return tables.Table('', names, plain)
    rows = []
    for layer in _brief(found) if not expand else found:
        name = '/'.join(layer.path) or 'model'
        if style == 'terminal':
            name = '  ' * len(layer.path) + name.split('/')[-1]
        batch = ('B',) if layer.kind != 'parameter' and layer.output else ()
        shape = ' x '.join(map(str, (*batch, *layer.output[len(batch) :])))
        rows.append((name, layer.kind, shape, f'{layer.parameters:,}', f'{layer.flops:,}'))
    return tables.Table(title, ('Layer', 'Type', 'Output', 'Parameters>', 'FLOPs>'), rows)


def _brief(found: Sequence[Layer], root: Layer | None = None) -> Iterator[Layer]:
    """The layers for a short table, from `root` (default: the model) down."""
    root = found[0] if root is None else root
    yield root
    children = [
        layer
        for layer in found
        if layer.path and layer.path[:-1] == root.path and (layer.parameters or layer.flops)
    ]
    for _, group in itertools.groupby(children, lambda child: _likeness(found, child)):
        first, *twins = group
        yield from _brief(found, first)
        if twins:
            names = list(dict.fromkeys((twins[0].path[-1], twins[-1].path[-1])))
            yield dataclasses.replace(
                first,
                path=(*root.path, ' to '.join(names)),
                parameters=sum(twin.parameters for twin in twins),
                flops=sum(twin.flops for twin in twins),
            )


def _likeness(found: Sequence[Layer], root: Layer) -> tuple:
    """Equal for layers that differ only in the number at the end of their names."""
    depth = len(root.path)
    inside = [
        dataclasses.astuple(dataclasses.replace(layer, path=layer.path[depth:]))
        for layer in found
        if layer.path[:depth] == root.path
    ]
    return root.path[-1].rstrip('0123456789'), tuple(inside)


def torchsummary(
    model_config: Mapping[str, Any],
    num_classes: int,
    image_size: counts.ImageSize,
    *,
    title: str,
    style: str = 'terminal',
) -> tables.Table:
    """The table that torchsummary 1.5.1 prints for the plain PyTorch ViT known from tutorials.

    It names the modules of that implementation (WZMIAOMIAO's, after timm's): one matrix for query,
    key and value, modules for dropout, GELU and identity. Parameters that belong to no leaf module,
    class token and position embedding, are not in it; the notes below say so. The "Forward/backward
    pass size" is by convention twice the outputs of all lines; sizes are in MiB, which torchsummary
    calls MB.

    Args:
      model_config: see `variants.get_config`.
      num_classes: C, at least 1.
      image_size: side or (height, width) of the images, pixels.
      title: above the table.
      style: one of `tables.FORMATS`; CSV is for programs: layer, output_shape ('[-1,197,768]'),
        params, plain numbers.

    Raises:
      UserError: an architecture that this implementation does not have.
    """
    _check_plain(model_config, num_classes)
    rows = _torch_rows(model_config, num_classes, image_size)
    lines = [(f'{name}-{i}', (-1, *output), size) for i, (name, output, size) in enumerate(rows, 1)]
    if style == 'csv':
        plain = [(name, f'[{",".join(map(str, o))}]', str(size)) for name, o, size in lines]
        return tables.Table('', ('layer', 'output_shape', 'params'), plain)
    counted = sum(size for _, _, size in rows)
    sizes = counts.sizes(model_config, image_size)
    cls, positions = sizes.width, sizes.tokens * sizes.width
    mib = 4 / 2**20  # of a float32 number
    image = 3 * math.prod(variants.sides(image_size)) * mib
    passes = 2 * sum(math.prod(output) for _, output, _ in rows) * mib
    notes = (
        f'Total params: {counted:,}',
        f'Input size (MB): {image:.2f}',
        f'Forward/backward pass size (MB): {passes:.2f}',
        f'Params size (MB): {counted * mib:.2f}',
        f'Estimated Total Size (MB): {image + passes + counted * mib:.2f}',
        f'Not in this table: class token ({cls:,}), position embedding ({positions:,}). With them '
        f'the model has {counted + cls + positions:,} parameters.',
        'The pass size is a convention (every output twice, float32), not the memory of training: '
        'see vit_jax cost.',
    )
    cells = [(name, f'[{", ".join(map(str, o))}]', f'{size:,}') for name, o, size in lines]
    return tables.Table(title, ('Layer (type)', 'Output Shape', 'Param #>'), cells, notes)


def _torch_rows(
    model_config: Mapping[str, Any], num_classes: int, image_size: counts.ImageSize
) -> list[tuple[str, tuple[int, ...], int]]:
    """Class, output shape of an image, and parameters of each leaf module of the PyTorch ViT."""
    s = counts.sizes(model_config, image_size)
    d, m, t, n = s.width, s.hidden, s.tokens, s.patches
    grid = variants.token_grid(model_config, image_size)
    patch = math.prod(model_config['patches']['size'])
    block = [
        ('LayerNorm', (t, d), 2 * d),
        ('Linear', (t, 3 * d), 3 * (d * d + d)),
        ('Dropout', (s.heads, t, t), 0),
        ('Linear', (t, d), d * d + d),
        *((name, (t, d), 0) for name in ('Dropout', 'Attention', 'Identity')),
        ('LayerNorm', (t, d), 2 * d),
        ('Linear', (t, m), d * m + m),
        *((name, (t, m), 0) for name in ('GELU', 'Dropout')),
        ('Linear', (t, d), m * d + d),
        *((name, (t, d), 0) for name in ('Dropout', 'Mlp', 'Identity', 'Block')),
    ]
    features = model_config.get('representation_size') or 0
    if features:
        pooled = [('Linear', (features,), d * features + features), ('Tanh', (features,), 0)]
    else:
        pooled = [('Identity', (d,), 0)]
    return [
        ('Conv2d', (d, *grid), 3 * patch * d + d),
        ('Identity', (n, d), 0),
        ('PatchEmbed', (n, d), 0),
        ('Dropout', (t, d), 0),
        *block * s.blocks,
        ('LayerNorm', (t, d), 2 * d),
        *pooled,
        ('Linear', (num_classes,), (features or d) * num_classes + num_classes),
    ]


def _check_plain(model_config: Mapping[str, Any], num_classes: int) -> None:
    """Raises `UserError` unless the PyTorch implementation has this architecture."""
    reasons = {
        'it is an MLP-Mixer': 'num_blocks' in model_config,
        'it has a ResNet in front': model_config.get('resnet'),
        'it has a distillation token and two heads': model_config.get('distilled'),
        'its head has a hidden layer': model_config.get('mlp_head'),
        'it has no class token that the head reads': model_config.get('classifier', 'token')
        != 'token',
        'it has no head': not num_classes,
    }
    if 'num_blocks' not in model_config:
        reasons |= {f'it has {words}': True for words in pieces(model_config).values()}
    for reason, true in reasons.items():
        if true:
            name = model_config.get('model_name') or 'the model'
            raise UserError(
                f'{name} is not in the PyTorch code that the torchsummary style shows ({reason}): '
                'use --style jax'
            )
