"""Training two towers on images with texts: what of a run is another than of a classifier's."""

import dataclasses
import hashlib
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from vit_jax import checkpoint, evaluate, files, groups, losses, models, sharding, variants
from vit_jax import config as config_lib
from vit_jax import state as state_lib
from vit_jax.checkpoint import bert, open_clip_configs
from vit_jax.data import captions, text
from vit_jax.data.dataset import Selection
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.reader import Reader
from vit_jax.errors import UserError
from vit_jax.inference import retrieval, two_tower
from vit_jax.run import initial_weights

SIGLIP_BIAS = -10.0  # at the beginning, https://arxiv.org/abs/2303.15343, section 3
_DIGITS_VOCABULARY = pathlib.Path(captions.__file__).with_name('digits_vocabulary.txt')
_TOKENIZER_OF = {'.txt': 'bert', '.model': 'sentencepiece'}
_TEXTS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """What a run on pairs has beside its model.

    Attributes:
      tokenizer: from texts to token ids.
      kind: of the loss, 'contrastive' or 'pairwise_sigmoid'.
      towers: that both towers start from; None where they are not of one model.
      text: weights that the text tower starts from; None where it is of `towers`, or new.
    """

    tokenizer: text.Tokenizer
    kind: str
    towers: two_tower.TwoTowers | None = None
    text: checkpoint.Weights | None = None

    @property
    def vocabulary(self) -> pathlib.Path:
        """The file of the tokenizer."""
        return pathlib.Path(self.tokenizer.vocab_path)

    def open_named(self, config: ml_collections.ConfigDict) -> checkpoint.Weights | None:
        """What the image tower starts from, not yet read; None for new weights."""
        if self.towers is None:
            return initial_weights.open_named(config)
        pixels = self.towers.preprocess
        return checkpoint.Weights(
            self._towers_name,
            'two towers',
            self.towers.params['img'],
            image_size=pixels.crop,
            preprocess=pixels,
        )

    @property
    def _towers_name(self) -> str:
        source = self.towers.source if self.towers else {}
        return str(source.get('file', source.get('model', '')))

    def initial_params(
        self,
        config: ml_collections.ConfigDict,
        model: models.LitModel,
        shapes: Mapping[str, Any],
        channels: int = 3,
        frozen: str = '',
    ) -> tuple[Mapping[str, Any], str]:
        """Parameters of both towers to start from, see `initial_weights.initial_params`."""
        known, told = self._text_params()
        weights = self.open_named(config)
        if weights is None:
            told = ['image tower: new weights', *told]
        else:
            image = models.from_config({**model.image, 'num_classes': 0})
            known['img'], _, words = initial_weights.fitted(
                config, weights, image, shapes['img'], keep_head=True
            )
            told = [f'image tower: {words}', *told]
        params, missing = _checked(known, shapes)
        if missing:
            new = state_lib.init_params(
                model, config.pp.crop, config.seed, channels=channels, only=missing
            )
            params = initial_weights.with_new(params, new)
        told += initial_weights.new_and_frozen(missing, frozen)
        return jax.tree.map(np.asarray, params), '\n  '.join(told)

    def _text_params(self) -> tuple[dict[str, Any], list[str]]:
        """The parameters there are but for the image tower, and where they come from."""
        if self.towers is not None:
            unused = ('img', 'b') if self.kind == 'contrastive' else ('img',)
            known = {name: tree for name, tree in self.towers.params.items() if name not in unused}
            return known, [f'text tower: {self._towers_name}']
        if self.text is not None:
            notes = '\n  '.join(['', *self.text.notes])
            return {'txt': self.text.params}, [f'text tower: {self.text.path}{notes}']
        return {}, ['text tower: new weights']

    def loss(self, mesh: Mesh) -> losses.LossFn:
        """The loss of training."""
        make = {'contrastive': losses.contrastive, 'pairwise_sigmoid': losses.pairwise_sigmoid}
        return make[self.kind](mesh)

    def digest(self) -> str:
        """Tells the vocabulary from another."""
        return hashlib.sha256(self.vocabulary.read_bytes()).hexdigest()[:32]


def of_run(config: ml_collections.ConfigDict, given: Mapping[str, Any]) -> Pairs | None:
    """`open_pairs` of a run; None if it is of images alone.

    Args:
      config: resolved; changed.
      given: what of the run is the caller's own, by name; None for what is not.

    Raises:
      UserError: sources, loss or model of pairs, which config says; or see `open_pairs`.
    """
    if not variants.has_two_towers(config.model) and not isinstance(
        given['model'], models.LitModel
    ):
        return None
    for name, value in given.items():
        if value is not None and name != 'tx':
            raise UserError(
                f'{name}: pairs of images and texts are trained on by what the config says '
                '(configs/lit.py); leave it out'
            )
    return open_pairs(config)


