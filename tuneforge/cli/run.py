"""`tuneforge run`: fine-tune a model."""

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

from tuneforge.plugin.command_options import ComponentCommand, build_config, run_options

if TYPE_CHECKING:
    from tuneforge.cli.progress import ProgressDisplay
    from tuneforge.engine.session.engine import Engine
    from tuneforge.plugin.config import RunConfig

_EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
_EXIT_GRACE_S = 1.0


def _run(**values: Any) -> None:
    """Fine-tune a model: prepare the data, adapt the model, execute the strategy, evaluate, write the run directory.

    \b
    tuneforge run --strategy freeze-then-unfreeze
    tuneforge run --data photos --model torchvision --model.arch resnet18
    """
    context = click.get_current_context()
    config, notes = build_config(context, values), context.meta["tuneforge.notes"]
    as_json = values["as_json"]
    from tuneforge.engine.session.engine import Engine
    from tuneforge.plugin.config import config_to_toml

    if values["print_config"]:
        click.echo(config_to_toml(Engine.from_config(config).config), nl=False)
        return
    if values["dry_run"]:
        _print_dry_run(config, notes, as_json=as_json)
        return
    begun = _find_restarted_run(config)
    if begun is not None:
        if not _is_done(begun):
            run_engine(lambda display: Engine.resume(begun, log=display.log, observers=[display]), as_json=as_json)
        return
    run_engine(
        lambda display: Engine.from_config(config, log=display.log, observers=[display], notes=notes), as_json=as_json
    )


def _find_restarted_run(config: RunConfig) -> Path | None:
    """Return the run that these processes had started before torchrun restarted them, or None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    from tuneforge.engine.context.distributed import ProcessGroup
    from tuneforge.engine.storage.run_files import STATUS, read_json

    process_group = ProcessGroup.from_env()
    base = Path("runs") if config.out is None else config.out.parent
    found = [
        path
        for path in (base.glob("*") if process_group.is_main else ())
        if config.out in (None, path)
        and (path / STATUS).exists()
        and read_json(path / STATUS)["parent"] == os.getppid()
    ]
    newest = max(found, key=lambda path: (path / STATUS).stat().st_mtime, default=None)
    newest_of_main = process_group.all_gather_object(None if newest is None else str(newest))[0]
    return None if newest_of_main is None else Path(newest_of_main)


def _is_done(run_dir: Path) -> bool:
    from tuneforge.engine.storage.run_files import STATUS, read_json

    return bool(read_json(run_dir / STATUS)["state"] == "done")


def run_engine(make: Callable[[ProgressDisplay], Engine], *, as_json: bool) -> None:
    """Run an engine with a progress display, and print the next commands.

    A first Ctrl-C or SIGTERM saves a checkpoint and stops; a second one kills the process.

    Args:
        make: Builds the engine that the display observes.
        as_json: Print one JSON object on standard output at the end.
    """
    from tuneforge.cli.progress import ProgressDisplay

    follows = os.environ.get("RANK", "0") != "0"
    display = ProgressDisplay(to_stderr=as_json, quiet=follows)
    engine = make(display)
    with display, stop_on_signals(engine):
        result = engine.run()
    place = shlex.quote(str(result.run_dir))
    display.log(f"done: {place}")
    display.log(f"next: tuneforge report {place}")
    display.log(f"      tuneforge predict {place} FILE")
    if as_json and not follows:
        click.echo(json.dumps({"run_dir": str(result.run_dir), "report": _read_report(result.run_dir)}))


@contextlib.contextmanager
def stop_on_signals(engine: Engine) -> Iterator[None]:
    """Ask the engine to stop at the first signal; the second one ends the process as it would without this."""
    before = {number: signal.getsignal(number) for number in _EXIT_CODES}

    def ask(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        engine.stop("Ctrl-C" if number == signal.SIGINT else "SIGTERM", exit_code=_EXIT_CODES[number])

    for number in _EXIT_CODES:
        signal.signal(number, ask)
    try:
        with _exit_on_second_signal():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _exit_on_second_signal() -> Iterator[None]:
    """End the process within a second after a second signal, whatever code it executes.

    A signal handler in Python waits while C code runs, and an exception that it raises can be lost in a destructor. But
    the interpreter writes the number of each signal into a pipe at once, where a thread reads it. The thread gives the
    process a moment to end by itself.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)

    def watch() -> None:
        with open(reader, "rb", buffering=0) as pipe:
            came = (byte[0] for byte in iter(lambda: pipe.read(1), b"") if byte[0] in _EXIT_CODES)
            for second in itertools.islice(came, 1, 2):
                time.sleep(_EXIT_GRACE_S)
                os._exit(_EXIT_CODES[second])

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _print_dry_run(config: RunConfig, notes: list[str], *, as_json: bool) -> None:
    """Print the strategy steps that are known before the first is executed, and whether more can follow."""
    from tuneforge.builtin.strategies.plan_file import format_plan, step_to_dict
    from tuneforge.cli.report import describe_other_hooks
    from tuneforge.engine.session import messages
    from tuneforge.engine.session.engine import Engine

    heading = list(notes)
    found = Engine.from_config(config, log=heading.append).dry_run()
    heading += describe_other_hooks(config.strategy.name)
    if as_json:
        entries = [step_to_dict(step) for step in found.strategy_steps]
        click.echo(json.dumps({"steps": entries, "is_adaptive": found.depends_on_results, "notes": heading}))
        return
    text = format_plan(found.strategy_steps, heading=heading, describe=messages.format_step, refit=found.refit)
    click.echo(text, nl=False)
    if found.depends_on_results:
        click.echo("\n# the strategy chooses the further steps from the results of these")


def _read_report(run_dir: Any) -> Any:
    from tuneforge.engine.storage.run_files import REPORT, read_json

    return read_json(run_dir / REPORT)


run = ComponentCommand(
    "run",
    callback=_run,
    help=_run.__doc__,
    params=[
        *run_options(),
        click.Option(["--print-config"], is_flag=True, help="Print the configuration as a TOML file, and exit."),
        click.Option(
            ["--dry-run"], is_flag=True, help="Print the steps of the strategy as a plan file, and train nothing."
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object on standard output at the end."),
    ],
)
