"""`tuneforge resume`: resume a run that was stopped or killed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from tuneforge.cli.run import run_engine
from tuneforge.errors import UsageError
from tuneforge.plugin.command_options import (
    ComponentCommand,
    config_table_from_args,
    flag_values,
    flags_to_table,
    run_options,
)
from tuneforge.plugin.config import (
    REPEATABLE_COMPONENT_KEYS,
    SINGLE_COMPONENT_KEYS,
    config_to_toml,
    list_component_entries,
    merge_config,
    resolve_config,
)
from tuneforge.plugin.config_conflicts import ConfigConflict, find_conflicts
from tuneforge.plugin.names import option_prefix

_RUN, _FILE = "tuneforge.run", "tuneforge.given"


class ResumeCommand(ComponentCommand):
    """A command that also has the options of the components of the resumed run."""

    def load_base_config(self, ctx: click.Context, args: list[str]) -> dict[str, Any]:
        """Return the run's configuration of the components that the command line mentions, updated by the file's."""
        file = ctx.meta[_FILE] = config_table_from_args(args)
        if set(args) & set(ctx.help_option_names):
            return file
        run_dir = ctx.meta[_RUN] = self._resolve_run_dir(ctx, args, file)
        return merge_config(_select_mentioned(_read_run_config(run_dir), args), file)

    def _resolve_run_dir(self, ctx: click.Context, args: list[str], file: Mapping[str, Any]) -> Path:
        named = self._positional(ctx, args) or next(flag_values(args, "--out"), None) or file.get("out")
        return Path(named) if named else _find_newest_run(Path("runs"))

    def _positional(self, ctx: click.Context, args: list[str]) -> str | None:
        """Return the first word that is neither a flag nor the value of a flag; every dotted flag has a value."""
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


def _select_mentioned(run_config: Mapping[str, Any], args: list[str]) -> dict[str, Any]:
    """Return the components of a run whose options the command line gives; only those are loaded."""

    def is_mentioned(prefix: str) -> bool:
        shorts = ("--epochs", "--lr") if prefix == "strategy" else ()
        return any(arg.startswith(f"--{prefix}.") or arg.partition("=")[0] in shorts for arg in args)

    single = {key: run_config[key] for key in SINGLE_COMPONENT_KEYS if key in run_config and is_mentioned(key)}
    many = {
        key: [each for each in list_component_entries(run_config.get(key)) if is_mentioned(option_prefix(each["name"]))]
        for key in REPEATABLE_COMPONENT_KEYS
    }
    return single | {key: entries for key, entries in many.items() if entries}


def _read_run_config(run_dir: Path) -> dict[str, Any]:
    from tuneforge.engine.storage.run_files import RUN, read_json

    config: dict[str, Any] = read_json(run_dir / RUN, "config")["config"]
    return config


def _find_newest_run(runs_dir: Path) -> Path:
    from tuneforge.engine.session.resume import find_resumable

    found = find_resumable(runs_dir)
    if not found:
        raise UsageError(
            "there is no run to resume",
            where=f"{runs_dir}/",
            why="every run there is done or running",
            fix="name one: tuneforge resume RUN",
        )
    return found[-1]


def _require_no_conflicts(conflicts: Iterable[ConfigConflict], run_dir: Path) -> None:
    lines = [f"  {each}" for each in conflicts]
    if lines:
        raise UsageError(
            "\n".join([f"the command line contradicts the run in '{run_dir}'", *lines]),
            where=str(run_dir / "run.json"),
            why="the configuration of a run does not change after its start",
            fix=f"remove those flags: tuneforge resume {run_dir}; or start another run: tuneforge run ...",
        )


def _resume(**values: Any) -> None:
    """Resume a run that was stopped or killed; by default the newest under runs/. The result is that of a run without a
    stop.

    The flags of `tuneforge run` are accepted, so that the same command line can be used; a flag that contradicts the
    run is an error.

    \b
    tuneforge resume
    tuneforge resume runs/NAME
    """
    ctx = click.get_current_context()
    run_dir, run_config = ctx.meta[_RUN], _read_run_config(ctx.meta[_RUN])
    _require_no_conflicts(
        find_conflicts(run_config, merge_config(ctx.meta[_FILE], flags_to_table(ctx, values)), run_dir), run_dir
    )
    if values["print_config"]:
        click.echo(config_to_toml(resolve_config(run_config, where=str(run_dir))), nl=False)
        return
    from tuneforge.engine.session.engine import Engine

    run_engine(lambda display: Engine.resume(run_dir, log=display.log, observers=[display]), as_json=values["as_json"])


resume = ResumeCommand(
    "resume",
    callback=_resume,
    help=_resume.__doc__,
    params=[
        click.Argument(["run_dir"], metavar="[RUN]", required=False),
        *run_options(),
        click.Option(["--print-config"], is_flag=True, help="Print the configuration as a TOML file, and exit."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object on standard output at the end."),
    ],
)
