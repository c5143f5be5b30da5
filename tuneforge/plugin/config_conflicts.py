"""Where the configuration that a user gives contradicts that of a run, option by option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from tuneforge.plugin import registry
from tuneforge.plugin.command_options import format_value
from tuneforge.plugin.config import (
    GROUP_BY_KEY,
    REPEATABLE_COMPONENT_KEYS,
    SINGLE_COMPONENT_KEYS,
    Settings,
    default_name,
    list_component_entries,
)
from tuneforge.plugin.declaration import Option, find_option, get_options, parse_option
from tuneforge.plugin.names import is_object, option_prefix


@attrs.frozen
class ConfigConflict:
    """An option whose value differs from that of the run."""

    key: str
    run_value: str
    new_value: str

    def __str__(self) -> str:
        """Return the difference as one line."""
        return f"{self.key}: the run has {self.run_value}, given {self.new_value}"


def find_conflicts(
    run_config: Mapping[str, Any], new_config: Mapping[str, Any], run_dir: Path
) -> Iterator[ConfigConflict]:
    """Yield the options of flags and file that differ from those of a run; options they do not name cannot differ.

    Args:
        run_config: The configuration in the run directory, as a table.
        new_config: The configuration of flags and file.
        run_dir: The run directory, which `out` must name.

    Raises:
        UnknownNameError: A name or an option does not exist.
        OptionError: A value has the wrong type or range.
    """
    run_config = {key.replace("_", "-"): value for key, value in run_config.items()} | {"out": str(run_dir)}
    for key, value in ((key.replace("_", "-"), value) for key, value in new_config.items()):
        if key not in GROUP_BY_KEY:
            option = find_option(get_options(Settings), key, where=f"--{key}", owner="tuneforge")
            yield from _compare_values(f"--{key}", option, run_config.get(key, option.default), value)
        elif key in SINGLE_COMPONENT_KEYS:
            (had,), (wanted,) = (list_component_entries(each) or [{}] for each in (run_config.get(key), value))
            yield from _compare_component(key, had, {"name": default_name(key), **wanted})
        else:
            for wanted in list_component_entries(value):
                yield from _compare_repeatable(key, list_component_entries(run_config.get(key)), wanted)


def find_changes(run_config: Mapping[str, Any], new_config: Mapping[str, Any]) -> Iterator[ConfigConflict]:
    """Yield every difference in the keys of `new_config`, which describes each of them completely.

    An option that one side does not name has its default; a component that one side lacks is a difference.

    Args:
        run_config: The configuration in the run directory, as `config_to_dict` returns it.
        new_config: Some keys of such a table; None for a key that names nothing.
    """
    for key, value in new_config.items():
        if key not in GROUP_BY_KEY:
            option = find_option(get_options(Settings), key, where=key, owner="tuneforge")
            yield from _compare_values(f"--{key}", option, run_config.get(key, option.default), value)
            continue
        before, now = list_component_entries(run_config.get(key)), list_component_entries(value)
        pairs = list(zip(before, now, strict=False))
        if len(before) != len(now) or not all(_same_class(key, one["name"], other["name"]) for one, other in pairs):
            had, wanted = (", ".join(each["name"] for each in entries) or "none" for entries in (before, now))
            yield ConfigConflict(f"--{key}", had, wanted)
            continue
        for old, new in pairs:
            yield from _compare_component(key, old, new)
            dropped = {name: value for name, value in old.items() if name not in new}
            for each in _compare_component(key, new, {"name": new["name"], **dropped}):
                yield ConfigConflict(each.key, each.new_value, each.run_value)


def _compare_repeatable(key: str, present: list[dict[str, Any]], new: dict[str, Any]) -> Iterator[ConfigConflict]:
    had = next((each for each in present if _same_class(key, each["name"], new["name"])), None)
    if had is not None:
        yield from _compare_component(key, had, new)
    else:
        names = ", ".join(each["name"] for each in present)
        yield ConfigConflict(f"--{key}", names or "none", new["name"])


def _compare_component(key: str, current: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[ConfigConflict]:
    if not current or not _same_class(key, current["name"], new["name"]):
        yield ConfigConflict(f"--{key}", current.get("name", "none"), new["name"])
        return
    if is_object(new["name"]):  # its options are not recorded
        return
    prefix = f"--{option_prefix(new['name']) if key in REPEATABLE_COMPONENT_KEYS else key}"
    known = get_options(
        registry.load_component(registry.find_component(GROUP_BY_KEY[key], new["name"], where=f"--{key}"))
    )
    before = {name.replace("-", "_"): value for name, value in current.items()}
    for name, value in new.items():
        if name != "name":
            option = find_option(known, name, where=f"{prefix}.{name}", owner=new["name"])
            yield from _compare_values(f"{prefix}.{option.key}", option, before.get(option.name, option.default), value)


def _compare_values(flag: str, option: Option, current: Any, new: Any) -> Iterator[ConfigConflict]:
    parsed_current, parsed_new = (parse_option(option, value, where=flag) for value in (current, new))
    places = isinstance(parsed_current, Path) and isinstance(parsed_new, Path)
    same = parsed_current.resolve() == parsed_new.resolve() if places else parsed_current == parsed_new
    if not same:
        yield ConfigConflict(flag, format_value(parsed_current), format_value(parsed_new))


def _same_class(key: str, one: str, other: str) -> bool:
    """Return True if two names stand for one class: an alias equals the name, and a script equals its module."""
    if one == other or is_object(one) or is_object(other):
        return one == other
    if "__main__" in (one.partition(":")[0], other.partition(":")[0]):
        return one.partition(":")[2] == other.partition(":")[2]
    one_target, other_target = (
        registry.find_component(GROUP_BY_KEY[key], name, where=f"--{key}").target for name in (one, other)
    )
    return one_target == other_target
