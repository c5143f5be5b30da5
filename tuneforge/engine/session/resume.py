"""What a run must remember to go on after a kill, to the bit; and how it is put back."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.build import Parts
from tuneforge.engine.loop.head_fit import Snapshot, snapshot
from tuneforge.engine.loop.train_phase import Progress
from tuneforge.engine.model import fsdp as shards
from tuneforge.engine.model.freezing import put_back, whole_state
from tuneforge.engine.session.run_log import SAME_BITS, describe_environment
from tuneforge.engine.storage import checkpoint
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage import run_dir as folder
from tuneforge.engine.storage.checkpoint import Checkpoints
from tuneforge.engine.storage.run_dir import RunFolder
from tuneforge.errors import FolderError, StoppedError, UsageError
from tuneforge.plugin.results import Answer, Brief
from tuneforge.plugin.serialization import from_json, to_json
from tuneforge.plugin.steps import Step

BRIEF = "brief.json"
_GROWING = (folder.STEPS, folder.METRICS, folder.TIMINGS)
"""Files that a run adds lines to: cut back to where the checkpoint was, so that each line is there once."""


@attrs.define(eq=False)
class Memory:
    """The conversation so far, beside the run itself.

    Args:
        run: Whose weights, counters and components are remembered with it.
        place: The run's folder.
        checkpoints: Where it is saved.
        stopping: Gives the error to stop with once the run has been asked to stop, else None.
        parts: Knows the optimizer in use.
        brief: What the strategy was told; told again when it is replayed.
        snapshots: Weights at the start and after each step, for `Blend`.
        done: Steps with their answers.
        phase: What the checkpoint knew of the phase in which it was taken, until that phase goes on.
    """

    run: Run
    place: RunFolder
    checkpoints: Checkpoints
    stopping: Callable[[], StoppedError | None]
    parts: Parts
    brief: Brief | None = None
    snapshots: dict[str, Snapshot] = attrs.field(factory=dict)
    done: list[tuple[Step, Answer]] = attrs.field(factory=list)
    phase: dict[str, Any] | None = None

    def begin(self, brief: Brief) -> None:
        """Start a conversation from its first word."""
        self.brief = brief
        self.snapshots = {"start": snapshot(self.run, None)}
        self.place.write_text(BRIEF, to_json(brief))

    def finish(self, step: Step, answer: Answer) -> None:
        """Take in a step that is done."""
        self.snapshots[step.name] = snapshot(self.run, list(self.snapshots.values())[-1])
        self.done.append((step, answer))
        faults.point("phase-trained")
        self.place.append(folder.STEPS, f'{{"step": {to_json(step)}, "answer": {to_json(answer)}}}')
        faults.point("phase-logged")
        self.save(None)
        faults.point("phase-saved")

    def save(self, progress: Progress | None) -> None:
        """Save a checkpoint where one is due or the run has been asked to stop; then stop.

        Raises:
            StoppedError: The run has been asked to stop.
        """
        ranks = self.run.ranks
        asked = self.stopping()
        step, beside = self.run.step, (self.run.epoch, len(self.done))
        stopped, due = ranks.agree(asked is not None, ranks.leads and self.checkpoints.due(step, beside=beside))
        if stopped or due:
            state = self._state(progress)
            if self.run.sharded:
                state = shards.gathered(state, keep=ranks.leads)
            if ranks.leads:
                best = progress is not None and progress.best
                self.checkpoints.save(step, state, beside=beside, best=best)
        if stopped:
            ranks.wait()
            how = f"go on with: tuneforge resume {shlex.quote(str(self.place.path))}"
            asked = asked or StoppedError("stopped with another rank", exit_code=143)
            raise StoppedError(asked.what, exit_code=asked.exit_code, fix=how)

    def replayed(self, number: int, step: Step) -> Answer:
        """The answer that step `number` got before.

        Raises:
            UsageError: The strategy asks for something else than it did: its code or options have changed.
        """
        before, answer = self.done[number]
        if to_json(attrs.evolve(before, why="")) != to_json(attrs.evolve(step, why="")):  # a reason may be reworded
            raise UsageError(
                f"step {number + 1} of the strategy is not what it was",
                where=f"then: {before}",
                why=f"now: {step}",
                fix="restore the strategy's code, or start a new run",
            )
        return answer

    def recall(self, state: dict[str, Any]) -> None:
        """Put a checkpoint's state back into the run, and cut the growing files to where they were."""
        run = self.run
        self.place.cut(state["offsets"])
        run.ranks.wait()  # for the files to be cut, before the others read them
        if run.sharded:
            state = shards.scattered(state, run.model.parameters(), run.device.torch)
        put_back(run.model.module, state["model"])
        run.optimization.pending = state["optimizer"]
        self.parts.present = state["optimizer_part"]
        run.states, run.history = state["components"], state["history"]
        run.step, run.epoch, run.micro_batch = state["step"], state["epoch"], state["micro_batch"]
        run.eval_batch = state["eval_batch"]
        run.budget.before_s = max(run.budget.before_s, state["spent_s"])
        torch.set_rng_state(state["random"].cpu())
        self.snapshots, self.phase = state["snapshots"], state["phase"]
        self.brief = from_json((self.place.path / BRIEF).read_text(encoding="utf-8"))
        for line in folder.read_lines(self.place.path / folder.STEPS):
            pair = [from_json(json.dumps(line[key])) for key in ("step", "answer")]
            self.done.append((pair[0], pair[1]))
        self.checkpoints.last = (run.step, run.epoch, len(self.done))

    def story(self, name: str) -> str:
        """Where the run goes on from checkpoint `name`; a phase under way says the rest itself."""
        where = f"in step {len(self.done) + 1}" if self.phase else f"after {len(self.done)} step(s)"
        return f"resumed from checkpoint '{name}': {where} of the strategy, {self.run.step} optimizer step(s) taken"

    def _state(self, progress: Progress | None) -> dict[str, Any]:
        run = self.run
        return {
            "model": whole_state(run.model.module),
            "optimizer": run.optimization.state(run.model),
            "optimizer_part": self.parts.present,
            "components": run.states,
            "history": run.history,
            "step": run.step,
            "micro_batch": run.micro_batch,
            "eval_batch": run.eval_batch,
            "epoch": run.epoch,
            "spent_s": run.budget.seconds(),
            "random": torch.get_rng_state(),
            "snapshots": self.snapshots,
            "phase": None if progress is None else progress.state(run),
            "offsets": self.place.offsets(_GROWING),
        }


