"""Names to component classes, over entry points: listing imports no plugin, loading imports exactly one."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from tuneforge.errors import PluginLoadError, UnknownNameError, close_match
from tuneforge.plugin.names import kebab

PREFIX = "tuneforge."
BUILTIN = "tuneforge"

# Spelt out here, not imported: listing names must not import pluggy. A test keeps them equal to hookspecs.py.
GROUPS = (
    "data_prepare", "model_adapt", "train_step", "evaluate", "finetune_strategy", "extension",
    "lr_schedule", "optimizer", "augment", "export", "inputs", "targets",
)  # fmt: skip

FLAGS = {
    "data_prepare": "--data", "model_adapt": "--model", "train_step": "--step", "evaluate": "--evaluate",
    "finetune_strategy": "--strategy", "extension": "--with", "lr_schedule": "--schedule",
    "optimizer": "--optimizer", "augment": "--augment", "export": "--to",
}  # fmt: skip

NOUNS = {
    "data_prepare": "data source", "model_adapt": "model or adapter", "train_step": "step", "evaluate": "metric",
    "finetune_strategy": "strategy", "extension": "extension", "lr_schedule": "schedule",
    "optimizer": "optimizer", "augment": "augmentation", "export": "export format",
    "inputs": "kind of inputs", "targets": "kind of targets",
}  # fmt: skip


class Entry(NamedTuple):
    """One component that is installed, as its entry point describes it; nothing of it has been imported.

    Args:
        group: The hook point or kind of part, such as `finetune_strategy`.
        name: What users type.
        target: `package.module:Class`.
        distribution: The distribution that ships it.
        version: Of that distribution.
        aliases: Other names of the same target.
    """

    group: str
    name: str
    target: str
    distribution: str
    version: str
    aliases: tuple[str, ...] = ()


def installed() -> tuple[Entry, ...]:
    """Every component installed in this environment, sorted by group, then name. Imports no plugin.

    Entries of a broken distribution (no name, unreadable metadata) are passed over.
    """
    return _installed(tuple(sys.path))


def entries_of(group: str) -> tuple[Entry, ...]:
    """The installed components of one group.

    Raises:
        UnknownNameError: There is no such group.
    """
    if group not in GROUPS:
        raise UnknownNameError(f"there is no hook point '{group}'", fix=close_match(group, GROUPS))
    return tuple(entry for entry in installed() if entry.group == group)


def find(group: str, reference: str, *, where: str = "") -> Entry:
    """The entry that a reference names.

    Args:
        group: Where to look.
        reference: `package.module:Name`, `distribution/name`, or a bare name or alias.
        where: What the messages name; the group's flag by default.

    Raises:
        UnknownNameError: Nothing of that name is installed; or two third parties claim it.
    """
    where = where or FLAGS.get(group, group)
    if ":" in reference:
        return Entry(group, reference, reference, distribution="", version="")
    distribution, _, name = reference.rpartition("/")
    candidates = [entry for entry in entries_of(group) if name == entry.name or name in entry.aliases]
    if distribution:
        candidates = [entry for entry in candidates if _same_distribution(entry.distribution, distribution)]
    if not candidates:
        raise _unknown(group, reference, where)
    return _only(candidates, reference, where)


def load(entry: Entry) -> type:
    """Import the class behind an entry and check that it is a component of this API.

    Raises:
        PluginLoadError: The import failed in any way, or what was found is no component of this API version.
    """
    module_name, _, attribute = entry.target.partition(":")
    if not entry.distribution and "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")  # local code: the current folder is on the path for it
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise PluginLoadError(
            f"{describe(entry)} could not be loaded",
            where=entry.target,
            why=f"{type(error).__name__}: {error}",
            fix=_import_advice(entry),
        ) from error
    return _checked(found, entry)


def describe(entry: Entry) -> str:
    """`strategy 'x' of some-package 1.2`, or `strategy 'module:X'` for local code."""
    owner = f" of {entry.distribution} {entry.version}" if entry.distribution else ""
    return f"{NOUNS[entry.group]} '{entry.name}'{owner}"


def entry_for(group: str, cls: type) -> Entry:
    """The entry under which a class is installed, or a local reference where it is not."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    known = (entry for entry in installed() if entry.target == target)
    matches = sorted(known, key=lambda entry: entry.group != group)
    return matches[0] if matches else Entry(group, target, target, distribution="", version="")


