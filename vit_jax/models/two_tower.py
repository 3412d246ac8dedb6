"""Two towers, one for images and one for texts, whose embeddings meet in one space.

LiT, "Zero-Shot Transfer with Locked-image text Tuning": https://arxiv.org/abs/2111.07991. With
other arguments CLIP (https://arxiv.org/abs/2103.00020) and SigLIP
(https://arxiv.org/abs/2303.15343).

Shapes: B images, T texts, L tokens of a text, C size of the embeddings.

The helpers of `LitModel` are the original release's. They read files, and import what that needs
when they are called; nothing else in this package does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import layers, text
from vit_jax.models.vit import VisionTransformer

RELEASED = 'gs://vit_models/lit'  # where weights and vocabularies are
TEXT_MODELS = {'bert': text.BertModel, 'text_transformer': text.TextTransformer}


class LitModel(nn.Module):
    """An image tower and a text tower, under the original release's name and with its call.

    Attributes:
      image: mapping with the arguments of `VisionTransformer` but `num_classes`.
      text_model: 'bert' or 'text_transformer', see `models.text`.
      text: mapping with its arguments but `num_classes`; None for its defaults.
      out_dim: C; or a pair for images and texts, of which None leaves out the projection.
      pp: mapping with what texts and images go through first: `size` (pixels), `max_len` (L),
        `tokenizer_name` and other arguments of the tokenizer, see `data.text`; not used in the
        computation.
      model_name: not used in the computation.
      temperature_init: initial value of the temperature, exp(t).
      bias_init: initial value of the bias of the logits, which SigLIP has (-10); None for none.
      dtype: type of activations and matrix products; parameters are float32.
    """

    image: Any
    text_model: str = 'bert'
    text: Any = None
    out_dim: Any = 128
    pp: Any = None
    model_name: str | None = None
    temperature_init: float = 1.0
    bias_init: float | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Makes the module hashable, see `VisionTransformer`."""
        for name in ('image', 'text', 'out_dim', 'pp'):
            object.__setattr__(self, name, layers.hashable(getattr(self, name)))
        super().__post_init__()

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """`out_dim` for images and for texts."""
        return self.out_dim if isinstance(self.out_dim, tuple) else (self.out_dim, self.out_dim)

    @property
    def vocab_path(self) -> str:
        """Address of the released vocabulary."""
        suffix = {'bert': 'txt', 'sentencepiece': 'model'}[self.pp['tokenizer_name']]
        return f'{RELEASED}/{self.model_name}.{suffix}'

    def load_variables(self, path: str | None = None) -> dict[str, Any]:
        """Variables for `apply`.

        Args:
          path: a `.npz` file or its address; None for the released one: `NAME.npz` in the current
            folder, or where there is none, what is downloaded, once.

        Raises:
          UserError: it is not there, damaged, or cannot be downloaded.
        """
        from vit_jax.checkpoint import npz

        file = find(path or f'{RELEASED}/{self.model_name}.npz', 'load_variables(PATH)')
        return {'params': npz.open_file(file, whole=True).read()}

    def get_tokenizer(self) -> Any:
        """The function from a list of texts to token ids, int32 [T, L], see `data.text`.

        Its vocabulary is `NAME.txt` or `NAME.model` in the current folder, or where there is none,
        what is downloaded, once.

        Raises:
          UserError: the vocabulary cannot be downloaded.
        """
        from vit_jax.data import text

        option = 'vit_jax.data.text.make_tokenizer(model.pp, FILE)'
        return text.make_tokenizer(self.pp, find(self.vocab_path, option))

    def get_image_preprocessing(self, crop: bool = False) -> Callable[[Sequence[Any]], Any]:
        """The function from images, uint8 [height, width, 3], to float32 [B, size, size, 3].

        Args:
          crop: take the centre of the image instead of squashing it.
        """
        from vit_jax.data import text

        return text.PreprocessImages(self.pp['size'], crop)

    def get_pp(self, crop: bool = False) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """The function from a dict with `image` and `text`, or one of them, to the model's input.

        It replaces `image` by floats in [-1, 1] and adds `tokens`.

        Args:
          crop: see `get_image_preprocessing`.
        """
        prepare, tokenize = self.get_image_preprocessing(crop), self.get_tokenizer()

        def pp(features: Mapping[str, Any]) -> dict[str, Any]:
            features = dict(features)
            if 'image' in features:
                features['image'] = prepare([features['image']])[0]
            if 'text' in features:
                features['tokens'] = tokenize([features['text']])[0]
            return features

        return pp

    @nn.compact
    def __call__(
        self,
        *,
        images: jax.Array | None = None,
        tokens: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array | None, jax.Array | None, dict[str, jax.Array]]:
        """Embeds images, texts, or both.

        The logits of an image against texts are `out['t'] * zimg @ ztxt.T`, and with a bias, whose
        model takes each pair by itself (sigmoid, not softmax), `out['b']` more.

        Args:
          images: floats [B, height, width, 3] in [-1, 1], or None.
          tokens: token ids, integers [T, L], or None.
          train: whether dropout is active.

        Returns:
          zimg, the embeddings of the images [B, C], of length 1, or None; ztxt, those of the texts
          [T, C], or None; and `out`, a dict with `t` [1], the temperature that logits are
          multiplied with, and `b` [1] where there is a bias; `img/norm` [B, 1] and `txt/norm`
          [T, 1], the lengths before they were made 1; `img/normalized` and `txt/normalized`, zimg
          and ztxt; and what the text tower gives, `txt/pre_logits`, `txt/logits` and more.

        Raises:
          ValueError: an unknown text tower; images or tokens of another shape.
        """
        if self.text_model not in TEXT_MODELS:
            raise ValueError(
                f'unknown text model {self.text_model!r}: one of {", ".join(TEXT_MODELS)}'
            )
        image_size, text_size = self.sizes
        zimg = ztxt = None
        out: dict[str, jax.Array] = {}
        if tokens is not None:
            tower = TEXT_MODELS[self.text_model](
                **{'dtype': self.dtype, 'num_classes': text_size, **(self.text or {})}, name='txt'
            )
            inside: dict[str, jax.Array] = {}
            ztxt = tower(tokens, train=train, out=inside)
            out |= {f'txt/{name}': value for name, value in inside.items()}
            ztxt = _normalize(ztxt, 'txt', out)
        if images is not None:
            arguments = {'dtype': self.dtype, 'head_zeroinit': False, **self.image}
            arguments['num_classes'] = image_size or 0
            image_tower = VisionTransformer(**arguments, name='img')
            zimg = _normalize(image_tower(images, train=train), 'img', out)
        start = nn.initializers.constant(math.log(self.temperature_init))
        out['t'] = jnp.exp(self.param('t', start, (1,), jnp.float32))
        if self.bias_init is not None:
            constant = nn.initializers.constant(self.bias_init)
            out['b'] = self.param('b', constant, (1,), jnp.float32)
        return zimg, ztxt, out


def find(path: str, option: str) -> Any:
    """The file at a path or address, on this machine.

    Args:
      path: of a released file a copy in the current folder is taken, if there is one.
      option: how a user names a file instead, for messages.

    Raises:
      UserError: it is not there, or cannot be downloaded.
    """
    import os

    from vit_jax.checkpoint import catalog

    copy = os.path.basename(path)
    here = path.startswith(f'{RELEASED}/') and os.path.isfile(copy)
    return catalog.resolve(copy if here else path, option=option)


def _normalize(x: jax.Array, tower: str, out: dict[str, jax.Array]) -> jax.Array:
    """Embeddings [B, C] at length 1; what they were goes to `out`."""
    out[f'{tower}/normalized'], out[f'{tower}/norm'] = layers.unit_length(x)
    return out[f'{tower}/normalized']