def open_pairs(config: ml_collections.ConfigDict) -> Pairs:
    """Opens the vocabulary and the text tower's weights, and settles `config.model` by them.

    Args:
      config: resolved, with two towers; changed.

    Raises:
      UserError: there is no vocabulary, or something cannot be read or does not fit.
    """
    model, towers, weights = config.model.to_dict(), _both_towers(config), None
    if towers is not None:
        vocabulary = towers.vocabulary
        names = ('image', 'text_model', 'text', 'out_dim', 'pp', 'bias_init')
        model |= {name: _plain(getattr(towers.model, name)) for name in names}
    elif config.pretrained_text:
        found = bert.open_folder(config.pretrained_text)
        vocabulary = _vocabulary(config) if config.vocabulary else found.vocabulary
        weights = found.source
        model |= {'text_model': 'bert', 'text': dict(found.text), 'pp': model['pp'] | found.pp}
    else:
        vocabulary = _vocabulary(config)
        model['pp']['tokenizer_name'] = _tokenizer_name(vocabulary, model)
    kind = config.loss or ('contrastive' if model.get('bias_init') is None else 'pairwise_sigmoid')
    model['bias_init'] = None if kind == 'contrastive' else model.get('bias_init') or SIGLIP_BIAS
    model['pp']['size'] = config.pp.crop
    tokenizer = text.make_tokenizer(model['pp'], vocabulary)
    arguments = model['text'] = model['text'] or {}
    if towers is None and weights is None and 'vocab_size' not in arguments:
        arguments['vocab_size'] = max(tokenizer.size, tokenizer.unknown_token + 1)
    if 'vocab_size' in arguments:
        text.check_vocabulary(tokenizer, arguments['vocab_size'])
    with config.unlocked():
        config.model = ml_collections.ConfigDict(model)
    config_lib.check_model(config)
    return Pairs(tokenizer, kind, towers, weights)


def _both_towers(config: ml_collections.ConfigDict) -> two_tower.TwoTowers | None:
    """The model that both towers start from; None where the weights are of an image tower."""
    name = config.pretrained
    if not name or config.vocabulary or config.pretrained_text:
        return None
    folder = files.expand(name)
    both = two_tower.is_folder(folder) or open_clip_configs.is_folder(folder)
    if not both and (folder / 'config.json').is_file():
        both = 'text_config' in files.read_json(folder / 'config.json')
    return two_tower.load(name) if both or name in variants.TWO_TOWERS else None


