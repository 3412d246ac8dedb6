"""Image-text models ready to use: embeddings of photos and texts, class names as a classifier."""

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import files, models, variants
from vit_jax.checkpoint import npz, two_towers
from vit_jax.data import text
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Source
from vit_jax.data.preprocess import Preprocess, normalize
from vit_jax.errors import UserError
from vit_jax.inference import class_texts, description, model_card, model_folder
from vit_jax.inference.classifier import OneSize, classify
from vit_jax.inference.features import Recorded
from vit_jax.inference.task import ONE_CLASS, SEVERAL, Task

FORMAT = 'vit_jax two towers'
MODEL_FILE, PARAMS_FILE = 'model.json', 'params.npz'
VOCABULARY_FILES = {'bert': 'vocab.txt', 'sentencepiece': 'vocab.model', 'json': 'tokenizer.json'}
_TEXTS_AT_ONCE = 64  # the most
_TOKEN_EMBEDDINGS = ('embedders_token_ids/embedding', 'Embed_0/embedding')


@dataclasses.dataclass(frozen=True)
class _Input:
    """`LitModel.pp`."""

    tokenizer_name: Literal['bert', 'sentencepiece', 'json']
    size: description.Side | tuple[description.Side, description.Side]
    max_len: Annotated[int, description.Between(2, 8192)]
    canonical: bool = False
    pad_token: str = ''
    pad_left: bool = False
    lower: bool = False
    end_token: str = ''
    blank_token: str = ''


@dataclasses.dataclass(frozen=True)
class _Description:
    """What model.json tells of a two-tower model: the arguments of `models.LitModel`."""

    format: Literal['vit_jax two towers']
    image: dict[str, Any]
    text_model: Literal['bert', 'text_transformer']
    text: dict[str, Any]
    out_dim: tuple[int | None, int | None]
    pp: dict[str, Any]
    model_name: str | None = None
    bias_init: float | None = None
    preprocessing: Preprocess | None = None
    source: dict[str, Any] = dataclasses.field(default_factory=dict)


