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
from tuneforge.exporting.reference_outputs import Evidence
from tuneforge.ship.champion.gate import Rules
from tuneforge.ship.champion.statistics import fewest_pairs
from tuneforge.ship.champion.store import Store
from tuneforge.ship.circle.records import Records
from tuneforge.ship.circle.retune import TURN, Turn
from tuneforge.ship.circle.watch import watched

PICTURE = "circle.png"
_WINDOW = 50  # labelled answers that a point of the curve is the mean of
_FEWEST = 10
_SWAPS = ("promoted", "rolled back")


@attrs.frozen
class Triggers:
    """What begins a turn, and what holds it off.

    Args:
        labels: New labels since the last turn that begin one; None: any number does not.
        drift: Whether drift of confidence or inputs begins one.
        accuracy: On labelled answers of the champion; a turn begins where the upper end of its interval is under it.
        fewest: New labels since the last turn without which nothing begins one, so that the same labels are not tuned
            on twice.
        hold_off_s: Least seconds between the ends of two turns, so that it cannot run wild.
    """

    labels: int | None = 100
    drift: bool = False
    accuracy: float | None = None
    fewest: int = 20
    hold_off_s: float = 600.0


def reason_to_turn(store: Store, records: Records, triggers: Triggers, *, now: float | None = None) -> str | None:
    """Why a turn ought to begin now, in one sentence; None where it ought not to."""
    last = last_turn(store)
    new = records.num_labels() - (0 if last is None else int(last["labels"]))
    waited_s = float("inf") if last is None else (time.time() if now is None else now) - _seconds(last["time"])
    if store.champion is None or new < triggers.fewest or waited_s < triggers.hold_off_s:
        return None
    if records.counts().held_out < fewest_pairs(Rules().alpha):
        return None  # the gate could not see a difference
    if triggers.labels is not None and new >= triggers.labels:
        return f"{new} new labels"
    if triggers.accuracy is None and not triggers.drift:
        return None
    seen = watched(records, Evidence.read(store.folder()), version=str(store.champion))
    if triggers.accuracy is not None and seen.accuracy.total and seen.accuracy.high < triggers.accuracy:
        return f"accuracy {seen.accuracy.share:.3f} on {seen.accuracy.total} labels, under {triggers.accuracy:g}"
    if triggers.drift and seen.drifted:
        moved = [
            name for name, drift in (("confidence", seen.confidence), ("inputs", seen.inputs)) if drift and drift.found
        ]
        return f"drift of {' and '.join(moved)}"
    return None


def turns(
    store: Store,
    records: Records,
    triggers: Triggers,
    turn: Callable[[], Turn],
    *,
    every_s: float,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Turn]:
    """Turns as their triggers begin them, for ever; one that fails is said and logged, and held off like any other.

    Args:
        store: Of the model.
        records: Of the server.
        triggers: What begins a turn.
        turn: Does one.
        every_s: Seconds between two looks.
        say: Where sentences for the user go.
        sleep: Waits so long.
    """
    while True:
        reason = reason_to_turn(store, records, triggers)
        if reason is not None:
            say(f"a turn begins: {reason}")
            try:
                yield turn()
            except TuneforgeError as error:
                say(f"the turn failed: {error}")
                store.note(TURN, labels=records.num_labels(), promoted=None, reason=str(error), failed=True)
        sleep(every_s)


def last_turn(store: Store) -> dict[str, Any] | None:
    """The log's line of the newest turn."""
    return next((line for line in reversed(store.log()) if line["event"] == TURN), None)


def picture(store: Store, records: Records) -> Path:
    """Draw accuracy over time with the swaps marked; of labelled requests, in the order in which they were answered.

    Returns:
        The PNG, in the folder of the model's name.
    """
    from matplotlib.figure import Figure

    answered = records.over_time()
    marks = [(_seconds(line["time"]), line) for line in store.log() if line["event"] in (*_SWAPS, "refused")]
    start = min([at for at, _, _ in answered] + [at for at, _ in marks], default=0.0)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    hours = [(at - start) / 3600 for at, _, _ in answered]
    axes.plot(hours, _rolling([right for _, right, _ in answered]), color="#2f6fc4")
    for at, line in marks:
        place = (at - start) / 3600
        swap = line["event"] in _SWAPS
        axes.axvline(place, color="#2a9d4a" if swap else "#c0392b", linestyle="-" if swap else ":")
        if swap:
            axes.annotate(f"{line['version']}", (place, 1.01), xycoords=("data", "axes fraction"), ha="center")
    axes.set(
        ylim=(0, 1.02),
        xlabel="hours; a line where a version took over, dotted where the gate refused",
        ylabel=f"accuracy, last {_WINDOW} labelled",
    )
    axes.set_title(store.name, loc="left", pad=14)
    path = store.path / PICTURE
    figure.savefig(path, format="png")
    return path


def _rolling(right: list[bool]) -> list[float]:
    """The mean of the last `_WINDOW`, from the tenth on."""
    sums = np.concatenate([[0.0], np.cumsum(right)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - _WINDOW, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [float("nan") if place < min(_FEWEST, len(means)) - 1 else float(each) for place, each in enumerate(means)]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
