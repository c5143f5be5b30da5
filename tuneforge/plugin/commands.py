"""Commands that other distributions add to the command line, found without importing them.

A distribution adds a verb with an entry point of the group `tuneforge.command`; its value is a `click.Command`:

    [project.entry-points."tuneforge.command"]
    serve = "tuneforge_serve.cli.serve:serve"

The section and the line of help are data, because `tuneforge --help` imports no plugin. They are read from
`tuneforge_commands.toml` in the folder of the distribution's top-level package (beside the module, where the
distribution is a single module):

    [serve]
    section = "deploy"
    help = "Serve a run, a bundle or the champions of a registry over HTTP."

A verb is the one exception to "installed never means active": it is listed as soon as its distribution is installed.
Its module is imported when the verb is used. Built-in verbs keep their names.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tuneforge.errors import MissingDependencyError, PluginLoadError, UnknownNameError, suggest_name
from tuneforge.plugin.distributions import read_entry_points

GROUP = "tuneforge.command"
HELP_FILE = "tuneforge_commands.toml"
OTHER_SECTION = "other"

OFFICIAL_VERBS = {
    "data": "tuneforge-datacheck",
    "serve": "tuneforge-serve",
    "promote": "tuneforge-serve",
    "models": "tuneforge-serve",
    "test-endpoint": "tuneforge-serve",
    "retrain": "tuneforge-serve",
}
"""Verbs of tuneforge's own plugins, and the distribution that brings each: an error says what to install."""


class CommandEntry(NamedTuple):
    """A verb that an installed distribution ships; nothing of it has been imported.

    Args:
        name: What users type.
        target: `package.module:command`.
        distribution: The distribution that ships it.
        version: Of that distribution.
        section: Stage of the work under which `tuneforge --help` lists it.
        help: The line that `tuneforge --help` shows.
    """

    name: str
    target: str
    distribution: str
    version: str
    section: str
    help: str


def installed_commands() -> tuple[CommandEntry, ...]:
    """Every verb of an installed distribution, sorted by name. Imports no plugin; broken distributions are skipped."""
    return _installed_commands(tuple(sys.path))


def load_command(name: str, builtin: Iterable[str] = ()) -> Any:
    """Import the `click.Command` behind a verb.

    Args:
        name: What the user typed.
        builtin: Verbs of the core, for the nearest name in the error.

    Raises:
        MissingDependencyError: The verb belongs to one of tuneforge's own plugins, which is not installed.
        UnknownNameError: No distribution ships the verb, or two do.
        PluginLoadError: The verb's module cannot be imported, or its value is not a `click.Command`.
    """
    entries = [entry for entry in installed_commands() if entry.name == name]
    if not entries:
        raise _unknown_command(name, builtin)
    if len({entry.distribution for entry in entries}) > 1:
        owners = " and ".join(entry.distribution for entry in entries)
        raise UnknownNameError(
            f"the command '{name}' is ambiguous", why=f"{owners} both ship it", fix="uninstall one of them"
        )
    return _import_command(entries[0])


def _unknown_command(name: str, builtin: Iterable[str]) -> Exception:
    if name in OFFICIAL_VERBS:
        distribution = OFFICIAL_VERBS[name]
        return MissingDependencyError(
            f"the command '{name}' is not installed",
            why=f"it is part of {distribution}",
            fix=f"pip install {distribution}",
        )
    known = [*builtin, *(entry.name for entry in installed_commands()), *OFFICIAL_VERBS]
    return UnknownNameError(f"there is no command '{name}'", fix=suggest_name(name, known))


def _import_command(entry: CommandEntry) -> Any:
    import click

    module_name, _, attribute = entry.target.partition(":")
    try:
        command: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            command = getattr(command, part)
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; the message names it
        raise PluginLoadError(
            f"the command '{entry.name}' of {entry.distribution} {entry.version} could not be loaded",
            where=entry.target,
            why=f"{type(error).__name__}: {error}",
            fix=f"upgrade or reinstall it: pip install -U {entry.distribution}",
        ) from error
    if not isinstance(command, click.Command):
        raise PluginLoadError(
            f"the command '{entry.name}' of {entry.distribution} {entry.version} is not a click.Command",
            where=entry.target,
            why=f"it is {type(command).__name__}",
            fix="decorate the function with @click.command()",
        )
    return command


@functools.lru_cache(maxsize=4)
def _installed_commands(path: tuple[str, ...]) -> tuple[CommandEntry, ...]:
    del path  # the key of the cache: another sys.path may hold other distributions
    found: dict[tuple[str, str], CommandEntry] = {}
    help_of = functools.cache(_help_of)  # for this listing alone: a package may be replaced later
    for _, name, target, distribution, version in (each for each in read_entry_points(GROUP) if each.group == GROUP):
        table = help_of(target.partition(":")[0].partition(".")[0]).get(name, {})
        default = f"(of {distribution} {version})"
        section, help_line = _text(table, "section", OTHER_SECTION), _text(table, "help", default)
        command = CommandEntry(name, target, distribution, version, section, help_line)
        found.setdefault((name, distribution), command)
    return tuple(sorted(found.values()))


def _help_of(package: str) -> Mapping[str, Any]:
    """The tables of a package's help file; empty where there is none, or none that can be read."""
    import importlib.util
    import tomllib
    from pathlib import Path

    try:
        spec = importlib.util.find_spec(package)
        if spec is None:
            return {}
        folders = spec.submodule_search_locations or [str(Path(spec.origin or "").parent)]
        return tomllib.loads((Path(next(iter(folders))) / HELP_FILE).read_text(encoding="utf-8"))
    except (ImportError, OSError, ValueError, StopIteration):
        return {}


def _text(table: Any, key: str, default: str) -> str:
    value = table.get(key, default) if isinstance(table, Mapping) else default
    return value if isinstance(value, str) and value.strip() else default
