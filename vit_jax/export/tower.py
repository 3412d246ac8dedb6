"""Exports one tower of an image-text model: images or texts in, embeddings of length 1 out.

The image tower is an image model without a head, and exported as one. The text tower takes the ids
of tokens; its vocabulary, and what the tokenizer has to know, go with it.

    towers = two_tower.load('LiT-L16Ti')
    tower.export(towers, 'texts.onnx', tower='text', format='onnx')

The logits of an image against texts are `temperature * image @ texts.T`, and `bias` more.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

import vit_jax
from vit_jax.data import text
from vit_jax.errors import UserError
from vit_jax.export import formats, stablehlo, verify
from vit_jax.export.options import DEFAULT, TOWER_FORMATS, TOWERS, Options, check
from vit_jax.inference import onnx as inference_onnx
from vit_jax.inference import two_tower

OUTPUT = 'features'
# Texts that a text tower is verified on; as many of random tokens follow.
_TEXTS = ('a photo of a rose', 'Two dogs, one of them asleep!', '', 'red ' * 100)


def export(
    towers: two_tower.TwoTowers,
    output: str | os.PathLike[str],
    *,
    tower: str,
    format: str,
    options: Options = DEFAULT,
    verified: bool = True,
    images: Sequence[str] = (),
    console: rich.console.Console | None = None,
) -> verify.Report | None:
    """Exports a tower; `<output>.verify.json` stands beside it, see `formats.export`.

    Args:
        towers: the model.
        output: the file to write; must not exist, its folder must. A text tower's vocabulary is
            written beside it, as `<output>.vocab.txt`, `.vocab.model` or `.tokenizer.json`.
        tower: 'image' or 'text'.
        format: 'onnx' or 'stablehlo'.
        options: see `Options`; a text tower has `opset` and `dtype` alone, and no tower has
            `probabilities`.
        verified: whether to run it and compare.
        images: for an image tower, what to verify it on.
        console: for what happens.

    Returns:
        The report; None if not `verified`.

    Raises:
        UserError: an option that the tower does not have; or see `formats.export`.
    """
    check_options(tower, format, options, images)
    told = {
        'tower': tower,
        'temperature': towers.temperature,
        **({} if towers.bias is None else {'bias': towers.bias}),
    }
    if tower == 'image':
        return formats.export(
            two_tower.image_tower(towers),
            output,
            format=format,
            options=dataclasses.replace(options, features=True),
            verified=verified,
            images=images,
            told=told,
            console=console,
        )
    output = pathlib.Path(output)
    check(format, options, output)
    vocabulary = f'{output.name}.{two_tower.VOCABULARY_FILES[towers.model.pp["tokenizer_name"]]}'
    if os.path.lexists(place := output.with_name(vocabulary)):
        raise UserError(f'{place} exists; remove it, or name another place')
    told |= _text_metadata(towers, vocabulary)

    def make(path: pathlib.Path) -> Sequence[str]:
        text.save_vocabulary(towers.tokenizer, path.with_name(vocabulary))
        if format == 'stablehlo':
            exported = stablehlo.build_text(towers.model, towers.params)
            stablehlo.store(path, exported, told)
            return []
        from vit_jax.export import onnx, onnx_text  # need packages that StableHLO does not need

        versions = {'vit_jax.format': inference_onnx.FORMAT, 'vit_jax.version': vit_jax.__version__}
        stored = {'stored': options.stored} if options.stored else {}
        metadata = onnx.as_text({**versions, **told, 'dtype': options.compute, **stored})
        proto = onnx_text.build(towers.model, towers.params, options, metadata)
        return formats.write_onnx(path, proto, options)

    def test(path: pathlib.Path) -> verify.Report:
        return _verify(towers, path, format, options)

    name = formats.in_words(towers.model.model_name, towers.params['txt'])
    what = f'{name}, text tower, {towers.tokenizer.max_len} tokens'
    return formats.carry_out(
        output, format, options, what, make, test if verified else None, console
    )


def check_options(tower: str, format: str, options: Options, images: Sequence[str] = ()) -> None:
    """Raises `UserError` for what no tower, or not this one, can be exported with."""
    if tower not in TOWERS:
        raise UserError(f'unknown tower {tower!r}: one of {", ".join(TOWERS)}')
    if format not in TOWER_FORMATS:
        raise UserError(
            f'a tower is exported as {" or ".join(TOWER_FORMATS)}, not {format}; both together go '
            'to transformers by vit_jax convert --to huggingface'
        )
    if options.probabilities:
        raise UserError('a tower gives features, which have no --probabilities')
    if tower == 'text':
        others = ('layout', 'attention', 'preprocessing')
        given = [n for n in others if getattr(options, n) != getattr(DEFAULT, n)]
        given += ['images'] if images else []
        if given:
            raise UserError(f'--{given[0]} goes with --tower image, not with the text tower')


def _text_metadata(towers: two_tower.TwoTowers, vocabulary: str) -> dict[str, Any]:
    """What a program needs to make the input of a text tower."""
    pp = {name: value for name, value in dict(towers.model.pp).items() if name != 'size'}
    return {
        'model_name': towers.model.model_name or '',
        'output': OUTPUT,
        'tokenizer': pp.pop('tokenizer_name'),
        'max_len': pp.pop('max_len'),
        'tokenizer_settings': pp,
        'vocabulary': vocabulary,
        'source': dict(towers.source),
    }


def _verify(
    towers: two_tower.TwoTowers, path: pathlib.Path, format: str, options: Options
) -> verify.Report:
    """Compares a text tower with JAX, on texts and on random tokens, padded and not."""
    tokens = tokens_for(towers)
    keys = [repr(text[:20]) for text in _TEXTS]
    keys += [f'random tokens {i}' for i in range(len(tokens) - len(keys))]
    report = verify.Report(verify.VERIFIED, options.dtype, unit='texts')
    report.images = f'{len(_TEXTS)} texts and {len(tokens) - len(_TEXTS)} rows of random tokens'
    request = {'format': format, 'path': os.path.abspath(path), 'outputs': [OUTPUT]}

    def expected() -> Iterator[Mapping[str, np.ndarray]]:
        apply = jax.jit(lambda params, x: towers.model.apply({'params': params}, tokens=x)[1])
        with jax.default_matmul_precision('highest'):
            for start in range(0, len(tokens), verify.BATCH):
                part = jnp.asarray(tokens[start : start + verify.BATCH])
                yield {OUTPUT: np.asarray(apply(towers.params, part))}

    def write(file: pathlib.Path) -> None:
        np.save(file, tokens)

    verify.run_and_compare(report, request, keys, write, expected)
    return report


def tokens_for(towers: two_tower.TwoTowers) -> np.ndarray:
    """Tokens to verify a text tower on, int32 [14, L].

    Ten rows are random ids in front of the padding of an empty text, of any length: also none and
    all of them, so that no end of a text may be there.
    """
    tokenizer = towers.tokenizer
    rows = np.concatenate([tokenizer(_TEXTS), np.repeat(tokenizer(['']), 10, axis=0)])
    rng = np.random.default_rng(0)
    for place, row in enumerate(rows[len(_TEXTS) :]):
        count = round(place / 9 * tokenizer.max_len)
        row[:count] = rng.integers(0, tokenizer.size, count)
    return rows
