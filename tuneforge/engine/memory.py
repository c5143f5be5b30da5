"""What a run must remember to go on after a kill, to the bit; and how it is put back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from tuneforge.engine import checkpoint, faults, folder
from tuneforge.engine.checkpoint import Checkpoints
from tuneforge.engine.folder import RunFolder
from tuneforge.engine.freezing import put_back, whole_state
from tuneforge.engine.parts import Parts
from tuneforge.engine.phase import Progress
from tuneforge.engine.run import Run
from tuneforge.engine.solve import Snapshot, snapshot
from tuneforge.errors import StoppedError, UsageError
from tuneforge.plugin.steps import Answer, Brief, Step, from_json, to_json

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
        folder.write_whole(self.place.path / BRIEF, to_json(brief))

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
        stopped = self.stopping()
        if stopped is not None or self.checkpoints.due:
            self.checkpoints.save(self.run.step, self._state(progress))
        if stopped is not None:
            raise stopped

    def replayed(self, number: int, step: Step) -> Answer:
        """The answer that step `number` got before.

        Raises:
            UsageError: The strategy asks for something else than it did: its code or options have changed.
        """
        before, answer = self.done[number]
        if to_json(before) != to_json(step):
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
        put_back(run.model.module, state["model"])
        run.optimization.pending = state["optimizer"]
        self.parts.present = state["optimizer_part"]
        run.states, run.history = state["components"], state["history"]
        run.step, run.epoch = state["step"], state["epoch"]
        torch.set_rng_state(state["random"].cpu())
        self.snapshots, self.phase = state["snapshots"], state["phase"]
        self.brief = from_json((self.place.path / BRIEF).read_text(encoding="utf-8"))
        for line in folder.read_lines(self.place.path / folder.STEPS):
            pair = [from_json(json.dumps(line[key])) for key in ("step", "answer")]
            self.done.append((pair[0], pair[1]))

    def story(self) -> Iterator[str]:
        """Where the run goes on."""
        run = self.run
        batch = self.phase["batch"] if self.phase else 0
        where = f"in step {len(self.done) + 1} of the strategy, " if self.phase else f"after {len(self.done)} steps, "
        yield f"goes on {where}optimizer step {run.step}, epoch {run.epoch + 1}, batch {batch + 1}"

    def _state(self, progress: Progress | None) -> dict[str, Any]:
        run = self.run
        return {
            "model": whole_state(run.model.module),
            "optimizer": run.optimization.state(run.model),
            "optimizer_part": self.parts.present,
            "components": run.states,
            "history": run.history,
            "step": run.step,
            "epoch": run.epoch,
            "random": torch.get_rng_state(),
            "snapshots": self.snapshots,
            "phase": None if progress is None else progress.state(run),
            "offsets": self.place.offsets(_GROWING),
        }


def found(path: Path, device: torch.device) -> tuple[dict[str, Any] | None, list[str]]:
    """The state to go on from, or None to begin again; and what to say about checkpoints that were passed over."""
    newest, state, passed_over = checkpoint.newest(path, device)
    return (state if newest is not None else None), passed_over


def resumable(runs: Path) -> list[Path]:
    """Folders under `runs` that hold a run that is not done, the newest last."""
    paths = [path for path in runs.glob("*") if (path / folder.RUN).exists() and (path / folder.STATUS).exists()]
    open_runs = [path for path in paths if folder.read_json(path / folder.STATUS)["state"] != "done"]
    return sorted(open_runs, key=lambda path: (path / folder.STATUS).stat().st_mtime)
