"""The registry of components, based on entry points: listing imports no plugin, loading imports exactly one."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from typing import Any, NamedTuple

from tuneforge.errors import PluginLoadError, UnknownNameError, suggest_name
from tuneforge.plugin.distributions import read_entry_points
from tuneforge.plugin.names import to_kebab_case

GROUP_PREFIX = "tuneforge."
BUILTIN_DISTRIBUTION = "tuneforge"

# Not imported from hookspecs.py, because listing names must not import pluggy. A test keeps both equal.
GROUPS = (
    "data_prepare", "model_adapt", "train_step", "evaluate", "finetune_strategy", "callback",
    "lr_schedule", "optimizer", "augment", "export", "inputs", "targets",
)  # fmt: skip

FLAG_BY_GROUP = {
    "data_prepare": "--data", "model_adapt": "--model", "train_step": "--loss", "evaluate": "--metrics",
    "finetune_strategy": "--strategy", "callback": "--callback", "lr_schedule": "--schedule",
    "optimizer": "--optimizer", "augment": "--augment", "export": "--format",
}  # fmt: skip

NOUN_BY_GROUP = {
    "data_prepare": "data source", "model_adapt": "model or adapter", "train_step": "loss", "evaluate": "metric",
    "finetune_strategy": "strategy", "callback": "callback", "lr_schedule": "schedule",
    "optimizer": "optimizer", "augment": "augmentation", "export": "export format",
    "inputs": "kind of inputs", "targets": "kind of targets",
}  # fmt: skip


class ComponentEntry(NamedTuple):
    """An installed component as its entry point describes it; nothing of it has been imported.

    Args:
        group: The entry-point group without `tuneforge.`, such as `finetune_strategy`.
        name: The name that users type.
        target: `package.module:Class`.
        distribution: The distribution that ships it.
        version: The version of that distribution.
        aliases: Other names of the same target.
    """

    group: str
    name: str
    target: str
    distribution: str
    version: str
    aliases: tuple[str, ...] = ()


def list_components() -> tuple[ComponentEntry, ...]:
    """Return every installed component, sorted by group, then name. No plugin is imported.

    Entries of a broken distribution (no name, unreadable metadata) are skipped.
    """
    return _list_components_on_path(tuple(sys.path))


def list_components_of_group(group: str) -> tuple[ComponentEntry, ...]:
    """Return the installed components of a group.

    Raises:
        UnknownNameError: There is no such group.
    """
    if group not in GROUPS:
        raise UnknownNameError(f"there is no hook point '{group}'", fix=suggest_name(group, GROUPS))
    return tuple(entry for entry in list_components() if entry.group == group)


def find_component(group: str, reference: str, *, where: str = "") -> ComponentEntry:
    """Return the entry that a reference names.

    Args:
        group: The group of the component.
        reference: `package.module:Name`, `distribution/name`, or a bare name or alias.
        where: The source that error messages name; by default the flag of the group.

    Raises:
        UnknownNameError: No such component is installed, or two distributions install one of that name.
    """
    where = where or FLAG_BY_GROUP.get(group, group)
    if ":" in reference:
        return ComponentEntry(group, reference, reference, distribution="", version="")
    distribution, _, name = reference.rpartition("/")
    candidates = [entry for entry in list_components_of_group(group) if name == entry.name or name in entry.aliases]
    if distribution:
        candidates = [entry for entry in candidates if _is_same_distribution(entry.distribution, distribution)]
    if not candidates:
        raise _not_installed_error(group, reference, where)
    return _choose_candidate(candidates, reference, where)


def load_component(entry: ComponentEntry) -> type:
    """Import the class of an entry and check that it is a component of this API version.

    For a model, `module:Name` may also name a function that builds a module, or the class of one.

    Raises:
        PluginLoadError: The import failed, or the object is not a component of this API version.
    """
    module_name, _, attribute = entry.target.partition(":")
    if not entry.distribution and "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")  # local code is imported from the current directory
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise PluginLoadError(
            f"{describe_component(entry)} could not be loaded",
            where=entry.target,
            why=f"{type(error).__name__}: {error}",
            fix=_suggest_import_fix(entry),
        ) from error
    if entry.group == "model_adapt" and not entry.distribution:
        from tuneforge.plugin.module_factory import component_of_factory, is_module_factory

        if is_module_factory(found):
            return component_of_factory(found)
    return _require_component_class(found, entry)


def describe_component(entry: ComponentEntry) -> str:
    """Describe a component: `strategy 'x' of some-package 1.2`, or `strategy 'module:X'` for local code."""
    owner = f" of {entry.distribution} {entry.version}" if entry.distribution else ""
    return f"{NOUN_BY_GROUP[entry.group]} '{entry.name}'{owner}"


def find_entry_of_class(group: str, cls: type) -> ComponentEntry:
    """Return the entry under which a class is installed, or a local reference if it is not installed."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    known = (entry for entry in list_components() if entry.target == target)
    matches = sorted(known, key=lambda entry: entry.group != group)
    return matches[0] if matches else ComponentEntry(group, target, target, distribution="", version="")


