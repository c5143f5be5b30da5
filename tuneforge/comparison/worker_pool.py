"""Worker processes that share the runs of a study on one machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from types import TracebackType
from typing import Any

import torch

from tuneforge.comparison.trial import Trial
from tuneforge.engine.session.engine import Engine
from tuneforge.errors import TryAgainError


class WorkerPool:
    """Processes that do runs: `with WorkerPool(4) as pool: ...`.

    Args:
        num_processes: Number of worker processes; each gets its share of the threads, and of the accelerators in turn.
    """

    def __init__(self, num_processes: int) -> None:
        # Spawned, because a forked child hangs on the locks and CUDA contexts of a parent that has used torch.
        context = multiprocessing.get_context("spawn")
        places = context.SimpleQueue()
        for place in range(num_processes):
            places.put(place % max(1, torch.accelerator.device_count()))
        self._others = multiprocessing.active_children()
        self._executor = ProcessPoolExecutor(
            num_processes, context, initializer=_start_worker, initargs=(places, threads_per_process(num_processes))
        )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        workers = [each for each in multiprocessing.active_children() if each not in self._others]
        try:
            if error is not None:
                for each in workers:
                    each.terminate()  # a run that is under way saves a checkpoint
            self._executor.shutdown(cancel_futures=True)
        except BaseException:  # a second Ctrl-C does not wait
            for each in workers:
                each.kill()
            raise

    def run(
        self, trials: Sequence[Trial], engine_options: Mapping[str, Any], *, skips: Callable[[Trial], bool]
    ) -> Iterator[Trial]:
        """Do these runs and yield each once it is settled, in the order in which they end.

        Args:
            trials: Runs, in the order in which they start.
            engine_options: Keywords of `Engine` for all of them.
            skips: Asked after each run: True for a run that need not start any more.

        Raises:
            StoppedError: A run was asked to stop.
            TryAgainError: A worker process was killed, or the disk is full.
            FolderError: The directory of a run is in use, or cannot be written.
        """
        trial_of: dict[Future[None], Trial] = {
            self._executor.submit(_run_trial, each, engine_options): each for each in trials
        }
        while trial_of:
            for future in wait(trial_of, return_when=FIRST_COMPLETED).done:
                trial = trial_of.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    raise TryAgainError(
                        "a worker process of the comparison was killed",
                        why="often because memory ran out",
                        fix="repeat the same command: finished runs are kept, and the others resume; "
                        "use a smaller --num-processes where memory is short",
                    ) from None
                yield trial
            for future in [each for each, trial in trial_of.items() if skips(trial) and each.cancel()]:
                del trial_of[future]


def threads_per_process(num_processes: int) -> int:
    """Return the number of threads that each of `num_processes` processes of this machine uses."""
    return max(1, torch.get_num_threads() // num_processes)


def _start_worker(places: SimpleQueue[int], num_threads: int) -> None:
    """Prepare a worker process: its threads and accelerator, and an end together with the process that started it."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(num_threads)
    threadpool_limits(num_threads)
    os.environ["LOCAL_RANK"] = str(places.get())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # standard output is the parent's
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent decides
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process at once when the one that started it is gone, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_trial(trial: Trial, engine_options: Mapping[str, Any]) -> None:
    trial.attempt(engine_options, _run_until_terminated)


def _run_until_terminated(engine: Engine) -> None:
    """Run an engine; SIGTERM saves a checkpoint and stops it."""
    signal.signal(signal.SIGTERM, lambda number, frame: engine.stop("SIGTERM", exit_code=128 + number))
    try:
        engine.run()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
