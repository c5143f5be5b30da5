"""Who is first and whether that means something: decided on validation alone, from the folders of finished runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tuneforge.comparison.paired_tests import LEVEL, Paired, holm, mean_and_spread, paired
from tuneforge.engine.session.predictor import require_done
from tuneforge.engine.session.resume import BRIEF
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import FolderError, UsageError
from tuneforge.plugin.serialization import from_json

RANKED, DROPPED, FAILED = "ranked", "dropped", "failed"
BETTER, WORSE, SAME = "better", "worse", "no significant difference"


@attrs.frozen(eq=False)
class Finished:
    """What a finished run's folder says to a judge: figures of validation and cost, and nothing of the test split.

    Args:
        folder: Of the run.
        seed: Of the run.
        monitor: The figure that decides.
        mode: `"max"` or `"min"`: whether more of it is better.
        value: That figure on validation, with the weights that the run left; NaN where it is no number.
        epochs: Passes over the training split.
        steps: Optimizer steps.
        seconds: What tuning took, evaluation included.
        by_budget: Its budget stopped it.
        prints: Fingerprint of each split.
    """

    folder: Path
    seed: int
    monitor: str
    mode: str
    value: float
    epochs: int
    steps: int
    seconds: float
    by_budget: bool
    prints: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Finished:
        """Read it.

        Raises:
            FolderError: The folder holds no finished run, or one without a figure to judge it by.
        """
        require_done(path)
        report, status = names.read_json(path / names.REPORT), names.read_json(path / names.STATUS)
        monitor, val = report["monitor"], report["splits"]["val"]
        if monitor not in val:
            raise FolderError(
                f"'{path}' has no figure '{monitor}' of validation", where=names.REPORT, fix="leave this run out"
            )
        epochs = list(names.read_lines(path / names.METRICS))
        seconds = status.get("spent_s") or sum(line["seconds"] for line in names.read_lines(path / names.TIMINGS))
        return cls(
            folder=path,
            seed=int(names.read_json(path / names.RUN)["config"].get("seed", 0)),
            monitor=monitor,
            mode=from_json(json.dumps(names.read_json(path / BRIEF))).monitor_mode,
            value=math.nan if val[monitor] is None else float(val[monitor]),
            epochs=len(epochs),
            steps=int(epochs[-1]["step"]) if epochs else 0,
            seconds=float(seconds),
            by_budget="stopped_by_budget" in report,
            prints=names.read_json(path / names.MODEL)["fingerprints"],
        )

    @property
    def unit(self) -> tuple[int, str]:
        """What two runs must share to be a pair: the seed and the validation samples."""
        return self.seed, self.prints["val"]


@attrs.frozen(eq=False)
class Row:
    """An entrant with its runs.

    Args:
        name: Of the entrant.
        runs: Finished ones, one a seed, all at the same budget.
        budget: Of each; None: each ran to its own end.
        rung: The rung of a halving in which they ran; 1 without one.
        state: `RANKED`, `DROPPED` or `FAILED`.
        reason: Why it is not ranked.
        spent_s: Seconds of all its runs, earlier rungs included.
    """

    name: str
    runs: tuple[Finished, ...]
    budget: str | None = None
    rung: int = 1
    state: str = RANKED
    reason: str = ""
    spent_s: float = 0.0

    @property
    def values(self) -> list[float]:
        """The figure that decides, of each run."""
        return [run.value for run in self.runs]

    @property
    def mean(self) -> float:
        """Of the figure; NaN without a run."""
        return mean_and_spread(self.values)[0] if self.runs else math.nan

    @property
    def sd(self) -> float | None:
        """Of the figure over seeds; None for fewer than two."""
        return mean_and_spread(self.values)[1] if self.runs else None

    def average(self, cost: str) -> float:
        """The mean of `epochs`, `steps` or `seconds` of its runs."""
        return mean_and_spread([float(getattr(run, cost)) for run in self.runs])[0] if self.runs else math.nan


@attrs.frozen(eq=False)
class Standings:
    """The decision.

    Args:
        rows: The best first; then those dropped, the last one first; then those that failed.
        monitor: The figure that decided.
        mode: Whether more of it is better.
        baseline: The entrant that the others are compared with.
        comparisons: For how many the p values are corrected.
        differences: Of each ranked entrant to the baseline, by name; none where there is nothing to compare.
        corrected: P after Holm's correction, by name; None without a test.
    """

    rows: tuple[Row, ...]
    monitor: str
    mode: str
    baseline: str
    comparisons: int
    differences: Mapping[str, Paired]
    corrected: Mapping[str, float | None]

    @property
    def winner(self) -> Row:
        """The entrant with the best mean, which need not be significantly better than any other."""
        return self.rows[0]

    @property
    def ranked(self) -> list[Row]:
        """Those that came through."""
        return [row for row in self.rows if row.state == RANKED]

    def verdict(self, row: Row) -> str:
        """What can be said of an entrant beside the baseline, in a few words."""
        if row.state != RANKED:
            return f"{row.state}: {row.reason}" if row.reason else row.state
        if row.name == self.baseline:
            return "baseline"
        if row.name not in self.differences:
            return f"not tested: no seed in common with '{self.baseline}'"
        difference, p = self.differences[row.name], self.corrected[row.name]
        if p is None:
            return f"not tested: {difference.untested}"
        if p >= LEVEL:
            return SAME
        return BETTER if (difference.mean > 0) == (self.mode == "max") else WORSE


def judged(rows: Sequence[Row], *, baseline: str, comparisons: int) -> Standings:
    """Rank the entrants by their mean on validation and test each against the baseline, pair by pair.

    Args:
        rows: In the order in which they entered; the earlier one is first where means are equal.
        baseline: Name of the entrant that the others are compared with.
        comparisons: How many entrants there were to compare with it.

    Raises:
        UsageError: No entrant came through, or runs are judged by different figures.
    """
    monitor, mode = monitored([run for row in rows for run in row.runs])
    ordered = tuple(sorted(rows, key=lambda row: _place(row, mode)))
    if not ordered or ordered[0].state != RANKED:
        raise UsageError("no entrant came through, so there is nothing to compare", fix="see the reasons above")
    known = {row.name: row for row in ordered if row.state == RANKED}
    differences = {}
    if baseline in known:
        others = (row for name, row in known.items() if name != baseline)
        differences = {row.name: found for row in others if (found := _difference(row, known[baseline])) is not None}
    corrected = holm([each.p for each in differences.values()], comparisons=comparisons)
    by_name = dict(zip(differences, corrected, strict=True))
    return Standings(ordered, monitor, mode, baseline, comparisons, differences, by_name)


def monitored(runs: Sequence[Finished]) -> tuple[str, str]:
    """The figure by which all of these runs are judged, and whether more of it is better.

    Raises:
        UsageError: They have not the same, or there is no run.
    """
    found = {(run.monitor, run.mode): run.folder for run in runs}
    if len(found) != 1:
        shown = ", ".join(f"'{monitor}' ({folder})" for (monitor, _), folder in found.items())
        raise UsageError(
            f"runs are judged by different figures: {shown}" if found else "there is no finished run to compare",
            fix="compare runs of one kind of task",
        )
    return next(iter(found))


def ahead(rows: Sequence[Row], mode: str) -> list[Row]:
    """These rows with the best mean first; equal ones stay in order."""
    return sorted(rows, key=lambda row: ahead_of(row.mean, mode))


def ahead_of(value: float, mode: str) -> float:
    """What is smaller is better, by the figure of that mode; what is no number is last."""
    if math.isnan(value):
        return math.inf
    return -value if mode == "max" else value


def test_figures(row: Row, monitor: str) -> dict[str, Any]:
    """The figure on the test split of each run, with mean and spread: the only thing here that looks at that split."""
    reports = [names.read_json(run.folder / names.REPORT) for run in row.runs]
    found = [report["splits"].get("test", {}).get(monitor) for report in reports]
    if any(value is None for value in found):
        return {"values": found, "mean": None, "sd": None}
    mean, sd = mean_and_spread(found)
    return {"values": found, "mean": mean, "sd": sd}


def shared_notes(rows: Sequence[Row]) -> Iterator[str]:
    """What must be known of the data before figures are compared."""
    prints: dict[tuple[int, str], set[str]] = {}
    for run in (run for row in rows for run in row.runs):
        prints.setdefault(run.unit, set()).add(run.prints["train"])
    if any(len(each) > 1 for each in prints.values()):
        yield "note: not all were trained on the same samples, so a difference may come from the data"


def _place(row: Row, mode: str) -> tuple[int, int, float]:
    return (RANKED, DROPPED, FAILED).index(row.state), -row.rung, ahead_of(row.mean, mode)


def _difference(row: Row, baseline: Row) -> Paired | None:
    """Of the seeds that both have, or None where they share none."""
    own, other = ({run.unit: run.value for run in each.runs} for each in (row, baseline))
    units = [unit for unit in own if unit in other]
    return paired([own[unit] for unit in units], [other[unit] for unit in units]) if units else None
