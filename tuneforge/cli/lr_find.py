"""`tuneforge lr-find`: suggest a learning rate."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.plugin.command_options import ComponentCommand, build_config, run_options
from tuneforge.report.text_table import format_table

if TYPE_CHECKING:
    from tuneforge.comparison.lr_range_test import LRFindResult


def _lr_find(**values: Any) -> None:
    """Measure the loss after one optimizer step at each of a range of learning rates, and suggest one.

    \b
    tuneforge lr-find --data image-folder --data.path photos --train head
    tuneforge lr-find --optimizer sgd --plot lr.png
    """
    config = build_config(click.get_current_context(), values)
    from tuneforge.comparison.lr_range_test import lr_find as find
    from tuneforge.engine.session.engine import Engine

    found = find(Engine.from_config(config), train=values["train"] or "all", batches=values["batches"])
    if values["plot"]:
        found.plot(values["plot"])
    if values["as_json"]:
        click.echo(json.dumps(_to_dict(found)))
        return
    click.echo(f"trainable: {found.num_trained:,} parameters ({', '.join(values['train']) or 'all'})")
    _print(found)
    if values["plot"]:
        click.echo(f"plot: {shlex.quote(str(values['plot']))}")


def _print(result: LRFindResult) -> None:
    """Print learning rates and losses as a table, then the suggestion."""
    marks = {result.lowest_lr: "lowest", result.steepest_lr: "steepest"} if result.suggestion is not None else {}
    rows = [
        (f"{lr:.1e}", f"{loss:.4f}", f"{result.smoothed[lr]:.4f}" if lr in result.smoothed else "-", marks.get(lr, ""))
        for lr, loss in result.losses.items()
    ]
    click.echo("\n".join(format_table(("lr", "loss after one step", "smoothed", ""), rows, right=range(3))))
    if result.suggestion is None:
        click.echo(f"no suggestion: {result.reason}")
        return
    click.echo(f"suggestion: {result.suggestion:.1e}, {result.reason}")
    click.echo(f"next: tuneforge run --lr {result.suggestion:.1e} ...")


def _to_dict(result: LRFindResult) -> dict[str, Any]:
    from tuneforge.engine.storage.atomic import nonfinite_to_none

    losses = [{"lr": lr, "loss": nonfinite_to_none(loss)} for lr, loss in result.losses.items()]
    return {
        "losses": losses,
        "suggestion": result.suggestion,
        "reason": result.reason,
        "num_trained": result.num_trained,
    }


lr_find = ComponentCommand(
    "lr-find",
    callback=_lr_find,
    help=_lr_find.__doc__,
    params=[
        click.Option(
            ["--train"],
            metavar="SELECTOR",
            multiple=True,
            help="Parameters that would train, such as head. Repeatable. [default: all]",
        ),
        click.Option(
            ["--batches"],
            type=click.IntRange(min=1),
            default=3,
            show_default=True,
            help="Number of batches over which each loss is averaged.",
        ),
        click.Option(
            ["--plot"], type=click.Path(dir_okay=False, path_type=Path), help="Write a plot to this PNG file."
        ),
        *run_options(),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
    ],
)