class TwoTowers:
    """An image-text model with its weights and its tokenizer.

    Args:
      model: the Flax module; its `pp` tells size of images and length of texts.
      params: nested dict of float32 arrays.
      vocabulary: file of the tokenizer.
      source: where it came from; any JSON.
      preprocess: from decoded images to pixels; None for `text.lit_preprocess`.

    Raises:
      UserError: the parameters are not those of the model, or the vocabulary is not one of it.
    """

    def __init__(
        self,
        model: models.LitModel,
        params: Mapping[str, Any],
        vocabulary: str | os.PathLike[str],
        source: Mapping[str, Any],
        preprocess: Preprocess | None = None,
    ):
        pp = description.read(_Input, dict(model.pp))
        self.model, self.params, self.source = model, params, dict(source)
        self.vocabulary = pathlib.Path(vocabulary)
        self.tokenizer = text.make_tokenizer(dataclasses.asdict(pp), vocabulary)
        self.preprocess = preprocess or text.lit_preprocess(pp.size)
        _check(model, params, self.tokenizer, self.preprocess)
        self._embed_images = jax.jit(
            lambda params, pixels: model.apply({'params': params}, images=normalize(pixels))[0]
        )
        self._embed_tokens = jax.jit(
            lambda params, tokens: model.apply({'params': params}, tokens=tokens)[1]
        )

    def embed_images(self, pixels: np.ndarray) -> jax.Array:
        """Embeddings of images, float32 [B, C], of length 1.

        Args:
          pixels: float32 [B, *preprocess.size, 3] in [0, 255], what `preprocess` gives.
        """
        return self._embed_images(self._device_params, pixels)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, float32 [T, C], of length 1.

        A list is compiled for once: all its batches are of one size, a power of two.

        Args:
          texts: one or more.

        Raises:
          UserError: there is none, or something is no text.
        """
        if not len(texts):
            raise UserError('there is no text to embed')
        tokens = self.tokenizer(texts)
        batch = min(_TEXTS_AT_ONCE, 1 << (len(tokens) - 1).bit_length())
        found = []
        for start in range(0, len(tokens), batch):
            part = tokens[start : start + batch]
            full = np.pad(part, ((0, batch - len(part)), (0, 0)), mode='edge')
            found.append(np.asarray(self._embed_tokens(self._device_params, full))[: len(part)])
        return np.concatenate(found)

    @functools.cached_property
    def _device_params(self) -> Any:
        return jax.device_put(self.params)

    @property
    def temperature(self) -> float:
        """What cosines are multiplied with before the softmax."""
        return float(np.exp(self.params['t'][0]))

    @property
    def bias(self) -> float | None:
        """What is added to the product, before a sigmoid; None for a model with softmax."""
        return float(self.params['b'][0]) if 'b' in self.params else None


class ZeroShotClassifier:
    """A `Classifier` whose classes are texts: the logits are cosines times the temperature.

    Of a model with a bias (SigLIP) they are that plus the bias, and each class has a probability of
    its own.

    Args:
      towers: the model.
      class_names: the classes, at least one, each of them once.
      prompts: texts with {} in the place of the name; of several, see `class_texts.embed_classes`,
        also for `cache`.
      exclusive: whether one class is right, and no more: then probabilities sum to 1 in any case.

    Attributes:
      head: what embeddings of images are multiplied with, float32 [C, classes].

    Raises:
      UserError: no class, one twice, or a prompt without {}.
    """

    def __init__(
        self,
        towers: TwoTowers,
        class_names: Sequence[str],
        prompts: Sequence[str] = class_texts.PROMPTS,
        exclusive: bool = False,
        cache: bool = False,
    ):
        self.class_names = tuple(class_names)
        counts = collections.Counter(self.class_names)
        twice = [name for name, count in counts.items() if count > 1]
        if not self.class_names or '' in self.class_names or twice:
            found = f'{twice[0]!r} is there twice' if twice else 'one is missing'
            raise UserError(f'a zero-shot classifier needs names of classes, each once: {found}')
        self.preprocess = towers.preprocess
        self.channels = 3
        self.source: Mapping[str, Any] = {**towers.source, 'prompts': list(prompts)}
        self._towers = towers
        classes = class_texts.embed_classes(towers, self.class_names, prompts, cache=cache)
        self.task = ONE_CLASS if towers.bias is None or exclusive else Task(SEVERAL)
        self.head = jnp.asarray(towers.temperature * classes.T, jnp.float32)
        self._products = OneSize(lambda pixels: towers.embed_images(pixels) @ self.head)

    def logits(self, pixels: np.ndarray) -> Any:
        """See `Classifier.logits`."""
        return self._products(pixels) + (self._towers.bias or 0.0)


def image_tower(towers: TwoTowers) -> model_folder.Model:
    """The image tower as a model without a head, whose features are the embeddings."""
    config, params = dict(flax.core.unfreeze(towers.model.image)), dict(towers.params['img'])
    config['unit_features'] = True
    if projection := params.pop('head', None):
        size = projection['bias'].shape[0]
        config |= {'representation_size': size, 'representation_act': 'linear'}
        params['pre_logits'] = projection
    module = models.from_config(config, num_classes=0)
    return model_folder.Model(module, params, config, (), towers.preprocess, towers.source)


def save_classifier(
    folder: str | os.PathLike[str], towers: TwoTowers, classifier: ZeroShotClassifier
) -> None:
    """Writes a zero-shot classifier as a model folder, with the classes' embeddings as its head.

    Args:
      folder: see `model_folder.save`.
      towers: the model.
      classifier: of this model.

    Raises:
      UserError: see `model_folder.save`.
    """
    model = image_tower(towers)
    source = dict(classifier.source)
    source.pop('metrics', None)  # those of the towers say nothing of these classes
    if 'file' in source:
        source['model'] = source.pop('file')  # what is read later is another file
    bias = np.full(len(classifier.class_names), towers.bias or 0.0, np.float32)
    head = {'kernel': np.asarray(classifier.head), 'bias': bias}
    model_folder.save(
        folder,
        {**model.params, 'head': head},
        model_config={**model.model_config, 'multi_label': classifier.task.kind == SEVERAL},
        class_names=classifier.class_names,
        preprocess=towers.preprocess,
        source=source,
    )


def rank(
    towers: TwoTowers,
    query: str,
    source: Source,
    *,
    batch: int = 32,
    cache: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[list[tuple[str, float]], list[BadImageError]]:
    """Finds the images that fit a text best.

    Args:
      towers: the model.
      query: the text.
      source: at least one image.
      batch: images at once.
      cache: see `class_texts.embed_classes`.
      advance: called after each batch with the number of its images.

    Returns:
      Paths and cosines, the best first, and the errors of the images that could not be read.
    """
    classifier = ZeroShotClassifier(towers, (query,), ('{}',), cache=cache)
    recorded = Recorded(source)
    errors: list[BadImageError] = []
    found: list[tuple[str, float]] = []
    for data, logits in classify(classifier, recorded, batch=batch, on_bad=errors.append):
        cosines = (logits[:, 0] - (towers.bias or 0.0)) / towers.temperature
        found += [
            (recorded.keys[int(index)], float(cosine))
            for index, cosine, readable in zip(
                data['example'], cosines, data['readable'], strict=True
            )
            if readable
        ]
        advance(len(logits))
    return sorted(found, key=lambda item: -item[1]), errors


def load(path: str | os.PathLike[str], vocabulary: str | os.PathLike[str] = '') -> TwoTowers:
    """Loads a model of images and texts.

    Args:
      path: a folder that `save` wrote; a folder of transformers' CLIP or SigLIP, or of open_clip,
        with the files of its tokenizer; a `.npz` of big_vision's SigLIP; or a name in
        `variants.TWO_TOWERS` ('LiT-B16B'), which is downloaded once.
      vocabulary: of a `.npz`, the file of its tokenizer: a model of SentencePiece, or Gemma's
        tokenizer.json.

    Raises:
      UserError: there is nothing, it is damaged, or cannot be downloaded.
    """
    name, folder = os.fspath(path), files.expand(path)
    if bool(vocabulary) != (folder.suffix == '.npz'):
        raise UserError(
            f'{name}: a .npz of SigLIP needs the file of its tokenizer beside it (vocabulary, '
            '--vocabulary), and other models have their own'
        )
    if vocabulary:
        return _of_library(two_towers.open_npz(folder, files.expand(vocabulary)))
    if two_towers.is_folder(folder) and not (folder / MODEL_FILE).is_file():
        return _of_library(two_towers.open_folder(folder))
    if name in variants.TWO_TOWERS and not folder.is_dir():
        model = models.LitModel(**variants.TWO_TOWERS[name])
        file = models.two_tower.find(model.vocab_path, '--model FOLDER')
        return TwoTowers(model, model.load_variables()['params'], file, {'model': name})
    files.recover(folder)
    if not (folder / MODEL_FILE).is_file():
        raise UserError(
            f'{name} is neither a folder of a two-tower model (it has no {MODEL_FILE}) nor one of '
            f'{", ".join(variants.TWO_TOWERS)}'
        )
    found = files.read_json(folder / MODEL_FILE)
    if found.get('format') != FORMAT:
        raise UserError(
            f'{folder / MODEL_FILE} does not describe a two-tower model of vit_jax: there is no '
            'tower for texts'
        )
    try:
        described = description.read(_Description, found)
        description.read(_Input, described.pp)
        arguments = {f.name: getattr(described, f.name) for f in dataclasses.fields(described)}
        del arguments['format'], arguments['preprocessing'], arguments['source']
        model = models.LitModel(**arguments)
        file = folder / VOCABULARY_FILES[described.pp['tokenizer_name']]
        params = npz.open_file(folder / PARAMS_FILE, whole=True).read()
        source = {**described.source, 'file': str(folder)}
        return TwoTowers(model, params, file, source, described.preprocessing)
    except UserError as error:
        raise UserError(f'{folder} cannot be loaded: {error}') from error


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder that `save` wrote."""
    file = files.expand(path) / MODEL_FILE
    return file.is_file() and files.read_json(file).get('format') == FORMAT