def forget() -> None:
    """Look at the environment again at the next question (something was installed meanwhile)."""
    _installed.cache_clear()


@functools.lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> tuple[Entry, ...]:
    del path  # the key of the cache: another sys.path may hold other distributions
    by_target: dict[tuple[str, str, str, str], list[str]] = {}
    for group, name, target, distribution, version in dict.fromkeys(_raw_entries()):
        by_target.setdefault((group, target, distribution, version), []).append(name)
    entries = [
        Entry(group, *_primary(names, target), distribution, version, _aliases(names, target))
        for (group, target, distribution, version), names in by_target.items()
    ]
    return tuple(sorted(entries, key=lambda entry: (GROUPS.index(entry.group), entry.name, entry.distribution)))


def _raw_entries() -> Iterator[tuple[str, str, str, str, str]]:
    seen = set()
    for distribution in importlib.metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt")
            if not text or PREFIX not in text:
                continue
            name, version = distribution.metadata["Name"], distribution.version
            if not name or name in seen:  # an earlier folder on the path hides a later one, as for imports
                continue
            seen.add(name)
            points = [point for point in distribution.entry_points if point.group.startswith(PREFIX)]
        except Exception:  # noqa: BLE001, S112 - one unreadable distribution must not hide the others
            continue
        for point in points:
            group = point.group.removeprefix(PREFIX)
            if group in GROUPS:
                yield group, point.name, point.value, name, version


def _primary(names: list[str], target: str) -> tuple[str, str]:
    """The name that is the class name's kebab form, else the first; the other names are its aliases."""
    own = kebab(target.rpartition(":")[2])
    return (own if own in names else sorted(names)[0]), target


def _aliases(names: list[str], target: str) -> tuple[str, ...]:
    primary, _ = _primary(names, target)
    return tuple(sorted(name for name in names if name != primary))


def _only(candidates: list[Entry], reference: str, where: str) -> Entry:
    builtin = [entry for entry in candidates if entry.distribution == BUILTIN]
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


def _unknown(group: str, reference: str, where: str) -> UnknownNameError:
    names = [name for entry in entries_of(group) for name in (entry.name, *entry.aliases)]
    return UnknownNameError(
        f"{NOUNS[group]} '{reference}' is not installed",
        where=where,
        why=f"no installed distribution has an entry point of that name in group '{PREFIX}{group}'",
        fix=f"{close_match(reference, names)}; see: tuneforge plugins list, or write module:Class for code of your own",
    )


def _same_distribution(one: str, other: str) -> bool:
    return one.lower().replace("_", "-").replace(".", "-") == other.lower().replace("_", "-").replace(".", "-")


def _import_advice(entry: Entry) -> str:
    if not entry.distribution:
        return "the reference is package.module:Name; the current folder is on the path"
    name = entry.distribution
    return f"reinstall or update it (pip install -U {name}), or remove it (pip uninstall {name})"


def _checked(found: Any, entry: Entry) -> type:
    from tuneforge.plugin.component import API

    api = getattr(found, "__tuneforge_api__", None) if inspect.isclass(found) else None
    if api is None or "__tuneforge_api__" not in vars(found):
        raise PluginLoadError(
            f"{describe(entry)} is not a component",
            where=entry.target,
            why=f"it is {found!r}, not a class decorated with @component(api={API})",
            fix="decorate the class, or point the entry at the class",
        )
    if api != API:
        raise PluginLoadError(
            f"{describe(entry)} was written for plugin API {api}",
            where=entry.target,
            why=f"this tuneforge speaks API {API}",
            fix="update tuneforge"
            if isinstance(api, int) and api > API
            else f"update {entry.distribution or 'the class'}",
        )
    checked: type = found
    return checked
