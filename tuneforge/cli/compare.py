"""`tuneforge compare`: race strategies at equal cost, or compare finished runs."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.cli.options import ComponentCommand, configuration, own_options

if TYPE_CHECKING:
    from tuneforge.comparison.study import Race
    from tuneforge.comparison.summary import Comparison
    from tuneforge.engine.session.engine import Engine

_OTHERS = ("strategy", "short_epochs", "short_lr", "out")
_SEEDS = 3


def _compare(runs: tuple[str, ...], resume: str | None, follow: bool, as_json: bool, **values: Any) -> int:
    """Race strategies on the same data at equal cost, or compare finished runs; it decides on validation.

    Options of an entrant follow its name: full:lr=3e-4:epochs=20; a list stands in brackets. With greedy-soup among the
    strategies, the weights of the others are averaged too. All other flags are those of run.

    \b
    tuneforge compare --strategies lp-ft,full,head-only --seeds 3 --budget 20epochs
    tuneforge compare --resume runs/NAME
    tuneforge compare runs/a runs/b runs/c
    """
    ctx = click.get_current_context()
    if follow and resume is not None:
        return _follow(Path(resume))
    leads = os.environ.get("RANK", "0") == "0"
    ranks = values["ranks"] or 1
    if runs:
        _refuse(ctx, values, allowed=("baseline", "out"), what="finished runs are compared as they are")
        comparison = _of_runs(runs, values)
    elif resume is not None:
        _refuse(ctx, values, allowed=("ranks",), what="a race goes on as it was begun")
        comparison = _hold(lambda say: _found(resume, say), Path(resume), ranks=ranks, as_json=as_json)
    else:
        out = values["out"] or ctx.meta["tuneforge.file"].get("out")
        comparison = _hold(lambda say: _asked(ctx, values, say), out and Path(out), ranks=ranks, as_json=as_json)
    if not leads:
        return 0
    if as_json:
        place = None if comparison.folder is None else str(comparison.folder)
        click.echo(json.dumps({"folder": place, **comparison.results, "costs": comparison.costs}))
        return 0
    click.echo(comparison.table)
    if comparison.folder is not None:
        click.echo(f"done: {comparison.folder}")
    return 0


def _hold(make: Callable[[Callable[[str], None]], Race], out: Path | None, *, ranks: int, as_json: bool) -> Comparison:
    """Run a race; Ctrl-C and SIGTERM save the runs that are under way and stop."""
    return make(lambda text: click.echo(text, err=as_json)).run(out, _execute, ranks=ranks)


def _execute(engine: Engine) -> None:
    from tuneforge.cli.run import stopping

    with stopping(engine):
        engine.run()


def _follow(folder: Path) -> int:
    """Do runs of a race for the process that started this one, as long as that is there."""
    from tuneforge.errors import StoppedError

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        _found(str(folder), lambda text: None).follow(folder, _execute)
    except StoppedError as error:  # the one that asked knows
        return error.exit_code
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway
    return 0


def _end_with_input() -> None:
    """End this process at once when standard input does, which nobody writes to: the one that holds it is gone."""
    os.read(0, 1)
    os._exit(1)


def _asked(ctx: click.Context, values: dict[str, Any], say: Callable[[str], None]) -> Race:
    from tuneforge.comparison.study import Race, given_of

    config = configuration(ctx, values)
    if "strategy" in ctx.meta["tuneforge.file"]:
        say("note: the strategy of the file takes no part; --strategies does")
    return Race(
        values["strategies"] or "",
        seeds=_SEEDS if values["seeds"] is None else values["seeds"],
        budget=config.budget,
        baseline=values["baseline"],
        halving=values["halving"],
        given=given_of(config),
        say=say,
    )


def _found(folder: str, say: Callable[[str], None]) -> Race:
    from tuneforge.comparison.study import Race

    return Race.found(Path(folder), say=say)


def _of_runs(runs: tuple[str, ...], values: dict[str, Any]) -> Comparison:
    from tuneforge.comparison.study import compare as compared

    return compared(runs=runs, baseline=values["baseline"], out=values["out"])


def _refuse(ctx: click.Context, values: dict[str, Any], *, allowed: tuple[str, ...], what: str) -> None:
    """Nothing may be asked for that would be ignored.

    Raises:
        UsageError: The message names the flags.
    """
    from tuneforge.errors import UsageError

    given = {parameter.name: parameter.opts[0] for parameter in ctx.command.get_params(ctx) if parameter.opts}
    asked = [given[name] for name, value in values.items() if value not in (None, False, ()) and name not in allowed]
    if asked:
        raise UsageError(f"{what}, so {', '.join(asked)} cannot be asked for", fix="leave that out")


compare = ComponentCommand(
    "compare",
    callback=_compare,
    help=_compare.__doc__,
    params=[
        click.Argument(["runs"], metavar="[RUN]...", nargs=-1),
        click.Option(["--strategies"], metavar="NAME[:OPTION=VALUE]...,...", help="Who takes part."),
        click.Option(["--seeds"], type=int, help=f"How many runs of each, from --seed on. [default: {_SEEDS}]"),
        click.Option(["--baseline"], metavar="NAME", help="Whom the others are tested against. [default: the first]"),
        click.Option(["--halving"], is_flag=True, help="Drop the worse half after half the budget, and so on."),
        click.Option(["--ranks"], type=click.IntRange(min=1), help="Processes that share the runs. [default: 1]"),
        click.Option(["--follow"], is_flag=True, hidden=True, help="Do runs for the process that leads the race."),
        click.Option(["--resume"], metavar="RACE", help="Go on with the race in this folder."),
        click.Option(["--out"], metavar="FOLDER", help="The race's folder; none: a new one under runs/."),
        *(each for each in own_options() if each.name not in _OTHERS),
        click.Option(["--json", "as_json"], is_flag=True, help="End with one JSON object on standard output."),
    ],
)