def found(run: Run, path: Path) -> tuple[str, dict[str, Any] | None]:
    """The newest checkpoint in a run's folder that is whole: its name and state, or None where the run begins again.

    What was skipped, and what could change the bits, is said.
    """
    newest, state, passed_over = checkpoint.newest(path, torch.device("cpu") if run.sharded else run.device.torch)
    run.ranks.wait()  # for all to have read it, before rank 0 saves another and deletes it
    for why in passed_over:
        run.note(f"skipped {why}")
    if newest is None:
        run.note("there is no whole checkpoint, so the run begins again")
    before, now = folder.read_json(path / folder.RUN)["environment"], describe_environment(run)
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in SAME_BITS if before.get(key) != now[key]]
    if changed:
        run.note(f"note: not to the bit, because the machine has changed: {', '.join(changed)}")
    return ("", None) if newest is None else (newest.name, state)


def resumable(runs: Path) -> list[Path]:
    """Folders under `runs` of runs that are neither done nor running now, the newest last."""
    paths = [path for path in runs.glob("*") if (path / folder.RUN).exists() and _waits(path)]
    return sorted(paths, key=lambda path: (path / folder.STATUS).stat().st_mtime)


def _waits(path: Path) -> bool:
    try:
        if folder.read_json(path / folder.STATUS)["state"] == "done":
            return False
        with RunFolder(path, resume=True):
            return True
    except FolderError:  # in use, or half a folder
        return False
