"""`tuneforge compare`: compare strategies at equal cost, or compare finished runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.plugin.command_options import ComponentCommand, build_config, run_options

if TYPE_CHECKING:
    from tuneforge.comparison.study import Study
    from tuneforge.comparison.summary import Comparison
    from tuneforge.engine.session.engine import Engine

_EXCLUDED_OPTIONS = ("strategy", "short_epochs", "short_lr", "out")
_SEEDS = 3


def _compare(runs: tuple[str, ...], resume: str | None, as_json: bool, **values: Any) -> int:
    """Compare strategies on the same data at equal cost, or compare finished runs, on the validation split.

    Options of a strategy follow its name: full:lr=3e-4:epochs=20; lists are in brackets. With greedy-soup among the
    strategies, the weights of the others are averaged too. All other flags are those of tuneforge run.

    \b
    tuneforge compare --strategies lp-ft,full,head-only --seeds 3 --budget 20epochs
    tuneforge compare --resume runs/NAME
    tuneforge compare runs/a runs/b runs/c
    """
    ctx = click.get_current_context()
    num_processes = values["num_processes"] or 1
    if runs:
        _require_unset(ctx, values, allowed=("baseline", "out"), reason="finished runs are compared as they are")
        comparison = _compare_runs(runs, values)
    elif resume is not None:
        _require_unset(ctx, values, allowed=("num_processes",), reason="a study is resumed with its own options")
        comparison = _run_study(
            lambda log: _load_study(resume, log), Path(resume), num_processes=num_processes, as_json=as_json
        )
    else:
        out = values["out"] or ctx.meta["tuneforge.file"].get("out")
        comparison = _run_study(
            lambda log: _build_study(ctx, values, log), out and Path(out), num_processes=num_processes, as_json=as_json
        )
    if as_json:
        study_dir = None if comparison.study_dir is None else str(comparison.study_dir)
        click.echo(json.dumps({"study_dir": study_dir, **comparison.results, "costs": comparison.costs}))
        return 0
    click.echo(comparison.table)
    if comparison.study_dir is not None:
        click.echo(f"done: {comparison.study_dir}")
    return 0


def _run_study(
    make: Callable[[Callable[[str], None]], Study], out: Path | None, *, num_processes: int, as_json: bool
) -> Comparison:
    """Run a study; Ctrl-C and SIGTERM save checkpoints of the active runs and stop."""
    return make(lambda text: click.echo(text, err=as_json)).run(out, _execute, num_processes=num_processes)


def _execute(engine: Engine) -> None:
    from tuneforge.cli.run import stop_on_signals

    with stop_on_signals(engine):
        engine.run()


def _build_study(ctx: click.Context, values: dict[str, Any], log: Callable[[str], None]) -> Study:
    from tuneforge.comparison.study import Study, engine_options_from_config

    config = build_config(ctx, values)
    if "strategy" in ctx.meta["tuneforge.file"]:
        log("note: the strategy of the file is ignored; --strategies names those to compare")
    return Study(
        values["strategies"] or "",
        seeds=_SEEDS if values["seeds"] is None else values["seeds"],
        budget=config.budget,
        baseline=values["baseline"],
        halving=values["halving"],
        engine_options=engine_options_from_config(config),
        log=log,
    )


def _load_study(study_dir: str, log: Callable[[str], None]) -> Study:
    from tuneforge.comparison.study import Study

    return Study.from_dir(Path(study_dir), log=log)


def _compare_runs(runs: tuple[str, ...], values: dict[str, Any]) -> Comparison:
    from tuneforge.comparison.study import compare as compared

    return compared(runs=runs, baseline=values["baseline"], out=values["out"])


def _require_unset(ctx: click.Context, values: dict[str, Any], *, allowed: tuple[str, ...], reason: str) -> None:
    """Check that no flag is given that would be ignored.

    Raises:
        UsageError: The message names the flags.
    """
    from tuneforge.errors import UsageError

    given = {parameter.name: parameter.opts[0] for parameter in ctx.command.get_params(ctx) if parameter.opts}
    asked = [given[name] for name, value in values.items() if value not in (None, False, ()) and name not in allowed]
    if asked:
        raise UsageError(f"{reason}, so {', '.join(asked)} cannot be given", fix="remove that")


compare = ComponentCommand(
    "compare",
    callback=_compare,
    help=_compare.__doc__,
    params=[
        click.Argument(["runs"], metavar="[RUN]...", nargs=-1),
        click.Option(["--strategies"], metavar="NAME[:OPTION=VALUE]...,...", help="Strategies to compare."),
        click.Option(
            ["--seeds"], type=int, help=f"Number of seeds per strategy, counted from --seed. [default: {_SEEDS}]"
        ),
        click.Option(
            ["--baseline"], metavar="NAME", help="Strategy that the others are tested against. [default: the first]"
        ),
        click.Option(["--halving"], is_flag=True, help="Successive halving: drop the worse half after each round."),
        click.Option(
            ["--num-processes"], type=click.IntRange(min=1), help="Worker processes that share the runs. [default: 1]"
        ),
        click.Option(["--resume"], metavar="STUDY", help="Resume the study in this directory."),
        click.Option(["--out"], metavar="DIR", help="Study directory. [default: a new one under runs/]"),
        *(each for each in run_options() if each.name not in _EXCLUDED_OPTIONS),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object on standard output at the end."),
    ],
)
