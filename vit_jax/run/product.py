"""The product of a run: its model folders."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from vit_jax import models, sharding
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.inference import model_folder, two_tower
from vit_jax.inference.task import Task
from vit_jax.models.lora import Lora, merge
from vit_jax.run import telemetry
from vit_jax.run.pairs import Pairs

MODEL_FOLDER, ADAPTER_FOLDER = 'model', 'adapter'
BEST_MODEL_FOLDER = 'model_best'


@dataclasses.dataclass(frozen=True)
class Product:
    """What model folders of a run have in common.

    Attributes:
      workdir: of the run.
      mesh: that the parameters are spread over.
      architecture: what describes the model, see `model_folder.save`.
      class_names: see `model_folder.save`.
      preprocess: see `model_folder.save`.
      source: where the model comes from, but for the steps.
      task: what its outputs are.
      lora: the model's adapters, which are merged into the weights; None for none.
      pairs: of an image-text model: it is then a folder of `two_tower.save`.
    """

    workdir: pathlib.Path
    mesh: Mesh
    architecture: Mapping[str, Any]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    source: Mapping[str, Any]
    task: Task
    lora: Lora | None = None
    pairs: Pairs | None = None

    def write(self, params: Any, name: str, step: int) -> pathlib.Path:
        """Writes weights, architecture, preprocessing and class names; all processes call it.

        Args:
          params: on the devices.
          name: of the folder in the workdir.
          step: that the parameters are of.

        Returns:
          The folder.
        """
        merged = self.gathered(functools.partial(merge, lora=self.lora), params)
        folder = self.workdir / name
        if jax.process_index() != 0:
            return folder
        params = jax.device_get(merged)
        metrics = telemetry.read_evaluation(self.workdir, step)
        source = {**self.source, 'steps': step, 'metrics': metrics}
        if self.pairs is not None:
            model = models.LitModel(**self.architecture)
            vocabulary = self.pairs.vocabulary
            towers = two_tower.TwoTowers(model, params, vocabulary, source, self.preprocess)
            two_tower.save(folder, towers, exists='replace')
            return folder
        model_folder.save(
            folder,
            params,
            model_config=self.architecture,
            class_names=self.class_names,
            preprocess=self.preprocess,
            source=source,
            task=self.task,
        )
        return folder

    def gathered(self, function: Callable[[Any], Any], params: Any) -> Any:
        """What a function makes of the parameters, whole on every device; all processes call it."""
        return jax.jit(function, out_shardings=sharding.replicated(self.mesh))(params)

    def model(self, params: Any) -> model_folder.Model:
        """The model with these parameters, plain ones on the host."""
        module = models.from_config(self.architecture, num_classes=len(self.class_names))
        told = self.architecture, self.class_names, self.preprocess, self.source, self.task
        return model_folder.Model(module, params, *told)


def architecture_of(model: nn.Module, names: int) -> dict[str, Any]:
    """What `model.json` says of a module, from which it can be made again.

    Args:
      model: any module.
      names: how many names of classes there are.

    Raises:
      UserError: a model folder cannot hold it; says why.
    """
    if type(model) not in (models.VisionTransformer, models.MlpMixer):
        raise UserError(
            f'the model is a {type(model).__name__}, and a model folder describes a '
            'VisionTransformer or an MlpMixer of vit_jax.models'
        )
    if model.num_classes != names:
        raise UserError(f'the model has {model.num_classes} outputs, and there are {names} names')
    told = {}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        described = field.init and field.name not in ('parent', 'name', 'dtype', 'lora')
        if described and not (value is field.default or value == field.default):
            told[field.name] = dict(value) if isinstance(value, Mapping) else value
    for name, value in told.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(f'the model has {name}={value!r}, which has no JSON form') from error
    return told
