"""What Python callers hand over as objects, made into members of a run: modules, data, lists of steps, generators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from tuneforge.engine.data.dataset import Data
from tuneforge.engine.model.model import Model
from tuneforge.engine.session import messages as story
from tuneforge.errors import FolderError, UsageError
from tuneforge.plugin import registry
from tuneforge.plugin.component import build, values_of
from tuneforge.plugin.hooks import Member, check_hooks
from tuneforge.plugin.hookspecs import hookimpl
from tuneforge.plugin.names import prefix_of
from tuneforge.plugin.results import Brief
from tuneforge.plugin.serialization import plain
from tuneforge.plugin.steps import Blend, Fit, Phase, Probe, Step, Use


class GivenData:
    """Data prepared by the caller."""

    def __init__(self, data: Data) -> None:
        self._data = data

    @hookimpl
    def data_prepare(self) -> Data:
        """Give it as it is."""
        return self._data


class GivenModel:
    """A module or a `Model` built by the caller."""

    def __init__(self, model: nn.Module | Model) -> None:
        self._model = model if isinstance(model, Model) else Model.of(model)

    @hookimpl
    def model_adapt(self) -> Model:
        """Give it as it is."""
        return self._model


class GivenSteps:
    """A list of steps, or a function of the brief that gives them."""

    def __init__(self, steps: Iterable[Step] | Callable[[Brief], Iterable[Step]]) -> None:
        self._steps = steps
        self.name = getattr(steps, "__name__", "a list of steps")

    @hookimpl
    def finetune_strategy(self, brief: Brief) -> Iterable[Step]:
        """Give the steps, or ask the function for them."""
        return self._steps(brief) if callable(self._steps) else self._steps


def member(group: str, asked: Any, *, where: str, repeatable: bool = False) -> tuple[Member, Use]:
    """The member that a name, a `Use` or an object stands for, and how the configuration records it.

    Args:
        group: The hook point.
        asked: A reference, a `Use`, a component instance, or one of the objects above.
        where: What messages name.
        repeatable: Several may be named, so that options are keyed by the component's name.

    Raises:
        UnknownNameError: Nothing of that name is installed.
        OptionError: An option is wrong.
        UsageError: The object is nothing that this hook can take.
    """
    if isinstance(asked, str):
        asked = Use(asked)
    if isinstance(asked, Use):
        entry = registry.find(group, asked.name, where=where)
        _refuse_given(entry.target)
        component = build(
            registry.load(entry), asked.options, where=f"--{prefix_of(asked.name)}" if repeatable else where
        )
        options = plain(values_of(component))
        found = Member(component, entry.name, registry.describe(entry))
        _require_hook(found, group, where)
        return found, Use(entry.name, options)
    found, use = _instance(group, _wrapped(group, asked, where))
    _require_hook(found, group, where)
    return found, use


def _require_hook(found: Member, group: str, where: str) -> None:
    """What is chosen for a hook must answer it; an extension may implement anything."""
    hooks = {hook for _, hook, _ in check_hooks(type(found.component), found.label)}
    if group != "extension" and group not in hooks:
        raise UsageError(
            f"{found.label} does not implement {group}",
            where=where,
            why=f"it implements {', '.join(sorted(hooks)) or 'no hook'}",
            fix="name it with --with, or name another component here",
        )


def _refuse_given(target: str) -> None:
    """A run that was given objects cannot be built from its folder alone."""
    if target.startswith(f"{__name__}:"):
        raise FolderError(
            "the run was given this part as a Python object",
            where=target.rpartition(":")[2],
            why="a folder holds names and options, not objects",
            fix="give the object again: load(path, model=module), evaluate(path, data=...)",
        )


def listed(asked: Any) -> Sequence[Any]:
    """A list of what was asked: one thing may stand for a list of it, and None for none."""
    return asked if isinstance(asked, (list, tuple)) else [] if asked is None else [asked]


def refuse_twice(extensions: list[Member]) -> None:
    """Refuse an extension that is named twice.

    Raises:
        UsageError: The message names it.
    """
    kinds = [type(member.component) for member in extensions]
    for member in extensions:
        if kinds.count(type(member.component)) > 1:
            raise UsageError(
                f"{member.label} is named twice",
                where="--with",
                why="the two would undo or double one another's work",
                fix="name it once",
            )


def named(asked: str | Use) -> Use:
    """A part by name, as a `Use`."""
    return Use(asked) if isinstance(asked, str) else asked


def with_fixed(model: Model) -> Model:
    """The model, with what came frozen marked as never training."""
    fixed = [name for name, parameter in model.parameters().items() if not parameter.requires_grad]
    if not fixed:
        return model
    sentence = f"{len(fixed)} parameter tensor(s) came frozen and stay so: {story.shortened(fixed, 4)}"
    return model.changed(sentence, fixed=fixed)


def recorded(each: Member, group: str) -> dict[str, Any]:
    """How `run.json` names a member: enough to find the very same code again."""
    entry = registry.entry_for(group, type(each.component))
    return {
        "hook": group,
        "name": each.name,
        "target": entry.target,
        "distribution": entry.distribution,
        "version": entry.version,
    }


def _instance(group: str, component: Any) -> tuple[Member, Use]:
    entry = registry.entry_for(group, type(component))
    options = plain(values_of(component)) if hasattr(type(component), "__tuneforge_api__") else {}
    label = f"{registry.NOUNS[group]} {getattr(component, 'name', type(component).__name__)}"
    return Member(component, entry.name, label), Use(entry.name, options)


def _wrapped(group: str, asked: Any, where: str) -> Any:
    """An object as something with hook implementations."""
    if not isinstance(asked, type) and any(_is_implementation(type(asked), name) for name in dir(type(asked))):
        return asked
    if isinstance(asked, Data):
        return GivenData(asked)
    if isinstance(asked, (nn.Module, Model)) and group == "model_adapt":
        return GivenModel(asked)
    if isinstance(asked, (Phase, Fit, Probe, Blend)):
        asked = [asked]
    if group == "finetune_strategy" and not isinstance(asked, type) and (callable(asked) or _are_steps(asked)):
        return GivenSteps(asked)
    if group == "data_prepare":
        return _arrays(asked)
    raise UsageError(
        f"{asked!r:.80} is no {registry.NOUNS[group]}",
        where=where,
        why="a name, use(...), or an instance with hook implementations is expected",
        fix="give an instance of the class" if isinstance(asked, type) else "decorate its methods with @hookimpl",
    )


def _is_implementation(cls: type, name: str) -> bool:
    return hasattr(inspect.getattr_static(cls, name), "tuneforge_impl")


def _arrays(asked: Any) -> Any:
    """Arrays, tensors, a torch `Dataset` or `DataLoader`, through the component that knows them."""
    return registry.load(registry.find("data_prepare", "arrays")).of(asked)  # type: ignore[attr-defined]  # by contract


def _are_steps(asked: Any) -> bool:
    if isinstance(asked, (str, Mapping)) or not isinstance(asked, Iterable):
        return False
    return (
        all(isinstance(step, (Phase, Fit, Probe, Blend)) for step in asked)
        if isinstance(asked, (list, tuple))
        else True
    )
