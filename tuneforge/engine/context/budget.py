"""What a run may spend. Once it is spent, the step is written down, so that a run killed after that stops there too."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.run_dir import STATUS, read_json, write_json
from tuneforge.plugin.config import budget_of

if TYPE_CHECKING:
    from tuneforge.engine.context.run import Run

MARK = "budget.json"


@attrs.define(eq=False)
class Budget:
    """The budget of one run, and its clock. Seconds are those of the strategy's steps, evaluation included.

    Args:
        text: Such as `60s`, `20epochs` or `500steps`; None: no limit.
        folder: The run's, where the mark is written; None where nothing is.
        before_s: Seconds that earlier processes of this run have spent.
        done: Steps of the strategy that are done.
        mark: Optimizer step, and steps of the strategy done, at which it was spent; None while some is left.
    """

    text: str | None = None
    folder: Path | None = None
    before_s: float = 0.0
    done: int = 0
    mark: tuple[int, int] | None = None
    _began_s: float | None = None

    @classmethod
    def found(cls, text: str | None, folder: Path) -> Budget:
        """The budget of a run, with what an earlier process spent of it and the mark that it left, if it did."""
        mark = None
        if text is not None and (folder / MARK).exists():
            read = read_json(folder / MARK)
            mark = (int(read["step"]), int(read["done"]))
        before_s = read_json(folder / STATUS).get("spent_s", 0.0) if (folder / STATUS).exists() else 0.0
        return cls(text, folder, before_s=before_s, mark=mark)

    def start(self) -> None:
        """Start the clock."""
        self._began_s = time.monotonic()

    def seconds(self) -> float:
        """Seconds spent so far, by this process and by those before it."""
        return self.before_s + (0.0 if self._began_s is None else time.monotonic() - self._began_s)

    def spent(self, run: Run) -> str:
        """Look whether it is spent; the first time that it is, write it down.

        Returns:
            Why no further step is taken; empty while some of the budget is left.
        """
        if self.text is None:
            return ""
        if self.mark is None:
            kind, amount = budget_of(self.text)
            over = {"seconds": self.seconds(), "epochs": run.epoch, "steps": run.step}[kind] >= amount
            if run.ranks.decided(over):
                self._write(run)
        return self.reached(run)

    def reached(self, run: Run) -> str:
        """The same without a look at the clock: has the run come to the mark?"""
        if self.mark is None or run.step < self.mark[0] or self.done < self.mark[1]:
            return ""
        return f"budget of {self.text} spent at step {self.mark[0]}"

    def _write(self, run: Run) -> None:
        assert self.folder is not None
        self.mark = (run.step, self.done)
        mark = {"budget": self.text, "step": run.step, "done": self.done, "spent_s": round(self.seconds(), 3)}
        if run.ranks.leads:
            write_json(self.folder / MARK, mark)
        faults.point("budget-marked")
