"""What Python callers hand over as objects, made into members of a run: modules, data, lists of steps, generators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from tuneforge.engine.data.dataset import Data
from tuneforge.engine.model.model import Model
from tuneforge.engine.session import messages
from tuneforge.errors import FolderError, UsageError
from tuneforge.plugin import registry
from tuneforge.plugin.declaration import build_component, get_option_values
from tuneforge.plugin.hooks import RegisteredComponent, find_hook_methods
from tuneforge.plugin.hookspecs import hookimpl
from tuneforge.plugin.names import option_prefix
from tuneforge.plugin.results import TaskInfo
from tuneforge.plugin.serialization import to_plain_data
from tuneforge.plugin.steps import ComponentSpec, Diagnosis, HeadFit, Phase, StrategyStep, WeightAverage


class DataFromObject:
    """Data prepared by the caller."""

    def __init__(self, data: Data) -> None:
        self._data = data

    @hookimpl
    def data_prepare(self) -> Data:
        """Give it as it is."""
        return self._data


class ModelFromObject:
    """A module or a `Model` built by the caller."""

    def __init__(self, model: nn.Module | Model) -> None:
        self._model = model if isinstance(model, Model) else Model.from_module(model)

    @hookimpl
    def model_adapt(self) -> Model:
        """Give it as it is."""
        return self._model


class StrategyFromSteps:
    """A list of steps, or a function of the task that gives them."""

    def __init__(self, steps: Iterable[StrategyStep] | Callable[[TaskInfo], Iterable[StrategyStep]]) -> None:
        self._steps = steps
        self.name = getattr(steps, "__name__", "a list of steps")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """Give the steps, or ask the function for them."""
        return self._steps(task) if callable(self._steps) else self._steps


def resolve_member(
    group: str, spec: Any, *, where: str, repeatable: bool = False
) -> tuple[RegisteredComponent, ComponentSpec]:
    """The member that a name, a `ComponentSpec` or an object stands for, and how the configuration records it.

    Args:
        group: The hook point.
        spec: A reference, a `ComponentSpec`, a component instance, or one of the objects above.
        where: What messages name.
        repeatable: Several may be named, so that options are keyed by the component's name.

    Raises:
        UnknownNameError: Nothing of that name is installed.
        OptionError: An option is wrong.
        UsageError: The object is nothing that this hook can take.
    """
    if isinstance(spec, str):
        spec = ComponentSpec(spec)
    if isinstance(spec, ComponentSpec):
        entry = registry.find_component(group, spec.name, where=where)
        _check_rebuildable(entry.target)
        component = build_component(
            registry.load_component(entry), spec.options, where=f"--{option_prefix(spec.name)}" if repeatable else where
        )
        options = to_plain_data(get_option_values(component))
        member = RegisteredComponent(component, entry.name, registry.describe_component(entry))
        _check_implements(member, group, where)
        return member, ComponentSpec(entry.name, options)
    member, component_spec = _member_from_instance(group, _wrap_object(group, spec, where))
    _check_implements(member, group, where)
    return member, component_spec


def _check_implements(member: RegisteredComponent, group: str, where: str) -> None:
    """What is chosen for a hook must answer it; a callback may implement anything."""
    hooks = {hook for _, hook, _ in find_hook_methods(type(member.component), member.label)}
    if group != "callback" and group not in hooks:
        raise UsageError(
            f"{member.label} does not implement {group}",
            where=where,
            why=f"it implements {', '.join(sorted(hooks)) or 'no hook'}",
            fix="name it with --callback, or name another component here",
        )


def _check_rebuildable(target: str) -> None:
    """A run that was given objects cannot be built from its folder alone."""
    if target.startswith(f"{__name__}:"):
        raise FolderError(
            "the run was given this part as a Python object",
            where=target.rpartition(":")[2],
            why="a folder holds names and options, not objects",
            fix="give the object again: load(path, model=module), evaluate(path, data=...)",
        )


def as_list(value: Any) -> Sequence[Any]:
    """A list of what was asked: one thing may stand for a list of it, and None for none."""
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def check_no_duplicates(callbacks: list[RegisteredComponent]) -> None:
    """Refuse a callback that is named twice.

    Raises:
        UsageError: The message names it.
    """
    kinds = [type(member.component) for member in callbacks]
    for member in callbacks:
        if kinds.count(type(member.component)) > 1:
            raise UsageError(
                f"{member.label} is named twice",
                where="--callback",
                why="the two would undo or double one another's work",
                fix="name it once",
            )


def as_spec(spec: str | ComponentSpec) -> ComponentSpec:
    """A part by name, as a `ComponentSpec`."""
    return ComponentSpec(spec) if isinstance(spec, str) else spec


def mark_user_frozen(model: Model) -> Model:
    """The model, with what came frozen marked as never training."""
    user_frozen = [name for name, parameter in model.parameters().items() if not parameter.requires_grad]
    if not user_frozen:
        return model
    sentence = f"{len(user_frozen)} parameter tensor(s) came frozen and stay so: {messages.join_names(user_frozen, 4)}"
    return model.with_change(sentence, user_frozen=user_frozen)


def describe_member(member: RegisteredComponent, group: str) -> dict[str, Any]:
    """How `run.json` names a member: enough to find the very same code again."""
    entry = registry.find_entry_of_class(group, type(member.component))
    return {
        "hook": group,
        "name": member.name,
        "target": entry.target,
        "distribution": entry.distribution,
        "version": entry.version,
    }


def _member_from_instance(group: str, component: Any) -> tuple[RegisteredComponent, ComponentSpec]:
    entry = registry.find_entry_of_class(group, type(component))
    options = to_plain_data(get_option_values(component)) if hasattr(type(component), "__tuneforge_api__") else {}
    label = f"{registry.NOUN_BY_GROUP[group]} {getattr(component, 'name', type(component).__name__)}"
    return RegisteredComponent(component, entry.name, label), ComponentSpec(entry.name, options)


def _wrap_object(group: str, value: Any, where: str) -> Any:
    """An object as something with hook implementations."""
    if not isinstance(value, type) and any(_is_implementation(type(value), name) for name in dir(type(value))):
        return value
    if isinstance(value, Data):
        return DataFromObject(value)
    if isinstance(value, (nn.Module, Model)) and group == "model_adapt":
        return ModelFromObject(value)
    if isinstance(value, (Phase, HeadFit, Diagnosis, WeightAverage)):
        value = [value]
    if group == "finetune_strategy" and not isinstance(value, type) and (callable(value) or _are_steps(value)):
        return StrategyFromSteps(value)
    if group == "data_prepare":
        return _data_from_arrays(value)
    raise UsageError(
        f"{value!r:.80} is no {registry.NOUN_BY_GROUP[group]}",
        where=where,
        why="a name, use(...), or an instance with hook implementations is expected",
        fix="give an instance of the class" if isinstance(value, type) else "decorate its methods with @hookimpl",
    )


def _is_implementation(cls: type, name: str) -> bool:
    return hasattr(inspect.getattr_static(cls, name), "tuneforge_impl")


def _data_from_arrays(value: Any) -> Any:
    """Arrays, tensors, a torch `Dataset` or `DataLoader`, through the component that knows them."""
    return registry.load_component(registry.find_component("data_prepare", "arrays")).from_object(value)  # type: ignore[attr-defined]  # by contract


def _are_steps(value: Any) -> bool:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        return False
    return (
        all(isinstance(step, (Phase, HeadFit, Diagnosis, WeightAverage)) for step in value)
        if isinstance(value, (list, tuple))
        else True
    )
