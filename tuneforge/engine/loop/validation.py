"""Steps that decide by validation metrics need a validation split."""

from __future__ import annotations

from tuneforge.engine.context.run import Run
from tuneforge.errors import DataError
from tuneforge.plugin.steps import Diagnosis, Phase, StrategyStep, WeightAverage


def check_validation(run: Run, step: StrategyStep) -> None:
    """Check that a step decides nothing by a validation split that is empty.

    Raises:
        DataError: It does.
    """
    if len(run.data.val):
        return
    needs = ""
    if isinstance(step, Phase):
        chosen = {"patience": step.patience, "restore_best": step.restore_best or None, "monitor": step.monitor}
        needs = ", ".join(name for name, value in chosen.items() if value is not None)
    elif isinstance(step, WeightAverage) and len(step.snapshots) == 2 and len(step.weights) > 1:
        needs = "a choice among several weights"
    elif isinstance(step, Diagnosis) and step.measure == "features":
        needs = "a measure of the validation split"
    if needs:
        raise DataError(
            f"step '{step.name}' needs a validation split, and it is empty",
            why=f"it asks for {needs}",
            fix="give data with a validation split (such as --data.val 0.15), or a step that decides nothing",
        )
