"""A kill at any point of a run, without a process to kill; and a strategy that uses every kind of step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tuneforge as tf
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.plugin import StrategySteps

COMPARED = ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json", "model.json", "hardest_samples.json")
"""Files that are the same bytes in a run that was killed and resumed as in one that was not."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing cleans up."""


class Noisy:
    """A loss that moves with each sample's own numbers, and a count in the component's state."""

    @tf.hookimpl(wrapper=True)
    def train_step(self, run: tf.Run, batch: tf.Batch) -> Any:
        state = run.state(self)
        state["steps"] = state.get("steps", 0) + 1
        result = yield
        return result[0] * (1 + 0.1 * float(batch.rng.uniform("noise").mean()) + 1e-3 * state["steps"]), result[1]


def every_step(task: tf.TaskInfo, *, epochs: tuple[int, int] = (2, 2)) -> StrategySteps:
    """All kinds of step, one decided from a report; `epochs` of the first two phases."""
    report = yield tf.Phase("head", train="head", epochs=epochs[0], lr=0.02, schedule="cosine")
    yield tf.HeadFit("fit", l2=0.1)
    yield tf.Diagnosis("look", batches=1)
    lr = 0.01 if report.val["accuracy"] > 0.1 else 0.02
    momentum = tf.use("sgd", momentum=0.9)
    yield tf.Phase("top", train="groups[-2:]", epochs=epochs[1], lr=lr, optimizer=momentum, restore_best=True)
    yield tf.Phase(
        "all", epochs=2, lr=0.005, optimizer="adamw", schedule="one-cycle", patience=1, class_weights="balanced"
    )
    yield tf.WeightAverage("mix", snapshots=["start", "all"], weights=[0.5, 1.0])


def killed(action: Callable[[], object], number: int, *, only: str = "") -> list[str]:
    """Kill it at the `number`-th point that it passes, or at the `number`-th of one name; the points it passed."""
    passed: list[str] = []

    def hook(name: str) -> None:
        if only in ("", name):
            passed.append(name)
            if len(passed) == number:
                raise Killed(name)

    faults.hook = hook
    try:
        action()
    except Killed:
        pass
    finally:
        faults.hook = None
    return passed


def contents(path: Path, names: tuple[str, ...] = COMPARED) -> dict[str, bytes]:
    """The bytes of a run's files."""
    return {name: (path / name).read_bytes() for name in names}
