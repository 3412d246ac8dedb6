"""Proves a model against PyTorch: same weights, same images, number by number.

The reference is the ViT of Hugging Face transformers, where it has the model (Vision Transformers
with a class token), else the independent implementation of benchmarks/torch_reference.py; timm too,
if it is installed. Both sides run in float32 and in float64, so that one sees which side rounds,
and PyTorch once more with its default erf GELU, for which these weights were not trained.

Examples:
    python scripts/check_parity.py --model ViT-B_16.npz
    python scripts/check_parity.py --model runs/flowers/model --images photos/
    python scripts/check_parity.py --model ViT-B_16.npz --perturb head/bias      # must fail

Exit status: 0 if the logits agree; 1 if they differ by more than 1e-4 and by more than twice the
distance of PyTorch's float32 from its own float64 (--tolerance sets another limit); 2 if no
comparison was possible. Blocks hold values of 30 and more, so their rows are held to twice their
own distance from float64 only: a row beyond it is marked ("more than rounding"), which shows where
a difference begins and does not by itself fail the check. Where the head is all zeros (weights for
fine-tuning), what the head reads is judged instead.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping

import numpy as np

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import cli

REFERENCES = ('auto', 'transformers', 'torch_reference', 'timm')


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = _parse()
    for module in ('torch', 'jax'):
        if importlib.util.find_spec(module) is None:
            print(
                f'check_parity.py: {module} is not installed. `bash scripts/setup.sh --test` '
                'installs what is needed (requirements-test.txt)',
                file=sys.stderr,
            )
            return 2

    def work() -> int:
        result = check(args)
        if args.json:
            print(json.dumps(result, indent=1))
        return 0 if result['passed'] else 1

    return cli.run(work, failure=2)


def check(args: argparse.Namespace) -> dict:
    """Compares, prints (to standard error with --json) and returns the result for JSON."""
    import jax

    from vit_jax.analysis import compare as parity
    from vit_jax.errors import UserError
    from vit_jax.inference import model_folder

    say = functools.partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    path = _find(args.model)
    model = model_folder.load(path, variant=args.variant)
    weights, reader = _reference_weights(path, model)
    folder = path if _is_transformers_folder(path) and not args.perturb else None
    if folder is not None:
        reader = "by transformers' own from_pretrained"
    perturbed = _perturb(weights, args.perturb) if args.perturb else weights
    variant = model.model_config.get('model_name') or 'a model of no known variant'
    zero_head = _zero_head(model.params)

    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    say(f'{variant}, {count:,} parameters, {model.image_size} px: {path}')
    say(f'PyTorch reads the weights {reader}')
    batches, described = _images(args, model)
    say(described)
    if args.perturb:
        say(f'{args.perturb} is 1 % larger on the PyTorch side: the check should fail')
    if zero_head:
        say(
            'The head is all zeros, as in weights for fine-tuning only: all logits are 0 and prove '
            'nothing. The final features (pre_logits) are judged'
        )
    ours = parity.outputs_of(model.model, model.params)
    ours64 = parity.outputs_of(model.model, model.params, np.float64)

    result = {
        'model': str(path),
        'variant': model.model_config.get('model_name'),
        'num_parameters': count,
        'image_size': model.image_size,
        'images': described,
        'weights_read': reader,
        'perturbed': args.perturb or None,
        'zero_head': zero_head,
        'references': [],
    }
    for name, build in _references(args.reference, model, perturbed, folder):
        say(f'\nReference: {name}')
        try:
            sides = [ours, build('tanh', False), ours64, build('tanh', True)]
            erf_side = build('erf', False)
        except (KeyError, ValueError, RuntimeError) as e:
            raise UserError(f'{path}: {name} cannot be built with these weights: {e}') from e
        rows: dict[str, parity.Row] = {}
        erf: dict[str, parity.Difference] = {}
        for images in batches():
            outputs = [side(images) for side in sides]
            parity.add(rows, *outputs)
            erf_outputs = erf_side(images)
            for key in {'logits', 'pre_logits'} & erf_outputs.keys():
                erf.setdefault(key, parity.Difference()).add(erf_outputs[key], outputs[1][key])
        verdict = parity.judge(rows, zero_head=zero_head, tolerance=args.tolerance)
        say(parity.table(rows))
        say(_erf_line(verdict, erf[verdict.output]))
        say(verdict)
        result['references'].append(
            {
                'name': name,
                'passed': verdict.passed,
                'verdict': dataclasses.asdict(verdict) | {'text': str(verdict)},
                'rows': {key: row.to_dict() for key, row in rows.items()},
                'erf_gelu': erf[verdict.output].to_dict(),
            }
        )
    result['passed'] = all(reference['passed'] for reference in result['references'])
    return result


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('--model', required=True, help='model folder, file of weights, or released name')
    add('--images', nargs='+', default=[], metavar='DIR', help='images (default: 8 made-up ones)')
    add('--limit', type=int, default=0, metavar='N', help='use the first N images (default: all)')
    add('--variant', default='', help='architecture of a file, where its arrays do not tell')
    add('--tolerance', type=float, metavar='X', help='how far logits may differ')
    add(
        '--reference',
        choices=REFERENCES,
        default='auto',
        help='compare with this one only (default: as described above)',
    )
    add('--perturb', metavar='NAME', help='make this array 1 %% larger on the PyTorch side')
    add('--batch', type=int, default=4, metavar='N', help='images at once (default: 4)')
    add('--json', action='store_true', help='print the result as JSON, the rest to standard error')
    args = parser.parse_args()
    if args.tolerance is not None and not args.tolerance >= 0:
        parser.error(f'--tolerance: expected a number of at least 0, got {args.tolerance}')
    if args.limit < 0 or args.batch < 1:
        parser.error('--limit is a number of images, or 0 for all; --batch is at least 1')
    return args


def _find(model: str) -> pathlib.Path:
    from vit_jax.checkpoint import catalog

    return pathlib.Path(model) if os.path.exists(model) else catalog.resolve(model)


def _reference_weights(path: pathlib.Path, model) -> tuple[dict[str, np.ndarray], str]:
    """The weights under published names, and how they were read."""
    from benchmarks import torch_reference
    from vit_jax.checkpoint import npz

    file = path / 'params.npz' if path.is_dir() else path
    if file.suffix == '.npz' and file.is_file():
        weights = torch_reference.read_weights(file)
        if any(name in weights for name in ('head/bias', 'embedding/bias', 'stem/bias')):
            return weights, 'from the file, by code of its own'
    weights = {k: np.asarray(v) for k, v in npz.flatten(npz.to_published(model.params)).items()}
    return weights, 'as vit_jax read them (only the computation is compared, not the reading)'


def _is_transformers_folder(path: pathlib.Path) -> bool:
    """Whether transformers itself can load it for input in [-1, 1]: then it does."""
    if not (path / 'config.json').is_file():
        return False
    config = json.loads((path / 'config.json').read_text(encoding='utf-8'))
    processor = {}
    if (path / 'preprocessor_config.json').is_file():
        text = (path / 'preprocessor_config.json').read_text(encoding='utf-8')
        processor = json.loads(text)
    half = [0.5] * 3
    normalization = processor.get('image_mean', half), processor.get('image_std', half)
    return config.get('model_type') == 'vit' and normalization == (half, half)


def _perturb(weights: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    import flax

    from vit_jax.checkpoint import npz
    from vit_jax.errors import UserError

    # A file may number modules in the published way, while scripts/inspect_checkpoint.py shows
    # Linen's names.
    keys = flax.traverse_util.unflatten_dict({key: key for key in weights}, sep='/')
    name = npz.flatten(npz.to_linen(keys)).get(name, name)
    if name not in weights:
        near = difflib.get_close_matches(name, weights, n=3, cutoff=0.0)
        raise UserError(f'--perturb: there is no array {name}; nearest: {", ".join(near)}')
    if not weights[name].any():
        raise UserError(f'--perturb: {name} is all zeros, so 1 % of it is nothing; name another')
    return {**weights, name: weights[name] * np.float32(1.01)}


def _zero_head(params: Mapping) -> bool:
    heads = [params[name] for name in ('head', 'head_dist') if name in params]
    return bool(heads) and not any(np.any(head['kernel']) for head in heads)


def _images(args, model) -> tuple[Callable[[], Iterator[np.ndarray]], str]:
    """A function that gives batches of inputs, [B, size, size, 3] in [-1, 1], and their name."""
    from vit_jax.analysis import compare as parity
    from vit_jax.data.decode import decode
    from vit_jax.data.preprocess import normalize
    from vit_jax.inference import predict

    size = model.image_size
    if not args.images:
        made_up = parity.made_up_images(args.limit or 8, size)
        count, what = len(made_up), 'made-up images'
    else:
        files = predict.find_images(args.images)
        files = files[: args.limit or None]
        count, what = len(files), f'images from {" ".join(args.images)}'

    def read(file: str) -> np.ndarray:
        image = decode(pathlib.Path(file).read_bytes(), key=file, exif=True)
        return normalize(model.preprocess.evaluate(image))

    def batches() -> Iterator[np.ndarray]:
        for first in range(0, count, args.batch):
            if args.images:
                yield np.stack([read(file) for file in files[first : first + args.batch]])
            else:
                yield made_up[first : first + args.batch]

    return batches, f'{count} {what}, {size} x {size} pixels'


def _references(wanted: str, model, weights, folder) -> Iterator[tuple[str, Callable]]:
    """Yields (description, function of the form of GELU and of float64 that gives a runner)."""
    import torch

    from benchmarks import torch_libraries, torch_reference
    from vit_jax.errors import UserError

    classifier = model.model_config.get('classifier', '')
    special = ('conv_root/kernel', 'dist', 'head_hidden/kernel')
    is_plain = classifier == 'token' and not any(name in weights for name in special)
    if wanted == 'transformers' and not is_plain:
        raise UserError('--reference: transformers has only Vision Transformers with a class token')
    timm_name = torch_libraries.timm_name(model.model_config.get('model_name') or '')
    if wanted == 'timm' and (not timm_name or 'pre_logits/bias' in weights):
        raise UserError('--reference: timm has no such model')

    version = f'PyTorch {torch.__version__}'
    transformers = timm = None
    if is_plain and wanted in ('auto', 'transformers'):
        os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
        transformers = _library('transformers', wanted)
    if transformers is not None:

        def build(gelu: str, wide: bool) -> Callable:
            if folder is not None:
                return _runner(torch_libraries.transformers_folder(folder, gelu), wide)
            return _runner(torch_libraries.transformers_model(weights, gelu), wide)

        yield f'ViT of transformers {transformers.__version__}, {version}', build
    elif wanted in ('auto', 'torch_reference'):
        yield (
            f'benchmarks/torch_reference.py, {version}',
            lambda gelu, wide: _runner(
                torch_reference.build(weights, classifier=classifier, gelu=gelu), wide
            ),
        )
    if timm_name and 'pre_logits/bias' not in weights and wanted in ('auto', 'timm'):
        timm = _library('timm', wanted)
    if timm is not None:
        yield (
            f'{timm_name} of timm {timm.__version__}, {version}',
            lambda gelu, wide: _runner(
                torch_libraries.TimmModel(timm_name, weights, model.image_size, gelu), wide
            ),
        )


def _library(name: str, wanted: str):
    """The library, or None if it is not installed; an error if it was asked for by name."""
    from vit_jax.errors import UserError

    if importlib.util.find_spec(name) is None:
        if wanted == name:
            raise UserError(f'--reference: {name} is not installed: pip install {name}')
        return None
    try:
        return importlib.import_module(name)
    except Exception as e:  # an installation that does not fit PyTorch's fails in any way it likes
        if wanted == name:
            raise UserError(f'--reference: {name} is installed but cannot be imported: {e}') from e
        print(f'{name} is installed but cannot be imported ({e}); left out', file=sys.stderr)
        return None


def _runner(module, wide: bool) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    import torch

    dtype = torch.float64 if wide else torch.float32
    module = module.to(dtype)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            outputs = module(torch.from_numpy(images).to(dtype))
        return {name: output.numpy() for name, output in outputs.items()}

    return run


def _erf_line(verdict, erf) -> str:
    times = ''
    if verdict.passed and verdict.difference:
        times = f', {erf.max / verdict.difference:.0f} times as much'
    return (
        f"With PyTorch's default erf GELU instead of tanh, its {verdict.output} would differ by "
        f'{erf.max:.1e} (mean {erf.mean:.1e}){times}; argmax agrees in {erf.agree} of '
        f'{erf.vectors}'
    )


if __name__ == '__main__':
    sys.exit(main())
