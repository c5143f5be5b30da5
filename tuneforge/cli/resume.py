"""`tuneforge resume`: go on with a run that was stopped or killed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import click

from tuneforge.cli.options import ComponentCommand, file_table, flag_table, own_options, shown, values_of
from tuneforge.cli.run import carry_out
from tuneforge.errors import UsageError
from tuneforge.plugin import registry
from tuneforge.plugin.component import Option, find_option, options_of, parse
from tuneforge.plugin.config import (
    GROUP_OF,
    REPEATABLE,
    SINGLE,
    Settings,
    default_name,
    entries_under,
    merged,
    resolve,
    to_toml,
)
from tuneforge.plugin.names import prefix_of

_RUN, _FILE = "tuneforge.run", "tuneforge.given"


@attrs.frozen
class Contradiction:
    """A flag that asks for something else than the run has."""

    key: str
    has: str
    given: str

    def __str__(self) -> str:
        """One line of the difference."""
        return f"{self.key}: the run has {self.has}, given {self.given}"


class ResumeCommand(ComponentCommand):
    """A command that knows the options of the components of the run it goes on with."""

    def below_flags(self, ctx: click.Context, args: list[str]) -> dict[str, Any]:
        """What the run was told of the components that the command line mentions, and the file's table over it."""
        file = ctx.meta[_FILE] = file_table(args)
        if set(args) & set(ctx.help_option_names):
            return file
        folder = ctx.meta[_RUN] = self._folder(ctx, args, file)
        return merged(_mentioned(_told(folder), args), file)

    def _folder(self, ctx: click.Context, args: list[str], file: Mapping[str, Any]) -> Path:
        named = self._positional(ctx, args) or next(values_of(args, "--out"), None) or file.get("out")
        return Path(named) if named else _newest(Path("runs"))

    def _positional(self, ctx: click.Context, args: list[str]) -> str | None:
        """The first word that is neither a flag nor a flag's value; every dotted flag takes one."""
        options = [each for each in self.params if isinstance(each, click.Option)]
        alone = {name for each in options if each.is_flag for name in (*each.opts, *each.secondary_opts)}
        words = iter(args)
        for word in words:
            if word == "--":
                return next(words, None)
            if not word.startswith("-"):
                return word
            if "=" not in word and word not in alone:
                next(words, None)
        return None


