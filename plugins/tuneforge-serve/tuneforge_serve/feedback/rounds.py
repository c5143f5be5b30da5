"""Turns of the circle one after the other: what begins one, what holds one off, and a picture of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from tuneforge.errors import TuneforgeError
from tuneforge.exporting.reference_outputs import ReferenceData
from tuneforge_serve.feedback.monitoring import monitor_version
from tuneforge_serve.feedback.request_log import RequestLog
from tuneforge_serve.feedback.retraining import ROUND, RetrainingRound
from tuneforge_serve.registry.gate import GateRules
from tuneforge_serve.registry.model_registry import ModelRegistry
from tuneforge_serve.registry.significance import min_num_pairs

PLOT = "accuracy.png"
_WINDOW = 50  # labelled answers that a point of the curve is the mean of
_MIN_POINTS = 10
_CHAMPION_EVENTS = ("promoted", "rolled back")


@attrs.frozen
class RetrainingTriggers:
    """What begins a turn, and what holds it off.

    Args:
        num_labels: New labels since the last turn that begin one; None: any number does not.
        drift: Whether drift of confidence or inputs begins one.
        min_accuracy: On labelled answers of the champion; a turn begins where the upper end of its interval is under
            it.
        min_new_labels: New labels since the last turn without which nothing begins one, so that the same labels are not
            tuned on twice.
        min_interval_s: Least seconds between the ends of two turns, so that it cannot run wild.
    """

    num_labels: int | None = 100
    drift: bool = False
    min_accuracy: float | None = None
    min_new_labels: int = 20
    min_interval_s: float = 600.0


def check_triggers(
    registry: ModelRegistry, request_log: RequestLog, triggers: RetrainingTriggers, *, now: float | None = None
) -> str | None:
    """Why a turn ought to begin now, in one sentence; None where it ought not to."""
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
        return None  # the gate could not see a difference
    if triggers.num_labels is not None and num_new >= triggers.num_labels:
        return f"{num_new} new labels"
    if triggers.min_accuracy is None and not triggers.drift:
        return None
    report = monitor_version(request_log, ReferenceData.read(registry.version_dir()), version=str(registry.champion))
    if triggers.min_accuracy is not None and report.accuracy.total and report.accuracy.high < triggers.min_accuracy:
        accuracy = f"accuracy {report.accuracy.proportion:.3f} on {report.accuracy.total} labels"
        return f"{accuracy}, under {triggers.min_accuracy:g}"
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
    interval_s: float,
    log: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[RetrainingRound]:
    """Turns as their triggers begin them, for ever; one that fails is said and logged, and held off like any other.

    Args:
        registry: Of the model.
        request_log: Of the server.
        triggers: What begins a turn.
        run_round: Does one.
        interval_s: Seconds between two looks.
        log: Where sentences for the user go.
        sleep: Waits so long.
    """
    while True:
        reason = check_triggers(registry, request_log, triggers)
        if reason is not None:
            log(f"a turn begins: {reason}")
            try:
                yield run_round()
            except TuneforgeError as error:
                log(f"the turn failed: {error}")
                registry.log_event(
                    ROUND, labels=request_log.num_labels(), promoted=None, reason=str(error), failed=True
                )
        sleep(interval_s)


def find_last_round(registry: ModelRegistry) -> dict[str, Any] | None:
    """The log's line of the newest turn."""
    return next((event for event in reversed(registry.read_events()) if event["event"] == ROUND), None)


def plot_accuracy(registry: ModelRegistry, request_log: RequestLog) -> Path:
    """Draw accuracy over time with the swaps marked; of labelled requests, in the order in which they were answered.

    Returns:
        The PNG, in the folder of the model's name.
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
        place = (at - start) / 3600
        swap = event["event"] in _CHAMPION_EVENTS
        axes.axvline(place, color="#2a9d4a" if swap else "#c0392b", linestyle="-" if swap else ":")
        if swap:
            axes.annotate(f"{event['version']}", (place, 1.01), xycoords=("data", "axes fraction"), ha="center")
    axes.set(
        ylim=(0, 1.02),
        xlabel="hours; a line where a version took over, dotted where the gate refused",
        ylabel=f"accuracy, last {_WINDOW} labelled",
    )
    axes.set_title(registry.name, loc="left", pad=14)
    path = registry.path / PLOT
    figure.savefig(path, format="png")
    return path


def _rolling_mean(correct: list[bool]) -> list[float]:
    """The mean of the last `_WINDOW`, from the tenth on."""
    sums = np.concatenate([[0.0], np.cumsum(correct)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - _WINDOW, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [
        float("nan") if index < min(_MIN_POINTS, len(means)) - 1 else float(mean) for index, mean in enumerate(means)
    ]


def _to_timestamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
