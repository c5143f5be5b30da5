"""`tuneforge run`: tune a model."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from tuneforge.cli.options import ComponentCommand, configuration, own_options

if TYPE_CHECKING:
    from tuneforge.cli.screen import Screen
    from tuneforge.engine.engine import Engine


def _run(**values: Any) -> None:
    """Tune a model: prepare data, adapt the model, follow the strategy, evaluate, write the run's folder.

    \b
    tuneforge run --strategy freeze-then-unfreeze
    tuneforge run --data image-folder --data.path photos --model torchvision --model.arch resnet18
    """
    config = configuration(click.get_current_context(), values)
    as_json = values["as_json"]
    from tuneforge.engine.engine import Engine
    from tuneforge.plugin.config import to_toml

    if values["print_config"]:
        click.echo(to_toml(Engine.of(config).config), nl=False)
        return
    carry_out(lambda screen: Engine.of(config, say=screen.say, also=[screen]), as_json=as_json)


def carry_out(make: Callable[[Screen], Engine], *, as_json: bool) -> None:
    """Run an engine with a screen, and say what to do next. A first Ctrl-C or SIGTERM saves and stops; a second kills.

    Args:
        make: Makes the engine, once there is a screen to watch it.
        as_json: End with one JSON object on standard output.
    """
    from tuneforge.cli.screen import Screen

    screen = Screen(to_stderr=as_json)
    engine = make(screen)
    with screen, stopping(engine):
        result = engine.run()
    place = shlex.quote(str(result.folder))
    screen.say(f"done: {place}")
    screen.say(f"next: tuneforge report {place}")
    screen.say(f"      tuneforge predict {place} FILE")
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), "report": _read_report(result.folder)}))


@contextlib.contextmanager
def stopping(engine: Engine) -> Iterator[None]:
    """While this lasts, the first signal asks the engine to stop, and the second one ends the process as it would."""
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
    before = {number: signal.getsignal(number) for number in codes}

    def ask(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        engine.stop("Ctrl-C" if number == signal.SIGINT else "SIGTERM", exit_code=codes[signal.Signals(number)])

    for number in codes:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
