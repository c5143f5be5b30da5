"""Component resolution: find and build what a name, a `ComponentSpec` or a Python object stands for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tuneforge.engine.data.dataset import Data
from tuneforge.engine.loop.phase_components import create_component
from tuneforge.engine.session.from_objects import wrap_object
from tuneforge.errors import FolderError, UsageError
from tuneforge.plugin import registry
from tuneforge.plugin.config import REPEATABLE_COMPONENT_KEYS, SINGLE_COMPONENT_KEYS, RunConfig
from tuneforge.plugin.declaration import build_component, get_option_values
from tuneforge.plugin.hooks import RegisteredComponent, find_hook_methods
from tuneforge.plugin.module_factory import is_module_factory
from tuneforge.plugin.names import OBJECT_PREFIX, option_prefix
from tuneforge.plugin.names import is_object as is_object
from tuneforge.plugin.serialization import to_plain_data
from tuneforge.plugin.steps import ComponentSpec

KEY_BY_HOOK = {hook: key for key, hook in SINGLE_COMPONENT_KEYS.items()} | {"evaluate": "metrics"}
"""The configuration key of each hook that a component is chosen for."""


def resolve_component(
    hook: str, spec: Any, *, where: str, repeatable: bool = False
) -> tuple[RegisteredComponent, ComponentSpec]:
    """Return the component that `spec` stands for, and the `ComponentSpec` that the configuration records for it.

    Args:
        hook: The hook that the component has to implement, or `"callback"` where any hook will do.
        spec: A name, a `ComponentSpec`, a component instance, or an object that `wrap_object` accepts; for a model also
            a function that builds a module.
        where: The flag that error messages name.
        repeatable: True where the flag may be repeated; messages then name options by the component's name.

    Raises:
        UnknownNameError: No component of that name is installed.
        OptionError: An option is wrong.
        FolderError: The name stands for a Python object that was not given again.
        UsageError: The object cannot serve as such a component.
    """
    if hook == "model_adapt" and is_module_factory(spec):
        spec = _factory_reference(spec) or spec()
    if isinstance(spec, str):
        spec = ComponentSpec(spec)
    if not isinstance(spec, ComponentSpec):
        component = wrap_object(hook, spec, where)
        name = component_name(hook, component)
        label = f"{registry.NOUN_BY_GROUP[hook]} {getattr(component, 'name', type(component).__name__)}"
        member = RegisteredComponent(component, name, label)
    else:
        _check_not_object(spec.name)
        entry = registry.find_component(hook, spec.name, where=where)
        where_options = f"--{option_prefix(spec.name)}" if repeatable else where
        if not where.startswith("--"):
            where_options = f'use("{spec.name}")'
        component = build_component(registry.load_component(entry), spec.options, where=where_options)
        member = RegisteredComponent(component, entry.name, registry.describe_component(entry))
    _check_implements(member, hook, where)
    is_declared = hasattr(type(component), "__tuneforge_api__")
    options = to_plain_data(get_option_values(component)) if is_declared else {}
    return member, ComponentSpec(member.name, options)


def _factory_reference(factory: Any) -> str:
    """Return `module:name` of a function or class that another process can import; else ""."""
    module, path = factory.__module__, factory.__qualname__
    if module == "__main__" or "<" in path:
        return ""
    return f"{module}:{path}" if getattr(sys.modules.get(module), path.partition(".")[0], None) is not None else ""


def component_name(hook: str, component: Any) -> str:
    """Return the name that `run.json` records: the installed name, `module:Class`, or a marker such as `object:data`.

    The marker stands for a component that names and options cannot rebuild: an instance of a class that does not
    declare its options, or of a class that its module does not have, such as one that is local to a function.
    """
    cls = type(component)
    if hasattr(cls, "__tuneforge_api__") and _is_reachable(cls):
        return registry.find_entry_of_class(hook, cls).name
    return OBJECT_PREFIX + KEY_BY_HOOK.get(hook, hook)


def _is_reachable(cls: type) -> bool:
    """Return True if the class is what its module has under its name; a class of a function or of `exec` is not."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def describe_member(member: RegisteredComponent, hook: str) -> dict[str, Any]:
    """Return what `run.json` records of a component: its name, the code behind it, and the hooks it implements."""
    hooks = sorted({name for _, name, _ in find_hook_methods(type(member.component), member.label)})
    if is_object(member.name):
        return {"hook": hook, "name": member.name, "implements": hooks}
    entry = registry.find_entry_of_class(hook, type(member.component))
    return {
        "hook": hook,
        "name": member.name,
        "target": entry.target,
        "distribution": entry.distribution,
        "version": entry.version,
        "implements": hooks,
    }


def as_list(value: Any) -> Sequence[Any]:
    """Return `value` as a list: a single item becomes a list of one, None an empty list."""
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def as_spec(spec: str | ComponentSpec) -> ComponentSpec:
    """Return the `ComponentSpec` of a bare name; a `ComponentSpec` is returned unchanged."""
    return ComponentSpec(spec) if isinstance(spec, str) else spec


def engine_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the keyword arguments of `Engine` that describe the run of `config`."""
    keys = [*SINGLE_COMPONENT_KEYS, *("callbacks" if key == "callback" else key for key in REPEATABLE_COMPONENT_KEYS)]
    return {key: getattr(config, key) for key in keys} | config.settings()


def check_non_hook_components(config: RunConfig) -> None:
    """Build the schedule, the optimizer and the augmentations once, so that errors show before anything is written.

    Raises:
        UnknownNameError: No component of that name is installed.
        PluginLoadError: A component cannot be loaded.
        OptionError: An option is wrong.
    """
    if config.schedule is not None:
        create_component("lr_schedule", config.schedule)
    if config.optimizer is not None:
        create_component("optimizer", config.optimizer)
    for spec in config.augment:
        create_component("augment", spec)
    if any(spec.name == "none" for spec in config.augment) and len(config.augment) > 1:
        raise UsageError(
            "--augment none is given together with other augmentations",
            why="it trains without augmentation",
            fix="leave out either",
        )


def resolve_augmentations(config: RunConfig, data: Data) -> tuple[ComponentSpec, ...]:
    """Return the augmentations of the user, else those that suit the data; `none` stands for no augmentation."""
    return tuple(spec for spec in config.augment or map(as_spec, data.augment) if spec.name != "none")


def check_no_duplicates(callbacks: Sequence[RegisteredComponent]) -> None:
    """Raise `UsageError` if two callbacks are of the same class."""
    kinds = [type(member.component) for member in callbacks]
    for member in callbacks:
        if kinds.count(type(member.component)) > 1:
            raise UsageError(
                f"{member.label} is named twice",
                where="--callback",
                why="two instances would do the same work twice or undo each other's work",
                fix="name it once",
            )


def _check_implements(member: RegisteredComponent, hook: str, where: str) -> None:
    """Raise `UsageError` if a component does not implement the hook it was chosen for; a callback may implement any."""
    implemented = {name for _, name, _ in find_hook_methods(type(member.component), member.label)}
    if hook != "callback" and hook not in implemented:
        raise UsageError(
            f"{member.label} does not implement {hook}",
            where=where,
            why=f"it implements {', '.join(sorted(implemented)) or 'no hook'}",
            fix="name it with --callback, or name another component here",
        )


def _check_not_object(name: str) -> None:
    if is_object(name):
        raise FolderError(
            "the run was given this component as a Python object",
            where=name,
            why="a run directory holds names and options, not objects",
            fix="give the object again: load(path, model=module), evaluate(path, data=...), Engine.resume(path, ...)",
        )