def is_one(path: str | os.PathLike[str]) -> bool:
    """Whether `load` opens this without a vocabulary: a name, or a folder with both towers."""
    if os.fspath(path) in variants.TWO_TOWERS or is_folder(path):
        return True
    file = files.expand(path) / 'config.json'
    return file.is_file() and {'text_config', 'vision_config'} <= files.read_json(file).keys()


def _of_library(found: two_towers.TwoTowerWeights) -> TwoTowers:
    """Reads a model of another library."""
    weights = found.source
    source = {'file': weights.path, 'format': weights.format, 'notes': list(weights.notes)}
    model = models.LitModel(**found.model)
    return TwoTowers(model, weights.read(), found.vocabulary, source, found.preprocess)


def save(folder: str | os.PathLike[str], towers: TwoTowers, *, exists: str = 'refuse') -> None:
    """Writes a folder: weights, architecture and vocabulary. It appears complete, by a rename.

    Args:
      folder: a new folder.
      towers: the model.
      exists: 'replace' takes the place of one that is there, see `files.atomic_folder`.

    Raises:
      UserError: there is something else of this name, or it cannot be written.
    """
    model = towers.model
    names = ('image', 'text_model', 'text', 'pp', 'model_name', 'bias_init')
    described = flax.core.unfreeze({name: getattr(model, name) for name in names})
    described['preprocessing'] = towers.preprocess.to_dict()
    described['source'] = towers.source
    described |= {'format': FORMAT, 'out_dim': model.sizes, 'text': described['text'] or {}}
    count = sum(leaf.size for leaf in npz.flatten(towers.params).values())
    name = pathlib.Path(folder).absolute().name
    card = model_card.render_two_towers(name, described, towers.source, count)
    with files.atomic_folder(folder, exists=exists) as part:
        npz.save(part / PARAMS_FILE, towers.params)
        files.write_json(part / MODEL_FILE, described)
        file = part / VOCABULARY_FILES[model.pp['tokenizer_name']]
        text.save_vocabulary(towers.tokenizer, file)
        files.write_text(part / model_folder.CARD_FILE, card)


def _check(
    model: models.LitModel, params: Mapping[str, Any], tokenizer: Any, pp: Preprocess
) -> None:
    """Raises `UserError` where weights, model and vocabulary are not of one kind."""
    images = jax.ShapeDtypeStruct((1, *pp.size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, tokenizer.max_len), jnp.int32)
    try:
        init = jax.eval_shape(
            lambda images, tokens: model.init(jax.random.key(0), images=images, tokens=tokens),
            images,
            tokens,
        )
    except (ValueError, TypeError, ArithmeticError, AssertionError) as error:
        raise UserError(f'no model can be built as described: {error}') from error
    wanted = {name: leaf.shape for name, leaf in npz.flatten(init['params']).items()}
    found = {name: leaf.shape for name, leaf in npz.flatten(params).items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f'the weights are not those of the model: {name} is {found.get(name, "missing")}, '
                f'expected {wanted.get(name, "no such array")}'
            )
    rows = next(shape[0] for name, shape in found.items() if name.endswith(_TOKEN_EMBEDDINGS))
    text.check_vocabulary(tokenizer, rows)
