"""`tuneforge run`: tune a model."""

from __future__ import annotations

import json
from typing import Any

import click

from tuneforge.cli.options import ComponentCommand, configuration, own_options


def _run(**values: Any) -> None:
    """Tune a model: prepare data, adapt the model, follow the strategy, evaluate, write the run's folder.

    \b
    tuneforge run --strategy freeze-then-unfreeze
    tuneforge run --data image-folder --data.path photos --model torchvision --model.arch resnet18
    """
    config = configuration(click.get_current_context(), values)
    as_json = values["as_json"]
    from tuneforge.cli.screen import Screen
    from tuneforge.engine.engine import Engine
    from tuneforge.plugin.config import to_toml

    if values["print_config"]:
        click.echo(to_toml(Engine.of(config).config), nl=False)
        return
    screen = Screen(to_stderr=as_json)
    engine = Engine.of(config, say=screen.say, also=[screen])
    with screen:
        result = engine.run()
    screen.say("")
    screen.say(f"done: {result.folder}")
    screen.say(f"next: tuneforge report {result.folder}")
    screen.say(f"      tuneforge predict {result.folder} FILE")
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), "report": _read_report(result.folder)}))


def _read_report(folder: Any) -> Any:
    from tuneforge.engine.folder import REPORT, read_json

    return read_json(folder / REPORT)


run = ComponentCommand(
    "run",
    callback=_run,
    help=_run.__doc__,
    params=[
        *own_options(),
        click.Option(["--print-config"], is_flag=True, help="Print a file that runs the same, and stop."),
        click.Option(["--json", "as_json"], is_flag=True, help="End with one JSON object on standard output."),
    ],
)
