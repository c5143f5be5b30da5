"""Flags for components: the first pass finds the components, the second one parses their options."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import click

from tuneforge.errors import TuneforgeError, UsageError
from tuneforge.plugin import registry
from tuneforge.plugin.config import (
    REPEATABLE_COMPONENT_KEYS,
    SINGLE_COMPONENT_KEYS,
    Settings,
    default_name,
    list_component_entries,
    merge_config,
    read_config_file,
    resolve_config,
)
from tuneforge.plugin.config import RunConfig as RunConfig
from tuneforge.plugin.data_path import (
    choose_model,
    default_strategy,
    infer_data,
    is_data_path,
    note_shadowed_path,
)
from tuneforge.plugin.declaration import Option, build_component, describe_type, get_options
from tuneforge.plugin.names import option_prefix

SHORT_FORMS = ("epochs", "lr")
_COMPONENT_KEYS = {**SINGLE_COMPONENT_KEYS, **REPEATABLE_COMPONENT_KEYS}
_HELP = {
    "data": "Data source, or a path: what lies there decides how it is read.",
    "model": "Model; for a path the one that suits the data.",
    "adapt": "Adapter that changes the model, such as another head.", "loss": "Training loss.",
    "metrics": "Metrics of evaluation.", "strategy": "Fine-tuning strategy.",
    "schedule": "Learning rate schedule; replaces that of the strategy.",
    "optimizer": "Optimizer; replaces that of the strategy.", "callback": "Callback.",
    "augment": "Random augmentation of training inputs.",
}  # fmt: skip


@attrs.frozen
class SelectedComponent:
    """A component that the command line or the configuration file names.

    Args:
        key: `strategy`, `callback`, ...
        name: The name as written.
        prefix: The prefix of its options on the command line.
        file_options: Its options in the file.
    """

    key: str
    name: str
    prefix: str
    file_options: Mapping[str, Any]


class ComponentCommand(click.Command):
    """A command that has the options of the selected components besides its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the components first, then parse the arguments with their options."""
        picks = [key for key in _COMPONENT_KEYS if any(parameter.name == key for parameter in self.params)]
        args, ctx.meta["tuneforge.file"], ctx.meta["tuneforge.notes"] = _infer_from_path(
            args, self.load_base_config(ctx, args), picks
        )
        ctx.meta["tuneforge.chosen"] = list(_select_components(args, ctx.meta["tuneforge.file"], picks))
        return super().parse_args(ctx, args)

    def load_base_config(self, ctx: click.Context, args: list[str]) -> dict[str, Any]:
        """Return the table that flags update: that of the configuration file."""
        return config_table_from_args(args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters of the command and of the components."""
        return [*super().get_params(ctx), *self._component_options(ctx)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of the command, then a section for each component."""
        own = super().get_params(ctx)
        records = [record for parameter in own if (record := parameter.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(records)
        for each in ctx.meta["tuneforge.chosen"]:
            dotted = [record for option in _click_options(each) if (record := option.get_help_record(ctx))]
            if dotted:
                with formatter.section(f"Options of {registry.NOUN_BY_GROUP[_COMPONENT_KEYS[each.key]]} '{each.name}'"):
                    formatter.write_dl(dotted)
        formatter.write_paragraph()
        formatter.write_text("Name a component to see its options, for example: --data digits --help")

    def _component_options(self, ctx: click.Context) -> list[click.Parameter]:
        return [option for each in ctx.meta.get("tuneforge.chosen", ()) for option in _click_options(each)]


def _infer_from_path(
    args: list[str], base: Mapping[str, Any], keys: list[str]
) -> tuple[list[str], dict[str, Any], list[str]]:
    """Return the arguments and the base configuration with a data source in place of a path, and lines for the log.

    The model that suits the data, and the strategy that suits the model, are added where the command takes them and the
    user names none.
    """
    table, notes = dict(base), []
    named = list(flag_values(args, "--data"))
    entries = list_component_entries(table.get("data"))
    value = named[-1] if named else entries[0].get("name") if entries else None
    if "data" in keys and (shadowed := note_shadowed_path(value)):
        notes.append(shadowed)
    if "data" in keys and value is not None and is_data_path(value):
        own = {} if named or not entries else _without_name(entries[0])
        flags = {arg.partition("=")[0].removeprefix("--data.") for arg in args if arg.startswith("--data.")}
        found = infer_data(value, given=[key.replace("-", "_") for key in (*flags, *own)])
        notes.append(found.describe())
        table["data"] = {"name": found.name, **found.options, **own}
        args = _without_flag(args, "--data")
        if "model" in keys and not table.get("model") and not any(flag_values(args, "--model")):
            table["model"], why = choose_model(found.kind)
            notes += [why] * bool(why)
    if "strategy" in keys and not table.get("strategy") and not any(flag_values(args, "--strategy")):
        strategy, why = default_strategy(_build_model_component(args, table))
        if why:
            table["strategy"] = {"name": strategy}
            notes.append(why)
    return args, table, notes


def _build_model_component(args: list[str], table: Mapping[str, Any]) -> Any:
    """Return the model component that flags and the base configuration describe; None if they are wrong."""
    entries = list_component_entries(table.get("model"))
    name = next(iter([*flag_values(args, "--model")][-1:]), None) or (entries[0]["name"] if entries else None)
    if name is None:
        return None
    options = _without_name(entries[0]) if entries and entries[0]["name"] == name else {}
    dotted = {arg.partition("=")[0] for arg in args if arg.startswith("--model.")}
    options |= {
        flag.removeprefix("--model."): [*flag_values(args, flag)][-1] for flag in dotted if any(flag_values(args, flag))
    }
    try:
        cls = registry.load_component(registry.find_component("model_adapt", name, where="--model"))
        return build_component(cls, options, where="--model")
    except TuneforgeError:  # parsing the flags will say it
        return None


def _without_flag(args: list[str], flag: str) -> list[str]:
    """Return a command line without a flag and its values."""
    values = [index + 1 for index, arg in enumerate(args) if arg == flag]
    return [
        arg for index, arg in enumerate(args) if index not in values and arg != flag and not arg.startswith(flag + "=")
    ]


def component_options(*keys: str, fallback: str = "") -> list[click.Parameter]:
    """Return the flags that select components; `fallback` describes the default where it is not the usual one."""
    notes = {key: f" [default: {fallback}]" if fallback else _default_note(key) for key in keys}
    return [
        click.Option(
            [f"--{key}", key], metavar="NAME", help=_HELP[key] + notes[key], multiple=key in REPEATABLE_COMPONENT_KEYS
        )
        for key in keys
    ]


def run_options() -> list[click.Parameter]:
    """Return the flags that select components, and those of the settings of a run."""
    short = [
        click.Option([f"--{key}", f"short_{key}"], metavar="VALUE", help=f"Short form of --strategy.{key}.")
        for key in SHORT_FORMS
    ]
    settings = [_setting(option) for option in get_options(Settings).values()]
    config = click.Option(["--config"], metavar="FILE", help="TOML file with any of these options; flags override it.")
    return [*component_options(*_COMPONENT_KEYS), *short, *settings, config]


def build_config(ctx: click.Context, values: Mapping[str, Any]) -> RunConfig:
    """Build the run configuration from parsed flags and the configuration file, which flags override.

    Raises:
        UsageError: A short form names an option that the strategy does not have, or flags contradict each other.
    """
    return resolve_config(merge_config(ctx.meta["tuneforge.file"], flags_to_table(ctx, values)))


def flags_to_table(ctx: click.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration table that the parsed flags describe.

    Raises:
        UsageError: A short form names an option that the strategy does not have.
    """
    flags: dict[str, Any] = {}
    known = get_options(Settings)
    for name, value in values.items():
        if name in known and value is not None:
            flags[known[name].key] = value
    by_component = _component_values(ctx, values)
    for key in SINGLE_COMPONENT_KEYS:
        picked = values.get(key)
        found = picked or _name_in_file(ctx, key)
        options = by_component.get((key, str(found)), {})
        if picked or options:
            flags[key] = {"name": found, **options}
    for key in REPEATABLE_COMPONENT_KEYS:
        named = [*values.get(key, ()), *(name for where, name in by_component if where == key)]
        if named:
            flags[key] = [{"name": name, **by_component.get((key, name), {})} for name in dict.fromkeys(named)]
    _apply_short_forms(ctx, flags, values)
    return flags


def format_default(option: Option) -> str:
    """Return `[default: 1]` or `[required]` for the help."""
    if option.required:
        return "[required]"
    return f"[default: {format_value(option.default)}]"


def format_value(value: Any) -> str:
    """Return the value of an option in the syntax of the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(format_value, value)) or "empty"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={format_value(item)}" for key, item in value.items()) or "empty"
    return "none" if value is None else str(value)


def _setting(option: Option) -> click.Option:
    if option.type in (bool, bool | None):
        return click.Option(
            [f"--{option.key}/--no-{option.key}", option.name],
            default=None,
            help=f"{option.help} {format_default(option)}",
        )
    return click.Option(
        [f"--{option.key}", option.name], metavar=_metavar(option), help=f"{option.help} {format_default(option)}"
    )


def _metavar(option: Option) -> str:
    if typing.get_origin(option.type) is Literal:
        return "[" + "|".join(map(str, typing.get_args(option.type))) + "]"
    words = {"integer": "INTEGER", "number": "NUMBER", "text": "TEXT", "path": "PATH", "true or false": "BOOLEAN"}
    text = describe_type(option.type)
    first = text.partition(" or ")[0]
    return words.get(text) or words.get(first, "VALUE")


def _click_options(component: SelectedComponent) -> Iterator[click.Option]:
    cls = registry.load_component(
        registry.find_component(_COMPONENT_KEYS[component.key], component.name, where=f"--{component.key}")
    )
    given = {key.replace("-", "_"): value for key, value in component.file_options.items()}
    for option in get_options(cls).values():
        shown = attrs.evolve(option, default=given.get(option.name, option.default))
        choices = f" ({describe_type(option.type)})" if _metavar(option) == "VALUE" else ""
        yield click.Option(
            [f"--{component.prefix}.{option.key}", _python_name(component, option)],
            metavar=_metavar(option),
            help=f"{option.help}{choices} {format_default(shown)}",
        )


def _python_name(chosen: SelectedComponent, option: Option) -> str:
    return _python_prefix(chosen) + option.name


def _python_prefix(chosen: SelectedComponent) -> str:
    """Return a prefix for the parameter names of a component's options that no setting has."""
    return re.sub(r"\W", "_", f"dotted__{chosen.key}__{chosen.name}__")


def _component_values(ctx: click.Context, values: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for each in ctx.meta["tuneforge.chosen"]:
        prefix = _python_prefix(each)
        given = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        options = {name: value for name, value in given.items() if value is not None}
        if options:
            found[each.key, each.name] = options
    return found


def _apply_short_forms(ctx: click.Context, flags: dict[str, Any], values: Mapping[str, Any]) -> None:
    name = values.get("strategy") or _name_in_file(ctx, "strategy")
    for short in SHORT_FORMS:
        value = values.get(f"short_{short}")
        if value is None:
            continue
        known = get_options(
            registry.load_component(registry.find_component("finetune_strategy", str(name), where="--strategy"))
        )
        if short not in known:
            raise UsageError(
                f"strategy '{name}' has no option '{short}'",
                where=f"--{short}",
                fix=f"it has {', '.join(f'--strategy.{each.key}' for each in known.values()) or 'no options'}",
            )
        flags.setdefault("strategy", {"name": name}).setdefault(short, value)


def config_table_from_args(args: list[str]) -> dict[str, Any]:
    """Return the table of the file given by `--config`, or an empty table."""
    path = next(flag_values(args, "--config"), None)
    return read_config_file(Path(path)) if path is not None else {}


def _select_components(args: list[str], file: Mapping[str, Any], keys: list[str]) -> Iterator[SelectedComponent]:
    """Yield the components whose options are accepted: those named or with a dotted flag, and the strategy."""
    for key in keys:
        named = list(flag_values(args, f"--{key}"))
        in_file = list_component_entries(file.get(key))
        if key in REPEATABLE_COMPONENT_KEYS:
            for name in dict.fromkeys([*(str(entry.get("name")) for entry in in_file), *named]):
                given = next((entry for entry in in_file if entry.get("name") == name), {})
                yield SelectedComponent(key, name, option_prefix(name), _without_name(given))
            continue
        given = in_file[0] if in_file else {}
        dotted = any(arg.startswith(f"--{key}.") for arg in args)
        default = default_name(key) if dotted or key == "strategy" else None
        found = named[-1] if named else given.get("name", default)
        if found:
            same = given.get("name", default_name(key)) == found
            yield SelectedComponent(key, str(found), key, _without_name(given) if same else {})


def flag_values(args: list[str], flag: str) -> Iterator[str]:
    """Yield each value that a command line gives for a flag."""
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            yield args[index + 1]
        elif arg.startswith(flag + "="):
            yield arg.partition("=")[2]


def _without_name(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "name"}


def _name_in_file(ctx: click.Context, key: str) -> str | None:
    entries = list_component_entries(ctx.meta["tuneforge.file"].get(key))
    return (entries[0].get("name") if entries else None) or default_name(key)


def _default_note(key: str) -> str:
    if key in REPEATABLE_COMPONENT_KEYS:
        return " Repeatable."
    name = default_name(key)
    return f" [default: {name}]" if name else ""
