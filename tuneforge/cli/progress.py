"""Progress of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tuneforge.plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from tuneforge.engine.context.run import Run

_POLL_INTERVAL_S = 0.2
_MIN_STEPS, _MIN_S = 10, 2.0


class ProgressDisplay:
    """Log lines and a progress bar, which a thread updates from the counters of the run.

    Args:
        to_stderr: Write to standard error, so that standard output holds only JSON.
        quiet: Print nothing, as on every rank but rank 0.
    """

    def __init__(self, *, to_stderr: bool, quiet: bool = False) -> None:
        self._console = Console(stderr=to_stderr, highlight=False, soft_wrap=True, quiet=quiet)
        self._run: Run | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll_progress, daemon=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, transient=True)

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._progress.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        if self._console.is_terminal:
            self._progress.stop()

    def log(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Store the run whose counters are shown."""
        self._run = run

    def _poll_progress(self) -> None:
        task = self._progress.add_task("starting", total=None)
        phase, started_at, first_step, is_logged = None, 0.0, 0, False
        while not self._stopped.wait(_POLL_INTERVAL_S):
            run = self._run
            present = None if run is None else run.phase
            if run is None or present is None:
                continue
            if present is not phase:
                phase, started_at, first_step, is_logged = present, time.perf_counter(), run.steps_done, False
            self._progress.update(
                task, description=f"phase '{phase.name}'", completed=run.steps_done, total=run.total_steps
            )
            done, seconds = run.steps_done - first_step, time.perf_counter() - started_at
            if not is_logged and done >= _MIN_STEPS and seconds >= _MIN_S:
                is_logged = True
                left = seconds / done * (run.total_steps - run.steps_done)
                self.log(f"  estimated {left:.0f} s left in this phase ({1000 * seconds / done:.1f} ms per step)")
