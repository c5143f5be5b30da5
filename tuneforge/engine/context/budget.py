"""The budget of a run: seconds, epochs or optimizer steps.

When the budget is exhausted, the optimizer step is written to a file, so that a run that is killed after that and
resumed stops at the same step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.atomic import write_json
from tuneforge.engine.storage.run_files import STATUS, read_json
from tuneforge.plugin.config import parse_budget

if TYPE_CHECKING:
    from tuneforge.engine.context.run import Run

BUDGET_FILE = "budget.json"


@attrs.define(eq=False)
class Budget:
    """The budget of one run, and its clock. Seconds count the strategy steps, evaluation included.

    Args:
        text: Such as `60s`, `20epochs` or `500steps`; None for no limit.
        run_dir: The run directory, where exhaustion is recorded; None if nothing is written.
        previous_s: Seconds spent by earlier processes of this run.
        completed_steps: Strategy steps completed so far.
        exhausted_at: Optimizer steps, and completed strategy steps, at which the budget was exhausted; None until then.
    """

    text: str | None = None
    run_dir: Path | None = None
    previous_s: float = 0.0
    completed_steps: int = 0
    exhausted_at: tuple[int, int] | None = None
    _started_s: float | None = None

    @classmethod
    def load(cls, text: str | None, run_dir: Path) -> Budget:
        """Return the budget of a run, with what an earlier process of it has spent and recorded."""
        mark = None
        if text is not None and (run_dir / BUDGET_FILE).exists():
            read = read_json(run_dir / BUDGET_FILE)
            mark = (int(read["step"]), int(read["completed_steps"]))
        previous_s = read_json(run_dir / STATUS).get("elapsed_s", 0.0) if (run_dir / STATUS).exists() else 0.0
        return cls(text, run_dir, previous_s=previous_s, exhausted_at=mark)

    def start(self) -> None:
        """Start the clock."""
        self._started_s = time.monotonic()

    def elapsed_s(self) -> float:
        """Return the seconds spent so far by this process and those before it."""
        return self.previous_s + (0.0 if self._started_s is None else time.monotonic() - self._started_s)

    def check_exhausted(self, run: Run) -> str:
        """Check whether the budget is exhausted; the first time that it is, record it.

        Returns:
            Why no further step is taken; empty while some of the budget is left.
        """
        if self.text is None:
            return ""
        if self.exhausted_at is None:
            kind, amount = parse_budget(self.text)
            over = {"seconds": self.elapsed_s(), "epochs": run.epoch, "steps": run.step}[kind] >= amount
            if run.process_group.broadcast_flag(over):
                self._mark_exhausted(run)
        return self.exhausted_reason(run)

    def exhausted_reason(self, run: Run) -> str:
        """Return the same without looking at the clock: whether the run has reached the recorded step."""
        if self.exhausted_at is None or run.step < self.exhausted_at[0] or self.completed_steps < self.exhausted_at[1]:
            return ""
        return f"budget of {self.text} spent at step {self.exhausted_at[0]}"

    def _mark_exhausted(self, run: Run) -> None:
        assert self.run_dir is not None
        self.exhausted_at = (run.step, self.completed_steps)
        mark = {
            "budget": self.text,
            "step": run.step,
            "completed_steps": self.completed_steps,
            "elapsed_s": round(self.elapsed_s(), 3),
        }
        if run.process_group.is_main:
            write_json(self.run_dir / BUDGET_FILE, mark)
        faults.point("budget-marked")
