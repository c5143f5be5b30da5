"""Runs of a library, each in a process of its own that may be killed, and the comparison of resumed runs.

A process is forked from one that has only imported the library, so that a run costs no imports.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from world import STEPS, STEPS_AN_EPOCH, Job, Kill, Tool, Witness, digest, network, seeded, sizes

HANGS_S = 120


@dataclass
class Process:
    """One finished process of a run.

    Args:
        signal: The signal that killed it; 0: it exited.
        error: The exception it raised, on one line; empty: none.
        ended: Digests of weights and optimizer, the log, and the time of saves; empty if it did not finish.
        seen: Samples of each training step.
        said: Its output.
    """

    signal: int
    error: str
    ended: dict[str, Any]
    seen: list[list[int]]
    said: str


@dataclass
class Trial:
    """A folder in which one run is started, killed and resumed.

    Args:
        tool: The library.
        job: The training job.
        place: Gets `run`, which the library writes into, and `tmp`, the temporary folder of its processes.
    """

    tool: Tool
    job: Job
    place: Path
    started: int = 0

    @property
    def folder(self) -> Path:
        """Return the folder that the library writes into."""
        return self.place / "run"

    def go(self, *, resume: bool = False, **witness: Any) -> Process:
        """Start or resume the run, and wait for the process."""
        return self.wait(self.begin(resume=resume, **witness))

    def begin(self, *, resume: bool = False, **witness: Any) -> tuple[int, int]:
        """Start the process; return its id and its number."""
        number = self.started
        self.started += 1
        child = os.fork()
        if child == 0:
            self._child(number, resume, witness)
        return child, number

    def wait(self, begun: tuple[int, int]) -> Process:
        """Wait for the process."""
        child, number = begun
        _, status = os.waitpid(child, 0)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        error = "hangs" if killed == signal.SIGALRM else _text(self.place / f"error-{number}.txt")
        if killed not in (0, signal.SIGKILL, signal.SIGXFSZ, signal.SIGALRM):
            error = f"ends with signal {killed}"
        ended = json.loads(_text(self.place / f"ended-{number}.json") or "{}")
        seen = [json.loads(line) for line in _text(self.place / f"seen-{number}.txt").splitlines()]
        return Process(killed, error, ended, seen, _text(self.place / f"said-{number}.txt"))

    def _child(self, number: int, resume: bool, witness: dict[str, Any]) -> None:
        """Run in the forked process; never returns."""
        code = 1
        try:
            signal.alarm(HANGS_S)
            said = os.open(self.place / f"said-{number}.txt", os.O_CREAT | os.O_WRONLY)
            os.dup2(said, 1)
            os.dup2(said, 2)
            self.folder.mkdir(exist_ok=True)
            (self.place / "tmp").mkdir(exist_ok=True)
            tempfile.tempdir = os.environ["TMPDIR"] = str(self.place / "tmp")
            seeded()
            net = network()
            watcher = Witness(net, self.folder, self.place / f"seen-{number}.txt", **witness)
            watcher.watch()
            ended = self.tool.fit(net, self.folder, self.job, resume=resume)
            found = {
                "weights": digest(net.state_dict()), "optimizer": digest(ended.optimizer), "log": ended.log,
                "largest": watcher.largest, "operations": watcher.counted, "gaps": watcher.gaps,
                "rests": watcher.rests,
            }  # fmt: skip
            (self.place / f"ended-{number}.json").write_text(json.dumps(found))
            (self.place / "modules.json").write_text(json.dumps(sorted(sys.modules)))
            code = 0
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told
            traceback.print_exc()
            line = " ".join(str(error).split())
            (self.place / f"error-{number}.txt").write_text(f"{type(error).__name__}: {line}")
        finally:
            os._exit(code)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@contextlib.contextmanager
def begun(tool: Tool, job: Job) -> Iterator[Trial]:
    """Yield a trial in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        yield Trial(tool, job, Path(place))


def ready(tool: Tool) -> None:
    """Import whatever a run of the library imports, before processes are forked."""
    with begun(tool, Job()) as trial:
        trial.go()
        for name in json.loads(_text(trial.place / "modules.json") or "[]"):
            if name not in sys.modules and not name.startswith("__"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)


