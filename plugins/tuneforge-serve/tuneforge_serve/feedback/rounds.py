"""Continuous training: the triggers of retraining rounds, and a plot of the accuracy over time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from tuneforge.errors import TuneforgeError
from tuneforge.exporting import ReferenceData
from tuneforge_serve.feedback.monitoring import monitor_version
from tuneforge_serve.feedback.request_log import RequestLog
from tuneforge_serve.feedback.retraining import ROUND, RetrainingRound
from tuneforge_serve.registry.gate import GateRules
from tuneforge_serve.registry.model_registry import ModelRegistry
from tuneforge_serve.registry.significance import min_num_pairs

PLOT = "accuracy.png"
_WINDOW = 50  # labeled requests that each point of the curve is the mean of
_MIN_POINTS = 10
_CHAMPION_EVENTS = ("promoted", "rolled back")


@attrs.frozen
class RetrainingTriggers:
    """What starts a retraining round, and what every round requires.

    Args:
        num_labels: Start a round after this many new labels; None disables the trigger.
        drift: Start a round on drift of the confidence or the inputs.
        min_accuracy: Start a round if the upper bound of the champion's accuracy on labeled requests is below this;
            None disables the trigger.
        min_new_labels: The number of new labels that every round requires, so that no round repeats the one before.
        min_interval_s: The minimum time between the ends of two rounds in seconds.
    """

    num_labels: int | None = 100
    drift: bool = False
    min_accuracy: float | None = None
    min_new_labels: int = 20
    min_interval_s: float = 600.0


def check_triggers(
    registry: ModelRegistry, request_log: RequestLog, triggers: RetrainingTriggers, *, now: float | None = None
) -> str | None:
    """Return the reason to start a retraining round now; None if there is none."""
    last_round = find_last_round(registry)
    num_new = request_log.num_labels() - (0 if last_round is None else int(last_round["labels"]))
    waited_s = (
        float("inf")
        if last_round is None
        else (time.time() if now is None else now) - _to_timestamp(last_round["time"])
    )
    if registry.champion is None or num_new < triggers.min_new_labels or waited_s < triggers.min_interval_s:
        return None
    if request_log.stats().num_held_out < min_num_pairs(GateRules().alpha):
        return None  # the gate could not find a significant difference
    if triggers.num_labels is not None and num_new >= triggers.num_labels:
        return f"{num_new} new labels"
    if triggers.min_accuracy is None and not triggers.drift:
        return None
    report = monitor_version(request_log, ReferenceData.read(registry.version_dir()), version=str(registry.champion))
    if triggers.min_accuracy is not None and report.accuracy.total and report.accuracy.high < triggers.min_accuracy:
        accuracy = f"accuracy {report.accuracy.proportion:.3f} on {report.accuracy.total} labels"
        return f"{accuracy}, below {triggers.min_accuracy:g}"
    if triggers.drift and report.has_drift:
        drifted = [
            name
            for name, drift in (("confidence", report.confidence_drift), ("inputs", report.input_drift))
            if drift and drift.is_drift
        ]
        return f"drift of {' and '.join(drifted)}"
    return None


def run_rounds(
    registry: ModelRegistry,
    request_log: RequestLog,
    triggers: RetrainingTriggers,
    run_round: Callable[[], RetrainingRound],
    *,
    poll_interval_s: float,
    log: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[RetrainingRound]:
    """Run retraining rounds forever, each when a trigger starts it.

    A round that fails is logged, and the next one has to wait as long as after a successful round.

    Args:
        registry: The model.
        request_log: The request log of the server.
        triggers: What starts a round.
        run_round: Runs one round.
        poll_interval_s: Seconds between two checks of the triggers.
        log: Called with messages for the user.
        sleep: Waits for a number of seconds.
    """
    while True:
        reason = check_triggers(registry, request_log, triggers)
        if reason is not None:
            log(f"retraining round started: {reason}")
            try:
                yield run_round()
            except TuneforgeError as error:
                log(f"retraining round failed: {error}")
                registry.log_event(
                    ROUND, labels=request_log.num_labels(), promoted=None, reason=str(error), failed=True
                )
        sleep(poll_interval_s)


def find_last_round(registry: ModelRegistry) -> dict[str, Any] | None:
    """Return the last event of a retraining round in the log."""
    return next((event for event in reversed(registry.read_events()) if event["event"] == ROUND), None)


def plot_accuracy(registry: ModelRegistry, request_log: RequestLog) -> Path:
    """Plot the accuracy on labeled requests over time, with a line for each decision of the gate.

    Returns:
        The PNG file, in the directory of the model.
    """
    from matplotlib.figure import Figure

    history = request_log.accuracy_history()
    marks = [
        (_to_timestamp(event["time"]), event)
        for event in registry.read_events()
        if event["event"] in (*_CHAMPION_EVENTS, "refused")
    ]
    start = min([at for at, _, _ in history] + [at for at, _ in marks], default=0.0)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    hours = [(at - start) / 3600 for at, _, _ in history]
    axes.plot(hours, _rolling_mean([is_correct for _, is_correct, _ in history]), color="#2f6fc4")
    for at, event in marks:
        hour = (at - start) / 3600
        is_promotion = event["event"] in _CHAMPION_EVENTS
        axes.axvline(hour, color="#2a9d4a" if is_promotion else "#c0392b", linestyle="-" if is_promotion else ":")
        if is_promotion:
            axes.annotate(f"{event['version']}", (hour, 1.01), xycoords=("data", "axes fraction"), ha="center")
    axes.set(
        ylim=(0, 1.02),
        xlabel="hours (line: a version became the champion, dotted: the gate refused one)",
        ylabel=f"accuracy, last {_WINDOW} labeled requests",
    )
    axes.set_title(registry.name, loc="left", pad=14)
    path = registry.path / PLOT
    figure.savefig(path, format="png")
    return path


def _rolling_mean(correct: list[bool]) -> list[float]:
    """Return the rolling mean over `_WINDOW` requests; NaN for the first ones."""
    sums = np.concatenate([[0.0], np.cumsum(correct)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - _WINDOW, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [
        float("nan") if index < min(_MIN_POINTS, len(means)) - 1 else float(mean) for index, mean in enumerate(means)
    ]


def _to_timestamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
