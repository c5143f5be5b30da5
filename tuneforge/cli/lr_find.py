"""`tuneforge lr-find`: which learning rate to begin with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.cli.options import ComponentCommand, configuration, own_options

if TYPE_CHECKING:
    from tuneforge.comparison.lr_range_test import Rates


def _lr_find(**values: Any) -> None:
    """Measure the loss after one step at each of a range of learning rates, and suggest one. Nothing is tuned.

    \b
    tuneforge lr-find --data image-folder --data.path photos --train head
    tuneforge lr-find --optimizer sgd --plot rates.png
    """
    config = configuration(click.get_current_context(), values)
    from tuneforge.comparison.lr_range_test import lr_find as find
    from tuneforge.engine.session.engine import Engine

    found = find(Engine.of(config), train=values["train"] or "all", batches=values["batches"])
    if values["plot"]:
        found.draw(values["plot"])
    if values["as_json"]:
        click.echo(json.dumps(_plain(found)))
        return
    click.echo(f"trains: {found.trained:,} numbers ({', '.join(values['train']) or 'all'})")
    _print(found)
    if values["plot"]:
        click.echo(f"plot: {shlex.quote(str(values['plot']))}")


def _print(found: Rates) -> None:
    """Rates and losses as a table, and the suggestion."""
    click.echo("    rate  loss after one step  smoothed")
    for rate, loss in found.losses.items():
        marks = {found.lowest: "  least", found.steepest: "  steepest"} if found.suggestion is not None else {}
        smooth = f"{found.smoothed[rate]:.4f}" if rate in found.smoothed else "-"
        click.echo(f"{rate:8.1e}  {loss:19.4f}  {smooth:>8}{marks.get(rate, '')}")
    if found.suggestion is None:
        click.echo(f"no suggestion: {found.reason}")
        return
    click.echo(f"suggestion: {found.suggestion:.1e}, {found.reason}")
    click.echo(f"next: tuneforge run --lr {found.suggestion:.1e} ...")


def _plain(found: Rates) -> dict[str, Any]:
    from tuneforge.engine.storage.run_dir import finite

    losses = [{"rate": rate, "loss": finite(loss)} for rate, loss in found.losses.items()]
    return {"losses": losses, "suggestion": found.suggestion, "reason": found.reason, "trained": found.trained}


lr_find = ComponentCommand(
    "lr-find",
    callback=_lr_find,
    help=_lr_find.__doc__,
    params=[
        click.Option(
            ["--train"],
            metavar="SELECTOR",
            multiple=True,
            help="What would train, such as head. Repeatable. [default: all]",
        ),
        click.Option(
            ["--batches"],
            type=click.IntRange(min=1),
            default=5,
            show_default=True,
            help="Batches each loss is the mean of.",
        ),
        click.Option(["--plot"], type=click.Path(dir_okay=False, path_type=Path), help="Draw it into this PNG file."),
        *own_options(),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
    ],
)