def contradictions(told: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> Iterator[Contradiction]:
    """Where flags and file ask for something else than a run was told; what they leave out cannot contradict it.

    Args:
        told: The configuration in the run's folder, as a table.
        asked: That of flags and file.
        folder: The run's, which is what `out` must be.

    Raises:
        UnknownNameError: A name or an option does not exist.
        OptionError: A value has the wrong type or range.
    """
    told = {key.replace("_", "-"): value for key, value in told.items()} | {"out": str(folder)}
    for key, value in ((key.replace("_", "-"), value) for key, value in asked.items()):
        if key not in GROUP_OF:
            option = find_option(options_of(Settings), key, where=f"--{key}", owner="tuneforge")
            yield from _compared(f"--{key}", option, told.get(key, option.default), value)
        elif key in SINGLE:
            (had,), (wanted,) = (entries_under(each) or [{}] for each in (told.get(key), value))
            yield from _of_component(key, had, {"name": default_name(key), **wanted})
        else:
            for wanted in entries_under(value):
                yield from _of_repeatable(key, entries_under(told.get(key)), wanted)


def _of_repeatable(key: str, present: list[dict[str, Any]], wanted: dict[str, Any]) -> Iterator[Contradiction]:
    target = _target(key, wanted["name"])
    had = next((each for each in present if _target(key, each["name"]) == target), None)
    if had is not None:
        yield from _of_component(key, had, wanted)
    else:
        names = ", ".join(each["name"] for each in present)
        yield Contradiction(f"--{key}", names or "none", wanted["name"])


def _of_component(key: str, had: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Contradiction]:
    if not had or _target(key, had["name"]) != _target(key, wanted["name"]):
        yield Contradiction(f"--{key}", had.get("name", "none"), wanted["name"])
        return
    prefix = f"--{prefix_of(wanted['name']) if key in REPEATABLE else key}"
    known = options_of(registry.load(registry.find(GROUP_OF[key], wanted["name"], where=f"--{key}")))
    before = {name.replace("-", "_"): value for name, value in had.items()}
    for name, value in wanted.items():
        if name != "name":
            option = find_option(known, name, where=f"{prefix}.{name}", owner=wanted["name"])
            yield from _compared(f"{prefix}.{option.key}", option, before.get(option.name, option.default), value)


def _compared(flag: str, option: Option, had: Any, wanted: Any) -> Iterator[Contradiction]:
    parsed_had, parsed_wanted = (parse(option, value, where=flag) for value in (had, wanted))
    places = isinstance(parsed_had, Path) and isinstance(parsed_wanted, Path)
    same = parsed_had.resolve() == parsed_wanted.resolve() if places else parsed_had == parsed_wanted
    if not same:
        yield Contradiction(flag, shown(parsed_had), shown(parsed_wanted))


def _target(key: str, name: str) -> str:
    """What a name stands for, so that an alias agrees with the name."""
    return registry.find(GROUP_OF[key], name, where=f"--{key}").target


def _mentioned(told: Mapping[str, Any], args: list[str]) -> dict[str, Any]:
    """The components of a run whose options the command line gives; no other is loaded here."""

    def given(prefix: str) -> bool:
        shorts = ("--epochs", "--lr") if prefix == "strategy" else ()
        return any(arg.startswith(f"--{prefix}.") or arg.partition("=")[0] in shorts for arg in args)

    single = {key: told[key] for key in SINGLE if key in told and given(key)}
    many = {
        key: [each for each in entries_under(told.get(key)) if given(prefix_of(each["name"]))] for key in REPEATABLE
    }
    return single | {key: entries for key, entries in many.items() if entries}


def _told(folder: Path) -> dict[str, Any]:
    from tuneforge.engine.storage.run_dir import RUN, read_json

    told: dict[str, Any] = read_json(folder / RUN, "config")["config"]
    return told


def _newest(runs: Path) -> Path:
    from tuneforge.engine.session.resume import resumable

    found = resumable(runs)
    if not found:
        raise UsageError(
            "there is no run to go on with",
            where=f"{runs}/",
            why="each run there is done, or running now",
            fix="name one: tuneforge resume RUN",
        )
    return found[-1]


def _refuse(found: Iterable[Contradiction], folder: Path) -> None:
    lines = [f"  {each}" for each in found]
    if lines:
        raise UsageError(
            "\n".join([f"what is asked contradicts the run in '{folder}'", *lines]),
            where=str(folder / "run.json"),
            why="what decides a run never changes once it has begun",
            fix=f"leave it out: tuneforge resume {folder}, or start another run: tuneforge run ...",
        )


def _resume(**values: Any) -> None:
    """Go on with a run that was stopped or killed, as if nothing had happened; by default the newest under runs/.

    It takes the flags of `tuneforge run`, so that the same command line will do; one that contradicts the run is an
    error.

    \b
    tuneforge resume
    tuneforge resume runs/NAME
    """
    ctx = click.get_current_context()
    folder, told = ctx.meta[_RUN], _told(ctx.meta[_RUN])
    _refuse(contradictions(told, merged(ctx.meta[_FILE], flag_table(ctx, values)), folder), folder)
    if values["print_config"]:
        click.echo(to_toml(resolve(told, where=str(folder))), nl=False)
        return
    from tuneforge.engine.session.engine import Engine

    carry_out(lambda screen: Engine.resume(folder, say=screen.say, also=[screen]), as_json=values["as_json"])


resume = ResumeCommand(
    "resume",
    callback=_resume,
    help=_resume.__doc__,
    params=[
        click.Argument(["folder"], metavar="[RUN]", required=False),
        *own_options(),
        click.Option(["--print-config"], is_flag=True, help="Print a file that runs the same, and stop."),
        click.Option(["--json", "as_json"], is_flag=True, help="End with one JSON object on standard output."),
    ],
)
