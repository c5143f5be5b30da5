"""`tuneforge evaluate`: the figures of a finished run again, on its own data or on others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tuneforge.cli.options import ComponentCommand, configuration, pick_options


def _evaluate(folder: Path, **values: Any) -> None:
    """Evaluate a finished run again: on its own data, or with --data on others."""
    ctx = click.get_current_context()
    config = configuration(ctx, values)
    from tuneforge.engine.session import messages as story
    from tuneforge.engine.session import predictor as tuned
    from tuneforge.engine.storage.run_dir import finite

    figures = tuned.evaluate(
        folder,
        data=config.data if values["data"] or ctx.meta["tuneforge.chosen"] else None,
        metrics=config.evaluate,
        device_name=values["device"],
    )
    if values["as_json"]:
        click.echo(json.dumps(finite(figures)))
        return
    headline = tuned.load(folder, device_name=values["device"]).targets.headline
    for line in story.of_result(figures, headline):
        click.echo(line)


evaluate = ComponentCommand(
    "evaluate",
    callback=_evaluate,
    help=_evaluate.__doc__,
    params=[
        click.Argument(["folder"], type=click.Path(path_type=Path), metavar="RUN"),
        *pick_options("data", "evaluate", instead="the run's own"),
        click.Option(["--device"], default="auto", help="Where to compute.", show_default=True),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
    ],
)
