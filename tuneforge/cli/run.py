"""`tuneforge run`: tune a model."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from tuneforge.cli.options import ComponentCommand, configuration, own_options

if TYPE_CHECKING:
    from tuneforge.cli.progress import Screen
    from tuneforge.engine.session.engine import Engine
    from tuneforge.plugin.config import RunConfig

_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
_MOMENT_S = 1.0


def _run(**values: Any) -> None:
    """Tune a model: prepare data, adapt the model, follow the strategy, evaluate, write the run's folder.

    \b
    tuneforge run --strategy freeze-then-unfreeze
    tuneforge run --data image-folder --data.path photos --model torchvision --model.arch resnet18
    """
    config = configuration(click.get_current_context(), values)
    as_json = values["as_json"]
    from tuneforge.engine.session.engine import Engine
    from tuneforge.plugin.config import to_toml

    if values["print_config"]:
        click.echo(to_toml(Engine.of(config).config), nl=False)
        return
    if values["plan"]:
        _print_plan(config, as_json=as_json)
        return
    begun = _begun_before(config)
    if begun is not None:
        if not _is_done(begun):
            carry_out(lambda screen: Engine.resume(begun, say=screen.say, also=[screen]), as_json=as_json)
        return
    carry_out(lambda screen: Engine.of(config, say=screen.say, also=[screen]), as_json=as_json)


def _begun_before(config: RunConfig) -> Path | None:
    """The run that these processes had begun before torchrun started them again; None where it did not."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    from tuneforge.engine.context.distributed import Ranks
    from tuneforge.engine.storage.run_dir import STATUS, read_json

    ranks = Ranks.joined()
    base = Path("runs") if config.out is None else config.out.parent
    found = [
        path
        for path in (base.glob("*") if ranks.leads else ())
        if config.out in (None, path)
        and (path / STATUS).exists()
        and read_json(path / STATUS)["parent"] == os.getppid()
    ]
    newest = max(found, key=lambda path: (path / STATUS).stat().st_mtime, default=None)
    told = ranks.heard(None if newest is None else str(newest))[0]
    return None if told is None else Path(told)


def _is_done(run: Path) -> bool:
    from tuneforge.engine.storage.run_dir import STATUS, read_json

    return bool(read_json(run / STATUS)["state"] == "done")


def carry_out(make: Callable[[Screen], Engine], *, as_json: bool) -> None:
    """Run an engine with a screen, and say what to do next. A first Ctrl-C or SIGTERM saves and stops; a second kills.

    Args:
        make: Makes the engine, once there is a screen to watch it.
        as_json: End with one JSON object on standard output.
    """
    from tuneforge.cli.progress import Screen

    follows = os.environ.get("RANK", "0") != "0"
    screen = Screen(to_stderr=as_json, quiet=follows)
    engine = make(screen)
    with screen, stopping(engine):
        result = engine.run()
    place = shlex.quote(str(result.folder))
    screen.say(f"done: {place}")
    screen.say(f"next: tuneforge report {place}")
    screen.say(f"      tuneforge predict {place} FILE")
    if as_json and not follows:
        click.echo(json.dumps({"folder": str(result.folder), "report": _read_report(result.folder)}))


@contextlib.contextmanager
def stopping(engine: Engine) -> Iterator[None]:
    """While this lasts, the first signal asks the engine to stop, and the second one ends the process as it would."""
    before = {number: signal.getsignal(number) for number in _CODES}

    def ask(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        engine.stop("Ctrl-C" if number == signal.SIGINT else "SIGTERM", exit_code=_CODES[number])

    for number in _CODES:
        signal.signal(number, ask)
    try:
        with _leaving_at_the_second():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _leaving_at_the_second() -> Iterator[None]:
    """See that a second signal ends the process within a moment, whatever it is in.

    A handler in Python waits for as long as foreign code runs, and what it raises can be lost, in a destructor say. But
    the interpreter writes each signal's number into a pipe at once, where a thread reads it; that gives the process a
    moment to leave tidily.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)

    def watch() -> None:
        with open(reader, "rb", buffering=0) as pipe:
            came = (byte[0] for byte in iter(lambda: pipe.read(1), b"") if byte[0] in _CODES)
            for second in itertools.islice(came, 1, 2):
                time.sleep(_MOMENT_S)
                os._exit(_CODES[second])

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _print_plan(config: RunConfig, *, as_json: bool) -> None:
    """Print the steps that are known before any is done, and whether the strategy decides what follows."""
    from tuneforge.builtin.strategies.plan_file import as_entry, plan_text
    from tuneforge.cli.report import beyond_steps
    from tuneforge.engine.session import messages as story
    from tuneforge.engine.session.engine import Engine

    heading: list[str] = []
    plan = Engine.of(config, say=heading.append).plan()
    heading += beyond_steps(config.strategy.name)
    if as_json:
        entries = [as_entry(step) for step in plan.steps]
        click.echo(json.dumps({"steps": entries, "decides": plan.decides, "notes": heading}))
        return
    click.echo(plan_text(plan.steps, heading=heading, says=story.of_step), nl=False)
    if plan.decides:
        click.echo("\n# then it decides from the report")


def _read_report(folder: Any) -> Any:
    from tuneforge.engine.storage.run_dir import REPORT, read_json

    return read_json(folder / REPORT)


run = ComponentCommand(
    "run",
    callback=_run,
    help=_run.__doc__,
    params=[
        *own_options(),
        click.Option(["--print-config"], is_flag=True, help="Print a file that runs the same, and stop."),
        click.Option(["--plan"], is_flag=True, help="Print the strategy's steps as a plan file, and train nothing."),
        click.Option(["--json", "as_json"], is_flag=True, help="End with one JSON object on standard output."),
    ],
)
