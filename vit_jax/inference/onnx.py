"""Exported ONNX files as classifiers, by onnxruntime: neither JAX nor PyTorch is imported.

What is needed beside the graph (class names, preprocessing, range of the input) is in the file's
metadata, where `vit_jax export` wrote it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vit_jax import files
from vit_jax.errors import UserError, extra
from vit_jax.inference import description
from vit_jax.inference.task import ONE_CLASS, SEVERAL, Task

FORMAT = '1'
INPUT = 'image'
OUTPUTS = ('logits', 'probabilities')
LAYOUTS = ('NHWC', 'NCHW')
_KEYS = ('class_names', 'image_size', 'layout', 'value_range', 'preprocessing', 'output')


@dataclasses.dataclass(frozen=True)
class Metadata(description.Description):
    """What a file's metadata say.

    Attributes:
      layout: of the input, one of `LAYOUTS`.
      output: whether the graph gives logits or probabilities.
      multi_label: whether classes do not exclude each other; files of earlier versions have no
        `task`.
    """

    layout: Literal['NHWC', 'NCHW']
    output: Literal['logits', 'probabilities']
    multi_label: bool = False


class OnnxClassifier:
    """A `classifier.Classifier` of an exported file.

    Args:
      path: the `.onnx` file; weights kept beside it (`.onnx.data`) are found by its own reference.
      threads: processors for one batch; default all.

    Attributes:
      class_names: in label order.
      preprocess: from decoded images to pixels.
      channels: of the images.
      source: where the model came from.
      task: what the outputs are.

    Raises:
      UserError: no such file, not an ONNX file, a file of another program, or onnxruntime is not
        installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None):
        self._path = os.fspath(path)
        self._session = _open_session(pathlib.Path(path), threads)
        described = _read_metadata(self._session, self._path)
        self.class_names = described.class_names
        self.preprocess = described.preprocessing
        shape = self._session.get_inputs()[0].shape
        self.channels = shape[3 if described.layout == 'NHWC' else 1]
        self.source: Mapping[str, Any] = described.source
        told = Task(SEVERAL) if described.multi_label else ONE_CLASS
        self.task = described.task or told
        self._output = described.output
        self._channels_first = described.layout == 'NCHW'
        self._bytes = self._session.get_inputs()[0].type == 'tensor(uint8)'
        low, high = described.value_range
        self._scale, self._shift = np.float32((high - low) / 255), np.float32(low)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Scores whose softmax gives the probabilities.

        Args:
          pixels: float32 [B, *preprocess.size, channels] in [0, 255], any B. A file whose graph
            takes bytes gets them rounded.

        Returns:
          float32 [B, classes]; for a file that gives probabilities their logarithm, which is the
          logits less a constant for each image (their log odds, where classes do not exclude each
          other).

        Raises:
          UserError: the graph cannot be computed, or gives something else.
        """
        if self._bytes:
            pixels = np.rint(pixels).astype(np.uint8)
        else:
            pixels = pixels * self._scale + self._shift
        if self._channels_first:
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        try:
            (scores,) = self._session.run([self._output], {INPUT: pixels})
        except Exception as error:  # of a dozen kinds, as when it is opened
            raise UserError(f'{self._path} cannot be computed: {_first_line(error)}') from error
        if scores.dtype.kind != 'f' or scores.shape != (len(pixels), len(self.class_names)):
            raise UserError(
                f'{self._path} gives {scores.dtype} {list(scores.shape)} for {len(pixels)} images, '
                f'not a score for each of its {len(self.class_names)} classes'
            )
        if self._output == 'probabilities':
            tiny = np.finfo(np.float32).tiny
            others = np.log(np.maximum(1 - scores, tiny)) if self.task.kind == SEVERAL else 0
            scores = np.log(np.maximum(scores, tiny)) - others
        return scores


def _open_session(path: pathlib.Path, threads: int | None) -> Any:
    if not path.is_file():
        raise UserError(f'there is no ONNX file {path}')
    with extra('export'):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    # Its errors come as exceptions; its log would show names from the graph as they are.
    onnxruntime.set_default_logger_severity(4)
    options.log_severity_level = 4
    # Threads that wait for work must not spin: decoding needs the processors.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    if threads:
        options.intra_op_num_threads = threads
    wanted = ('CUDAExecutionProvider', 'CPUExecutionProvider')
    available = onnxruntime.get_available_providers()
    providers = [provider for provider in wanted if provider in available]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime raises a dozen kinds for a file it cannot use.
        raise UserError(
            f'{path} cannot be opened as an ONNX model: {_first_line(error)}'
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0][:300] or type(error).__name__


def _read_metadata(session: Any, path: str) -> Metadata:
    """The metadata, parsed, after a check that it describes the graph.

    Raises:
      UserError: says what is missing or wrong.
    """
    try:
        metadata = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise UserError(f'the metadata of {path} cannot be used: {error}') from error
    stamp = metadata.get('vit_jax.format', '')[:20]
    missing = [key for key in ('vit_jax.format', *_KEYS) if key not in metadata]
    if stamp and metadata.get('tower') == 'text':
        raise UserError(f'{path} is a text tower: it takes tokens of texts, not images')
    if missing:
        raise UserError(
            f'{path} has no metadata {", ".join(missing)}, so its class names and preprocessing '
            'are not known: it was not written by vit_jax export. Export the model with it, or '
            'use the file by a program of your own (docs/serving.md)'
        )
    if stamp != FORMAT:
        raise UserError(
            f'{path} has metadata of format {stamp}, this vit_jax reads {FORMAT}: update vit_jax'
        )
    try:
        found = {key: metadata[key] for key in ('layout', 'output')}
        for key in ('class_names', 'image_size', 'value_range', 'preprocessing', 'source'):
            found[key] = files.parse_json(metadata.get(key, '{}'))
        if 'task' in metadata:
            found['task'] = files.parse_json(metadata['task'])
        found['multi_label'] = files.parse_json(metadata.get('multi_label', 'false'))
        if not found['class_names']:
            raise UserError('it is a model without classification head, with no probabilities')
        described = description.read(Metadata, found)
    except (ValueError, UserError) as error:
        raise UserError(f'the metadata of {path} cannot be used: {error}') from error
    _check_graph(session, described, path)
    return described


def _check_graph(session: Any, described: Metadata, path: str) -> None:
    inputs, outputs = (
        {node.name: node.shape if node.type.startswith('tensor(') else node.type for node in nodes}
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    size, output = list(described.preprocessing.size), described.output
    last = described.layout == 'NHWC'
    # Any number of channels, but not an open one.
    given = inputs.get(INPUT, [])
    channels = given[3 if last else 1] if len(given) == 4 else 3
    channels = channels if isinstance(channels, int) else 3
    shape = [*size, channels] if last else [channels, *size]
    classes = len(described.class_names)
    if list(inputs) != [INPUT] or not _fits(inputs[INPUT], shape):
        raise UserError(f'{path} takes {inputs}, its metadata says {INPUT}: {["batch", *shape]}')
    if not _fits(outputs.get(output, []), [classes]):
        raise UserError(f"{path} gives {outputs}, its metadata says {output}: ['batch', {classes}]")
    if isinstance(batch := inputs[INPUT][0], int):
        raise UserError(
            f'{path} takes {batch} images at once and no other number; export it again, with an '
            'open first dimension'
        )


def _fits(shape: Sequence[Any], after_batch: list[int]) -> bool:
    """Whether a shape is [batch, *after_batch], where a dimension may be a name."""
    return len(shape) == 1 + len(after_batch) and all(
        have == want or not isinstance(have, int)
        for have, want in zip(shape[1:], after_batch, strict=True)
    )