def _plain(value: Any) -> Any:
    """A setting of a module as it is in a config."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _vocabulary(config: ml_collections.ConfigDict) -> pathlib.Path:
    """The file that the config names."""
    if not config.vocabulary:
        raise UserError(
            'a new text tower needs a vocabulary: --config.vocabulary=vocab.txt (of BERT) or '
            'spiece.model (of SentencePiece). --config.pretrained_text=FOLDER of BERT has its own, '
            'and so has --config.pretrained=FOLDER of a model of images and texts, with both towers'
        )
    if config.vocabulary == 'digits':
        return _DIGITS_VOCABULARY
    return files.expand(config.vocabulary)


def _tokenizer_name(vocabulary: pathlib.Path, model: Mapping[str, Any]) -> str:
    name = _TOKENIZER_OF.get(vocabulary.suffix)
    if name is None:
        raise UserError(
            f'config.vocabulary={vocabulary} is neither a .txt (BERT, a token in each line) nor a '
            '.model (SentencePiece)'
        )
    if model['text_model'] == 'bert' and name != 'bert':
        raise UserError(
            f'config.vocabulary={vocabulary}: a text tower of BERT takes a vocabulary of BERT, '
            'whose token 0 is padding: use another, or the tower text_transformer'
        )
    return name


def check(
    config: ml_collections.ConfigDict,
    train: Selection,
    model: models.LitModel,
    params: Any,
    frozen: str,
    images: jax.ShapeDtypeStruct,
) -> jax.ShapeDtypeStruct:
    """Checks what depends on the data and on the parameters.

    Args:
      config: resolved.
      train: the training pairs.
      model: the towers.
      params: the parameters, or their shapes.
      frozen: pattern of the parameters that stay as they are.
      images: of a batch.

    Returns:
      What a batch has for the images: those, or their embeddings (`config.cache_features`).

    Raises:
      UserError: it does not fit.
    """
    if config.batch > len(train):
        raise UserError(
            f'config.batch={config.batch} is more than the {len(train):,} training images, so that '
            'an image would be compared with itself: use a smaller one'
        )
    if not config.cache_features:
        return images
    names = [name for name in groups.names_of(params) if name.startswith('img/')]
    free = [name for name in names if not re.fullmatch(frozen, name)]
    if free:
        raise UserError(
            f'config.cache_features=True keeps embeddings of an image tower that stays as it '
            f"is, and {free[0]} is trained: add --config.frozen='img/.*'"
        )
    pixels = jax.ShapeDtypeStruct(images.shape, np.float32)
    found = jax.eval_shape(lambda p, x: model.apply({'params': p}, images=x)[0], params, pixels)
    return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=images.sharding)


def _checked(
    known: Mapping[str, Any], shapes: Mapping[str, Any]
) -> tuple[Mapping[str, Any], list[str]]:
    """The parameters of these that have values, and the names of those that are missing.

    Raises:
      UserError: one is not of the model.
    """
    wanted, found = (traverse_util.flatten_dict(dict(tree), sep='/') for tree in (shapes, known))
    found = {n: leaf for n, leaf in found.items() if not isinstance(leaf, jax.ShapeDtypeStruct)}
    for name, leaf in found.items():
        if name not in wanted or wanted[name].shape != leaf.shape:
            needed = wanted[name].shape if name in wanted else 'no such array'
            raise UserError(
                f'the weights are not those of config.model: {name} is {tuple(leaf.shape)}, '
                f'expected {needed}'
            )
    missing = [name for name in wanted if name not in found]
    return traverse_util.unflatten_dict(found, sep='/'), missing


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Evaluates on pairs; stands in the place of an evaluation step.

    Attributes:
      pairs: of the run.
      image_step: of `steps.make_eval_step`.
      text_step: of `steps.make_text_step`.
    """

    pairs: Pairs
    image_step: Callable[..., dict[str, jax.Array]]
    text_step: Callable[..., jax.Array]
    _tokens: dict[str, captions.Tokens] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        params: Any,
        images: Reader,
        source: Selection,
        preprocess: Preprocess,
        mesh: Mesh,
        *,
        split: str,
        **reading: Any,
    ) -> tuple[dict[str, float], float] | None:
        """Retrieval over all pairs of a source: each image among all texts, and vice versa.

        Args:
          params: on the devices.
          images: the examples.
          source: that they are of.
          preprocess: how they become the model's input.
          mesh: the devices.
          split: 'val' or 'test'.
          **reading: `batch` and others of `evaluate.collect`.

        Returns:
          `retrieval.metrics`, the loss of all images with the first text of each as one batch, and
          the number of unreadable images, each name with the split; and images per second and
          device. None if `should_stop` ended it.

        Raises:
          UserError: not one image can be read.
        """
        begin = time.monotonic()
        told = evaluate.collect(self.image_step, params, images, preprocess, mesh, **reading)
        if told is None:
            return None
        speed = len(images) / (time.monotonic() - begin) / mesh.devices.size
        if split not in self._tokens:
            self._tokens[split] = captions.Tokens.of(source, self.pairs.tokenizer)
        tokens = self._tokens[split]
        texts = _embed_texts(self.text_step, params, tokens.ids, mesh)
        usable = tokens.usable(told['readable'])
        evaluate.check_readable(usable)
        kept = usable[tokens.image]  # the texts of images that can be read
        new = np.cumsum(usable) - 1
        owner, texts, embeddings = new[tokens.image[kept]], texts[kept], told['embedding'][usable]
        first = np.unique(owner, return_index=True)[1]
        scalars = {name: float(jax.device_get(params[name])[0]) for name in ('t', 'b')
                   if name in params}  # fmt: skip
        content = np.unique(tokens.ids[kept], axis=0, return_inverse=True)[1]
        found = retrieval.metrics(embeddings, texts, owner, content)
        found['loss'] = retrieval.loss(
            self.pairs.kind, embeddings, texts[first], np.exp(scalars['t']), scalars.get('b', 0.0)
        )
        if not usable.all():
            found['unreadable'] = int((~usable).sum())
        return {f'{name}_{split}': value for name, value in found.items()}, speed


def _embed_texts(
    text_step: Callable[..., jax.Array], params: Any, ids: np.ndarray, mesh: Mesh
) -> np.ndarray:
    """Embeddings of texts [T, C] from token ids [T, L]; all processes do it together."""
    processes, devices = jax.process_count(), mesh.devices.size
    size = -(-min(_TEXTS_AT_ONCE, len(ids)) // devices) * devices
    part, found = size // processes, []
    for start in range(0, len(ids), size):
        some = ids[start : start + size]
        full = np.pad(some, ((0, size - len(some)), (0, 0)), mode='edge')
        mine = full[jax.process_index() * part :][:part]
        batch = sharding.put_batch({'tokens': mine}, mesh)
        found.append(np.asarray(jax.device_get(text_step(params, batch['tokens'])))[: len(some)])
    return np.concatenate(found)