def clear_cache() -> None:
    """Read the installed distributions again at the next call."""
    _list_components_on_path.cache_clear()


@functools.lru_cache(maxsize=4)
def _list_components_on_path(path: tuple[str, ...]) -> tuple[ComponentEntry, ...]:
    del path  # the key of the cache: another sys.path may hold other distributions
    by_target: dict[tuple[str, str, str, str], list[str]] = {}
    points = dict.fromkeys(read_entry_points(GROUP_PREFIX))
    known = [(each.group.removeprefix(GROUP_PREFIX), *each[1:]) for each in points]
    for group, name, target, distribution, version in known:
        if group in GROUPS:
            by_target.setdefault((group, target, distribution, version), []).append(name)
    entries = [
        ComponentEntry(group, *_choose_primary_name(names, target), distribution, version, _list_aliases(names, target))
        for (group, target, distribution, version), names in by_target.items()
    ]
    return tuple(sorted(entries, key=lambda entry: (GROUPS.index(entry.group), entry.name, entry.distribution)))


def _choose_primary_name(names: list[str], target: str) -> tuple[str, str]:
    """Return the name that is the class name in kebab case, else the first one; the other names are aliases."""
    own = to_kebab_case(target.rpartition(":")[2])
    return (own if own in names else sorted(names)[0]), target


def _list_aliases(names: list[str], target: str) -> tuple[str, ...]:
    primary, _ = _choose_primary_name(names, target)
    return tuple(sorted(name for name in names if name != primary))


def _choose_candidate(candidates: list[ComponentEntry], reference: str, where: str) -> ComponentEntry:
    builtin = [entry for entry in candidates if entry.distribution == BUILTIN_DISTRIBUTION]
    if builtin or len(candidates) == 1:
        return (builtin or candidates)[0]
    candidates = sorted(candidates, key=lambda entry: entry.distribution)
    owners = [f"{entry.distribution}/{reference}" for entry in candidates]
    raise UnknownNameError(
        f"'{reference}' is ambiguous",
        where=where,
        why=f"{' and '.join(f'{entry.distribution} {entry.version}' for entry in candidates)} both install it",
        fix=f"write {' or '.join(owners)}",
    )


def _not_installed_error(group: str, reference: str, where: str) -> UnknownNameError:
    names = [name for entry in list_components_of_group(group) for name in (entry.name, *entry.aliases)]
    no_path = ", and there is no file or folder of that name" if group == "data_prepare" else ""
    return UnknownNameError(
        f"{NOUN_BY_GROUP[group]} '{reference}' is not installed{no_path}",
        where=where,
        why=f"no installed distribution has an entry point of that name in group '{GROUP_PREFIX}{group}'",
        fix=f"{suggest_name(reference, names)}; see: tuneforge plugins list, or write module:Class for code of your "
        "own",
    )


def _is_same_distribution(one: str, other: str) -> bool:
    return one.lower().replace("_", "-").replace(".", "-") == other.lower().replace("_", "-").replace(".", "-")


def _suggest_import_fix(entry: ComponentEntry) -> str:
    if not entry.distribution:
        return "the reference is package.module:Name; the current folder is on the path"
    name = entry.distribution
    return f"reinstall or update it (pip install -U {name}), or remove it (pip uninstall {name})"


def _require_component_class(found: Any, entry: ComponentEntry) -> type:
    from tuneforge.plugin.declaration import API_VERSION

    api = getattr(found, "__tuneforge_api__", None) if inspect.isclass(found) else None
    if api is None or "__tuneforge_api__" not in vars(found):
        raise PluginLoadError(
            f"{describe_component(entry)} is not a component",
            where=entry.target,
            why=f"it is {found!r}, not a class decorated with @component(api={API_VERSION})",
            fix="decorate the class, or point the entry at the class",
        )
    if api != API_VERSION:
        raise PluginLoadError(
            f"{describe_component(entry)} was written for plugin API {api}",
            where=entry.target,
            why=f"this tuneforge speaks API {API_VERSION}",
            fix="update tuneforge"
            if isinstance(api, int) and api > API_VERSION
            else f"update {entry.distribution or 'the class'}",
        )
    checked: type = found
    return checked
