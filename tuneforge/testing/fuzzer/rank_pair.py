"""Two ranks that run a program together, as processes of their own, and a kill of one of them.

A process is forked from a server that has torch loaded, because the import takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import distributed

from tuneforge.testing.fuzzer.program import FuzzProgram
from tuneforge.testing.fuzzer.runs import PointTrigger, ProgramRuns, RunError, RunResults

WORLD_SIZE = 2
TIMEOUT_S = 120.0


@attrs.frozen
class RankPair:
    """Runs a program on two ranks.

    Args:
        program: The program.
        directory: Where its runs are written.
    """

    program: FuzzProgram
    directory: Path

    def run(self, name: str) -> list[RunResults]:
        """Run the program on two ranks, and return the results of each."""
        return self._launch(name, None, resume=False)

    def run_with_kill(self, name: str, undisturbed: RunResults) -> RunResults:
        """Run the program, kill one rank at the program's position and then the other, and resume on two ranks.

        Args:
            name: The name of the run directory.
            undisturbed: The run of the program without a kill.
        """
        self._launch(name, undisturbed, resume=False)
        return self._launch(name, None, resume=True)[0]

    def _launch(self, name: str, kill: RunResults | None, *, resume: bool) -> list[RunResults]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        store = self.directory / f"rendezvous-{name}-{resume}"
        pipes = [context.Pipe(duplex=False) for _ in range(WORLD_SIZE)]
        points = None if kill is None else kill.points
        processes = [
            context.Process(
                target=_run_rank, args=(rank, pipes[rank][1], self.program, self.directory, name, store, points, resume)
            )
            for rank in range(WORLD_SIZE)
        ]
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        results = _receive([receiver for receiver, _ in pipes])
        for process in processes:  # a rank without the other waits for it, as one that torchrun would end
            if None in results:
                process.kill()
            process.join()
            process.close()
        if kill is None and None in results:
            missing = RunError("a rank ended without a result, or not within its time", False, False)
            return [RunResults(missing, {}, {}, (), (), weights_changed=False, points=())] * WORLD_SIZE
        return [each for each in results if each is not None]


def _receive(receivers: Sequence[Any]) -> list[RunResults | None]:
    """Return what each rank sends; None for all as soon as one ends without."""
    results: dict[Any, RunResults] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while len(results) < len(receivers):
        ready = connection.wait([each for each in receivers if each not in results], deadline - time.monotonic())
        try:
            for each in ready:
                receiver: Any = each
                results[each] = _unpack(receiver.recv())
        except EOFError:
            break
        if not ready:
            break
    return [results.get(each) for each in receivers] if len(results) == len(receivers) else [None] * len(receivers)


def _run_rank(
    rank: int, sender: Any, program: FuzzProgram, directory: Path, name: str, store: Path,
    points: tuple[str, ...] | None, resume: bool,
) -> None:  # fmt: skip
    """Be one rank: run or resume, and send the results; kill itself where the program says so."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )
    runs = ProgramRuns(program, directory, draws=False)
    trigger: Any = lambda point: None  # noqa: E731
    if points is not None and rank == program.seed % WORLD_SIZE:
        trigger = PointTrigger(program.position, points, lambda: os.kill(os.getpid(), signal.SIGKILL))
    warnings.simplefilter("ignore")  # of torch, about what random networks do
    results = runs.resume(name) if resume else runs.run(name, at_point=trigger)
    sender.send(_pack(results))
    distributed.destroy_process_group()


def _pack(results: RunResults) -> RunResults:
    """Return results that go to another process by value."""
    exact = {name: each.float() if each.dtype == torch.bfloat16 else each for name, each in results.tensors.items()}
    arrays: Any = {name: each.numpy() for name, each in exact.items()}
    return attrs.evolve(results, tensors=arrays)


def _unpack(results: RunResults) -> RunResults:
    arrays: Any = results.tensors
    return attrs.evolve(results, tensors={name: torch.from_numpy(each) for name, each in arrays.items()})
