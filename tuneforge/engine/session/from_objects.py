"""Components that wrap Python objects: prepared data, a module, a list of strategy steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Data
from tuneforge.engine.model.model import Model
from tuneforge.engine.model.module_check import check_has_values
from tuneforge.engine.model.module_graph import GraphModule
from tuneforge.engine.model.output_layer import infer_head
from tuneforge.errors import UsageError
from tuneforge.plugin import registry
from tuneforge.plugin.hookspecs import hookimpl
from tuneforge.plugin.results import TaskInfo
from tuneforge.plugin.steps import Diagnosis, HeadFit, Phase, StrategyStep, WeightAverage


class DataFromObject:
    """A data source that returns the `Data` it was given."""

    def __init__(self, data: Data) -> None:
        self._data = data

    @hookimpl
    def data_prepare(self) -> Data:
        """Return the data."""
        return self._data


class ModelFromObject:
    """A model builder that returns the module or `Model` it was given."""

    def __init__(self, model: nn.Module | Model) -> None:
        self._model = model if isinstance(model, Model) else Model.from_module(model)
        self.weight_dtypes = {each.dtype for each in self._model.module.parameters()}

    @hookimpl
    def model_adapt(self, run: Run) -> Model:
        """Return the model, with the layer that computes its output as the head if nobody named it."""
        check_has_values(self._model.module)
        if not self._model.head_inferred:
            return self._model
        if not run.sharded:
            self._model.module.to(run.device.torch)
            run.match_inputs(self._model)
        return infer_head(self._model, run.example)


class StrategyFromSteps:
    """A strategy made from a list of steps, or from a function that returns the steps for a task."""

    def __init__(self, steps: Iterable[StrategyStep] | Callable[[TaskInfo], Iterable[StrategyStep]]) -> None:
        self._steps = steps
        self.name = getattr(steps, "__name__", "a list of steps")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """Return the steps, or what the function returns for `task`."""
        return self._steps(task) if callable(self._steps) else self._steps


def wrap_object(hook: str, value: Any, where: str) -> Any:
    """Return `value` as a component for `hook`; a component instance is returned unchanged.

    Args:
        hook: The hook that the component has to implement.
        value: A component instance; for `data_prepare` also a `Data`, arrays, a torch `Dataset` or `DataLoader`; for
            `model_adapt` also a module or a `Model`; for `finetune_strategy` also steps or a function of the task.
        where: The flag that error messages name.

    Raises:
        UsageError: `value` is none of these.
    """
    if not isinstance(value, type) and any(_is_implementation(type(value), name) for name in dir(type(value))):
        return value
    if isinstance(value, Data):
        return DataFromObject(value)
    if isinstance(value, (nn.Module, Model)) and hook == "model_adapt":
        if isinstance(getattr(value, "module", value), GraphModule):
            raise UsageError(
                "the graph of a model cannot be trained",
                where=where,
                why="a run directory that was given a module as a Python object keeps only how it predicts",
                fix="give the module itself: Engine(model=load(path, model=module).model)",
            )
        return ModelFromObject(value)
    if isinstance(value, (Phase, HeadFit, Diagnosis, WeightAverage)):
        value = [value]
    if hook == "finetune_strategy" and not isinstance(value, type) and (callable(value) or _are_steps(value)):
        return StrategyFromSteps(value)
    if hook == "data_prepare":
        return _data_from_arrays(value)
    raise UsageError(
        f"{value!r:.80} is not a {registry.NOUN_BY_GROUP[hook]}",
        where=where,
        why="a name, use(...), or an instance with hook implementations is expected",
        fix="give an instance of the class" if isinstance(value, type) else "decorate its methods with @hookimpl",
    )


def _is_implementation(cls: type, name: str) -> bool:
    return hasattr(inspect.getattr_static(cls, name), "tuneforge_impl")


def _data_from_arrays(value: Any) -> Any:
    """Return the component `arrays` for arrays, tensors, a torch `Dataset` or a `DataLoader`."""
    return registry.load_component(registry.find_component("data_prepare", "arrays")).from_object(value)  # type: ignore[attr-defined]  # by contract


def _are_steps(value: Any) -> bool:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        return False
    return (
        all(isinstance(step, (Phase, HeadFit, Diagnosis, WeightAverage)) for step in value)
        if isinstance(value, (list, tuple))
        else True
    )
