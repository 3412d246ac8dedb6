"""What the input layers of a Vision Transformer have learned: patch filters, position embeddings.

The two other pictures of "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929), figure
7 left and centre. P is the patch size, D the width, [h, w] the grid of patches.
"""

import numpy as np

from vit_jax import variants
from vit_jax.analysis import attention
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

COMPONENTS = 28  # as in the paper's figure


def filter_components(
    model: model_folder.Model, count: int = COMPONENTS
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the filters that embed RGB patches.

    The D filters, vectors of P * P * 3 numbers each, are centred; their principal components are
    the directions of largest variance, each of which looks like a basis function of a patch. The
    sign, which is arbitrary, is chosen such that the number of largest magnitude is positive.

    Args:
      model: what `model_folder.load` gives.
      count: how many components; fewer are given if there are no more.

    Returns:
      The components, float32 [count, P, P, 3], unit vectors, the largest variance first; and the
      share of the filters' variance of each, float32 [count], in [0, 1].

    Raises:
      UserError: see `attention.check`; a hybrid, whose patches are cut from features of a ResNet.
    """
    if attention.check(model).resnet is not None:
        raise UserError(
            'the patches of a hybrid are cut from features of its ResNet, not from RGB pixels: '
            'their filters cannot be drawn as pictures'
        )
    kernel = np.asarray(model.params['embedding']['kernel'], np.float64)  # [P, P, 3, D]
    filters = kernel.reshape(-1, kernel.shape[-1]).T
    _, scales, rows = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    components = (rows * np.where(largest < 0, -1, 1))[:count].reshape(-1, *kernel.shape[:3])
    share = scales**2 / max(float((scales**2).sum()), np.finfo(np.float64).tiny)
    return components.astype(np.float32), share[:count].astype(np.float32)


def position_similarity(model: model_folder.Model) -> np.ndarray:
    """Cosine similarity between the position embeddings of all patches.

    Embeddings of the tokens in front of the patches are left out.

    Args:
      model: what `model_folder.load` gives.

    Returns:
      float32 [h, w, h, w] in [-1, 1]: [i, j, k, l] compares patch (i, j) with patch (k, l).

    Raises:
      UserError: see `attention.check`; a model without position embeddings.
    """
    module = attention.check(model)
    found = model.params['Transformer'].get('posembed_input')
    if found is None:
        raise UserError('this model has no position embeddings')
    embeddings = np.asarray(found['pos_embedding'], np.float64)[0]
    embeddings = embeddings[module.prefix_positions :]
    norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    embeddings = embeddings / np.maximum(norms, np.finfo(np.float64).tiny)
    grid = variants.token_grid(model.model_config, model.image_size)
    return (embeddings @ embeddings.T).reshape(grid * 2).astype(np.float32)