@dataclass(frozen=True)
class Whole:
    """The uninterrupted run.

    Args:
        ended: As in `Process`.
        seen: As in `Process`.
        files: Names of all files at the end, below the library's folder and below the temporary one.
        again: Whether a second run was bit-identical, as far as `Process.ended` and `seen` show.
    """

    ended: dict[str, Any]
    seen: list[list[int]]
    files: set[str]
    again: bool

    def operations(self, step: int) -> int:
        """Return the file operations of the save after a step."""
        return int(self.ended["operations"].get(str(step), 0))


def whole(tool: Tool, job: Job) -> Whole:
    """Run it twice without interruption.

    Raises:
        RuntimeError: It does not finish, or not after the expected number of steps.
    """
    ready(tool)
    runs = []
    for _ in range(2):
        with begun(tool, job) as trial:
            process = trial.go()
            if not process.ended or len(process.seen) != STEPS:
                raise RuntimeError(f"{tool.name} ends after {len(process.seen)} steps: {process.error}\n{process.said}")
            runs.append((process, {name for name, _ in sizes(trial.place) if name.startswith(("run", "tmp"))}))
    (one, files), (two, _) = runs
    facts = ("weights", "optimizer", "log")
    again = one.seen == two.seen and all(one.ended[fact] == two.ended[fact] for fact in facts)
    return Whole(one.ended, one.seen, files, again)


@dataclass(frozen=True)
class Outcome:
    """A run that was killed and resumed, compared with the uninterrupted one.

    Args:
        kill: Where it was killed.
        error: The exception of the resume; empty: none.
        start: The step from which the resume continued; -1 if it did not finish.
        weights: Whether they are bit-identical.
        optimizer: Whether its state is bit-identical.
        log: Whether each step, or epoch, is recorded once; None if the library keeps no record.
        once: Whether every sample comes once per epoch.
        order: Whether the same samples come in the same order.
        litter: Files that the uninterrupted run does not leave.
        helped: If the resume failed: the outcome after deleting the newest checkpoint by hand.
    """

    kill: Kill
    error: str
    start: int
    weights: bool
    optimizer: bool
    log: bool | None
    once: bool
    order: bool
    litter: tuple[str, ...]
    helped: "Outcome | None" = None


def interrupted(tool: Tool, job: Job, kill: Kill, expected: Whole) -> Outcome:
    """Kill the run, resume it, and compare.

    Raises:
        RuntimeError: It was not killed.
    """
    with begun(tool, job) as trial:
        first = killed(trial, kill, expected)
        outcome = compared(trial, kill, first, trial.go(resume=True), expected)
        if not outcome.error:
            return outcome
        if (newest := tool.newest(trial.folder)) is None:
            return outcome
        shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
        helped = compared(trial, kill, first, trial.go(resume=True), expected)
        return dataclasses.replace(outcome, helped=helped)


def killed(trial: Trial, kill: Kill, expected: Whole) -> Process:
    """Return the process that was killed."""
    kill = kill.at_save((trial.job.interval or 1) if trial.tool.each_step else STEPS_AN_EPOCH)
    operations = expected.operations(kill.step)
    first = trial.go(kill=kill, largest=expected.ended["largest"], operations=operations)
    if not first.signal:
        raise RuntimeError(f"{trial.tool.name} was not killed at {kill}: {first.error}\n{first.said}")
    return first


def compared(trial: Trial, kill: Kill, first: Process, last: Process, expected: Whole) -> Outcome:
    """Return the outcome of a trial."""
    if not last.ended:
        return Outcome(kill, last.error or "killed", -1, False, False, None, False, False, ())
    start = STEPS - len(last.seen)
    steps = first.seen[: max(0, start)] + last.seen
    epochs = [steps[at : at + STEPS_AN_EPOCH] for at in range(0, STEPS, STEPS_AN_EPOCH)]
    everything = list(range(STEPS_AN_EPOCH * len(expected.seen[0])))
    once = len(steps) == STEPS and all(sorted(itertools.chain(*epoch)) == everything for epoch in epochs)
    left = {name for name, _ in sizes(trial.place) if name.startswith(("run", "tmp"))}
    left = {name for name in left if not name.startswith(trial.tool.records or "none")}
    log = None if last.ended["log"] is None else last.ended["log"] == expected.ended["log"]
    return Outcome(
        kill, "", start, last.ended["weights"] == expected.ended["weights"],
        last.ended["optimizer"] == expected.ended["optimizer"], log, once, steps == expected.seen,
        tuple(sorted(left - expected.files)),
    )  # fmt: skip


torch.set_num_threads(1)
