"""`tuneforge evaluate`: evaluate a finished run again, on its own data or on other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tuneforge.plugin.command_options import ComponentCommand, build_config, component_options


def _evaluate(run_dir: Path, **values: Any) -> None:
    """Evaluate a finished run again, on its own data or, with --data, on other data."""
    ctx = click.get_current_context()
    config = build_config(ctx, values)
    from tuneforge.engine.session import messages, predictor
    from tuneforge.engine.storage.atomic import nonfinite_to_none

    metrics = predictor.evaluate(
        run_dir,
        data=config.data if values["data"] or ctx.meta["tuneforge.chosen"] else None,
        metrics=config.metrics,
        device_name=values["device"],
        log=lambda text: click.echo(text, err=True),
    )
    if values["as_json"]:
        click.echo(json.dumps(nonfinite_to_none(metrics)))
        return
    primary_metrics = predictor.load(run_dir, device_name=values["device"]).targets.primary_metrics
    for line in messages.format_metrics(metrics, primary_metrics):
        click.echo(line)


evaluate = ComponentCommand(
    "evaluate",
    callback=_evaluate,
    help=_evaluate.__doc__,
    params=[
        click.Argument(["run_dir"], type=click.Path(path_type=Path), metavar="RUN"),
        *component_options("data", "metrics", fallback="that of the run"),
        click.Option(["--device"], default="auto", help="Device to compute on.", show_default=True),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
    ],
)
