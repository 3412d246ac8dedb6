"""Averages of the weights of models of one architecture: soups, and the way back to the start.

Weights that were fine-tuned from one start lie so near to each other that their mean is a model,
too, often a better one than each, and no slower:

- Model soups (https://arxiv.org/abs/2203.05482): the mean of several runs; the greedy soup takes up
  a run only if the mean with it is no worse on validation images.
- WiSE-FT (https://arxiv.org/abs/2109.01903): (1 - share) * start + share * fine-tuned, which keeps
  of the start what other data needs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from vit_jax.checkpoint import adapt, infer, npz
from vit_jax.data.dataset import Selection
from vit_jax.data.examples import CLASS_INDEX
from vit_jax.errors import UserError
from vit_jax.inference.model_folder import Model
from vit_jax.inference.task import NUMBERS, ONE_CLASS, SEVERAL

SHARES = tuple(number / 10 for number in range(11))  # that are tried

# Of a model, on validation images; more is better.
Score = Callable[[Model], float]


@dataclasses.dataclass(frozen=True)
class Soup:
    """What a greedy soup became.

    Attributes:
      model: the mean of what was taken up; the rest as the best one's.
      scores: of each model alone, in the order given.
      taken: indices of those that were taken up, the best one first.
      score: of the soup.
    """

    model: Model
    scores: tuple[float, ...]
    taken: tuple[int, ...]
    score: float


def check(models: Sequence[Model], names: Sequence[str]) -> None:
    """Checks that the models can be averaged.

    Args:
      models: at least one.
      names: what messages call them.

    Raises:
      UserError: architecture, classes, pixels or task of one are others than of the first.
    """
    first = models[0]
    for model, name in zip(models[1:], names[1:], strict=True):
        shapes, others = (
            {n: tuple(leaf.shape) for n, leaf in npz.flatten(each.params).items()}
            for each in (first, model)
        )
        both = (
            ('architecture', _plain(first), _plain(model)),
            ('parameters', shapes, others),
            ('classes', list(first.class_names), list(model.class_names)),
            ('pixels', first.preprocess.to_dict(), model.preprocess.to_dict()),
            ('task', first.task.to_dict(), model.task.to_dict()),
        )
        for what, a, b in both:
            if a != b:
                raise UserError(
                    f'{names[0]} and {name} differ in their {what} ({_difference(a, b)}): only '
                    'models that were fine-tuned alike, from the same start, can be averaged'
                )


def _plain(model: Model) -> dict[str, Any]:
    return {name: value for name, value in model.model_config.items() if name != 'model_name'}


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, list) or not isinstance(a, Mapping):
        return f'{a!s:.60} and {b!s:.60}'
    name = next(n for n in [*a, *b] if a.get(n) != b.get(n))
    return f'{name}: {a.get(name)!s:.60} and {b.get(name)!s:.60}'


def average(trees: Sequence[Any], shares: Sequence[float] | None = None) -> Any:
    """The mean of parameters, computed in float64.

    Args:
      trees: nested dicts of float32 arrays, all of the same names and shapes.
      shares: what each counts, of 1 in all; None for all alike.
    """
    each = [npz.flatten(tree) for tree in trees]
    shares = [1 / len(each)] * len(each) if shares is None else shares
    mean = {}
    for name, leaf in each[0].items():
        total = sum(
            share * np.asarray(flat[name], np.float64)
            for share, flat in zip(shares, each, strict=True)
        )
        mean[name] = np.asarray(total, leaf.dtype)
    return traverse_util.unflatten_dict(mean, sep='/')


def greedy(
    models: Sequence[Model],
    score: Score,
    *,
    names: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Soup:
    """The greedy soup: from the best model on, each that makes the mean no worse is taken up.

    Args:
      models: at least one.
      score: on validation images; more is better.
      names: what messages call the models; default 'model 1', 'model 2', ...
      say: told about each step.

    Raises:
      UserError: see `check`.
    """
    names = names or [f'model {index + 1}' for index in range(len(models))]
    check(models, names)
    scores = []
    for model, name in zip(models, names, strict=True):
        scores.append(score(model))
        say(f'{name}: {scores[-1]:.4f}')
    best, *others = sorted(range(len(models)), key=lambda index: -scores[index])
    taken, now, whole = [best], scores[best], models[best]
    for index in others:
        tried = dataclasses.replace(
            whole, params=average([models[i].params for i in (*taken, index)])
        )
        found = score(tried)
        better = found >= now
        say(f'with {names[index]}: {found:.4f}, {"taken up" if better else "left out"}')
        if better:
            taken, now, whole = [*taken, index], found, tried
    return Soup(whole, tuple(scores), tuple(taken), now)


def interpolate(start: Model, tuned: Model, share: float) -> Model:
    """WiSE-FT: (1 - share) of the start and `share` of what was fine-tuned from it.

    Args:
      start: see `as_start`.
      tuned: fine-tuned from it.
      share: 0 for the start, 1 for the fine-tuned model.

    Raises:
      UserError: the share is not from 0 to 1, or see `check`.
    """
    if not 0 <= share <= 1:
        raise UserError(f'the share of the fine-tuned model is from 0 to 1, not {share:g}')
    check([tuned, start], ['the fine-tuned model', 'the start'])
    params = average([start.params, tuned.params], [1 - share, share])
    return dataclasses.replace(tuned, params=params)


def best_share(
    start: Model,
    tuned: Model,
    score: Score,
    shares: Sequence[float] = SHARES,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Model, float, dict[float, float]]:
    """`interpolate` with the share of the best score; of several equal ones, with the largest.

    Returns:
      The model, the share, and the score of each share.
    """
    found = {}
    for share in shares:
        found[share] = score(interpolate(start, tuned, share))
        say(f'share {share:g}: {found[share]:.4f}')
    best = max(found, key=lambda share: (found[share], share))
    return interpolate(start, tuned, best), best, found


def as_start(start: Model, tuned: Model, name: str) -> tuple[Model, bool]:
    """The start in the form of what was fine-tuned from it.

    Position embeddings are resized as they were for training. Where the start has no head for the
    same classes, its head is that of the fine-tuned model, which then is not interpolated.

    Args:
      start: weights of any kind, see `model_folder.load`.
      tuned: the model.
      name: what messages call the start.

    Returns:
      The start, and whether it has a head of its own.

    Raises:
      UserError: it is no start of such a model.
    """
    own = 'head' in start.params and start.class_names == tuned.class_names
    params = fitted(start, tuned, tuned.params, name, keep_head=own)
    return dataclasses.replace(tuned, params=params), own


def fitted(
    start: Model, like: Model, shapes: Mapping[str, Any], name: str, *, keep_head: bool = False
) -> Mapping[str, Any]:
    """Parameters of a model as fine-tuning another one starts from them, see `adapt.adapt`.

    Args:
      start: whose parameters they are.
      like: the other one.
      shapes: of its parameters; where the start has none, these are in the result.
      name: what messages call the start.
      keep_head: whether the head is the start's.
    """
    grid = source_grid = None
    if 'Transformer' in shapes:
        grid = infer.token_grid(shapes, like.preprocess.crop)
        source_grid = infer.token_grid(start.params, start.preprocess.crop)
    return adapt.adapt(
        start.params,
        shapes,
        classifier=like.model_config.get('classifier', ''),
        keep_head=keep_head,
        source=name,
        grid=grid,
        source_grid=source_grid,
    )[0]


def scorer(source: Selection, model: Model, batch: int) -> Score:
    """A score of models like this one on labelled images, compiled once.

    Accuracy, in [0, 1]; mean average precision where an image may have several classes; R2 of
    numbers. For arguments and errors see `assessor`.
    """
    names = {ONE_CLASS.kind: 'accuracy', SEVERAL: 'mean_average_precision', NUMBERS: 'r2'}
    assess = assessor(source, model, batch)
    return lambda each: assess(each)[names[model.task.kind]]


def assessor(source: Selection, model: Model, batch: int) -> Callable[[Model], dict[str, float]]:
    """What `evaluate.task_totals` tells of models like this one, compiled once.

    Args:
      source: labelled images.
      model: one of those that can be averaged.
      batch: images at once.

    Raises:
      UserError: the labels are not what the model tells; from the result: not one image can be
        read.
    """
    import jax

    from vit_jax import evaluate, sharding, steps

    _check_labels(source, model)
    mesh = sharding.create_mesh(devices=jax.local_devices()[:1])
    places = sharding.state_sharding(model.params, mesh)
    step = steps.make_eval_step(model.model, mesh, places, None, model.task)

    def assess(model: Model) -> dict[str, float]:
        found = evaluate.collect(
            step,
            sharding.put_tree(model.params, places),
            source,
            model.preprocess,
            mesh,
            batch=batch,
            on_bad=lambda error: None,
        )
        assert found is not None
        return evaluate.task_totals(found, model.task, len(model.class_names))

    return assess


def _check_labels(source: Selection, model: Model) -> None:
    if tuple(source.class_names) != tuple(model.class_names):
        raise UserError(
            f'the classes of {source} ({", ".join(source.class_names)!s:.80}) are not those of the '
            f'model ({", ".join(model.class_names)!s:.80}), in this order'
        )
    if (source.label_dtype == CLASS_INDEX) != (model.task.kind == ONE_CLASS.kind):
        raise UserError(f'{source} has labels of another kind than the model tells')
