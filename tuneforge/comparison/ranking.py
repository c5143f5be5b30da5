"""Ranking and significance, computed from finished runs on the validation split alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tuneforge.comparison.paired_tests import ALPHA, PairedTest, holm_correction, mean_and_std, paired_t_test
from tuneforge.engine.session.predictor import require_done
from tuneforge.engine.session.resume import TASK
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import FolderError, UsageError
from tuneforge.plugin.serialization import from_json

RANKED, DROPPED, FAILED = "ranked", "dropped", "failed"
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no significant difference"


@attrs.frozen(eq=False)
class FinishedRun:
    """The validation metric and the cost of a finished run; nothing of the test split.

    Args:
        run_dir: The run directory.
        seed: The seed of the run.
        monitor: The name of the monitored metric, which decides.
        mode: `"max"` if higher is better, or `"min"`.
        value: The monitored metric on the validation split with the final weights; may be NaN.
        epochs: The number of passes over the training split.
        steps: The number of optimizer steps.
        seconds: The duration of training, evaluation included.
        stopped_by_budget: Whether the budget stopped the run.
        fingerprints: The fingerprint of each split.
    """

    run_dir: Path
    seed: int
    monitor: str
    mode: str
    value: float
    epochs: int
    steps: int
    seconds: float
    stopped_by_budget: bool
    fingerprints: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> FinishedRun:
        """Read a run directory.

        Raises:
            FolderError: The directory holds no finished run, or its report lacks the monitored metric.
        """
        require_done(path)
        report, status = names.read_json(path / names.REPORT), names.read_json(path / names.STATUS)
        monitor, val = report["monitor"], report["splits"]["val"]
        if monitor not in val:
            raise FolderError(
                f"'{path}' has no metric '{monitor}' of the validation split", where=names.REPORT, fix="omit this run"
            )
        epochs = list(names.read_jsonl(path / names.METRICS))
        seconds = status.get("elapsed_s") or sum(line["seconds"] for line in names.read_jsonl(path / names.TIMINGS))
        return cls(
            run_dir=path,
            seed=int(names.read_json(path / names.RUN)["config"].get("seed", 0)),
            monitor=monitor,
            mode=from_json(json.dumps(names.read_json(path / TASK))).monitor_mode,
            value=math.nan if val[monitor] is None else float(val[monitor]),
            epochs=len(epochs),
            steps=int(epochs[-1]["step"]) if epochs else 0,
            seconds=float(seconds),
            stopped_by_budget="stopped_by_budget" in report,
            fingerprints=names.read_json(path / names.MODEL)["fingerprints"],
        )

    @property
    def pairing_key(self) -> tuple[int, str]:
        """The seed and the validation samples, which two runs must share to be a pair."""
        return self.seed, self.fingerprints["val"]


@attrs.frozen(eq=False)
class CandidateResult:
    """A candidate with its runs.

    Args:
        name: The name of the candidate.
        runs: Its finished runs, one per seed, all with the same budget.
        budget: The budget of each run, or None.
        round_number: The round of successive halving in which they ran; 1 without halving.
        state: `RANKED`, `DROPPED` or `FAILED`.
        reason: Why it is not ranked.
        total_s: Seconds of all its runs, earlier rounds included.
    """

    name: str
    runs: tuple[FinishedRun, ...]
    budget: str | None = None
    round_number: int = 1
    state: str = RANKED
    reason: str = ""
    total_s: float = 0.0

    @property
    def values(self) -> list[float]:
        """The monitored metric of each run."""
        return [run.value for run in self.runs]

    @property
    def mean(self) -> float:
        """The mean of the monitored metric; NaN without runs."""
        return mean_and_std(self.values)[0] if self.runs else math.nan

    @property
    def std(self) -> float | None:
        """The standard deviation of the monitored metric over seeds; None for fewer than two runs."""
        return mean_and_std(self.values)[1] if self.runs else None

    def mean_cost(self, cost: str) -> float:
        """Return the mean of `epochs`, `steps` or `seconds` over its runs."""
        return mean_and_std([float(getattr(run, cost)) for run in self.runs])[0] if self.runs else math.nan


@attrs.frozen(eq=False)
class Ranking:
    """The ranking of all candidates with the tests against the baseline.

    Args:
        results: The best first; then the dropped candidates, the last one first; then those that failed.
        monitor: The name of the monitored metric.
        mode: `"max"` if higher is better, or `"min"`.
        baseline: The candidate that the others are compared with.
        num_comparisons: The number of comparisons for which the p values are corrected.
        differences: The paired test of each ranked candidate against the baseline, by name.
        corrected_p_values: P values after Holm's correction, by name; None without a test.
    """

    results: tuple[CandidateResult, ...]
    monitor: str
    mode: str
    baseline: str
    num_comparisons: int
    differences: Mapping[str, PairedTest]
    corrected_p_values: Mapping[str, float | None]

    @property
    def winner(self) -> CandidateResult:
        """The candidate with the best mean, which need not be significantly better than any other."""
        return self.results[0]

    @property
    def ranked(self) -> list[CandidateResult]:
        """The candidates that finished all rounds."""
        return [row for row in self.results if row.state == RANKED]

    def describe_verdict(self, result: CandidateResult) -> str:
        """Return the verdict on a candidate against the baseline in a few words."""
        if result.state != RANKED:
            return f"{result.state}: {result.reason}" if result.reason else result.state
        if result.name == self.baseline:
            return "baseline"
        if result.name not in self.differences:
            return f"not tested: no seed in common with '{self.baseline}'"
        difference, p = self.differences[result.name], self.corrected_p_values[result.name]
        if p is None:
            return f"not tested: {difference.reason_untested}"
        if p >= ALPHA:
            return NO_DIFFERENCE
        return BETTER if (difference.mean > 0) == (self.mode == "max") else WORSE


def rank_candidates(results: Sequence[CandidateResult], *, baseline: str, num_comparisons: int) -> Ranking:
    """Rank candidates by their mean on the validation split, and test each against the baseline in pairs.

    Args:
        results: The candidates; of equal means the earlier one is first.
        baseline: The name of the candidate that the others are compared with.
        num_comparisons: The number of candidates that were to be compared with it.

    Raises:
        UsageError: Every candidate failed, or runs monitor different metrics.
    """
    monitor, mode = require_common_monitor([run for row in results for run in row.runs])
    ordered = tuple(sorted(results, key=lambda row: _rank_key(row, mode)))
    if not ordered or ordered[0].state != RANKED:
        raise UsageError("every candidate failed, so there is nothing to compare", fix="see the reasons above")
    known = {row.name: row for row in ordered if row.state == RANKED}
    differences = {}
    if baseline in known:
        others = (row for name, row in known.items() if name != baseline)
        differences = {
            row.name: found for row in others if (found := _compare_to_baseline(row, known[baseline])) is not None
        }
    corrected = holm_correction([each.p_value for each in differences.values()], num_comparisons=num_comparisons)
    by_name = dict(zip(differences, corrected, strict=True))
    return Ranking(ordered, monitor, mode, baseline, num_comparisons, differences, by_name)


def require_common_monitor(runs: Sequence[FinishedRun]) -> tuple[str, str]:
    """Return the monitored metric that all of these runs share, and its mode.

    Raises:
        UsageError: The runs monitor different metrics, or there is no run.
    """
    found = {(run.monitor, run.mode): run.run_dir for run in runs}
    if len(found) != 1:
        shown = ", ".join(f"'{monitor}' ({folder})" for (monitor, _), folder in found.items())
        raise UsageError(
            f"the runs monitor different metrics: {shown}" if found else "there is no finished run to compare",
            fix="compare runs of the same task",
        )
    return next(iter(found))


def sort_by_mean(results: Sequence[CandidateResult], mode: str) -> list[CandidateResult]:
    """Return the results with the best mean first; equal ones stay in order."""
    return sorted(results, key=lambda row: sort_key(row.mean, mode))


def sort_key(value: float, mode: str) -> float:
    """Return a key that sorts the better value first and NaN last."""
    if math.isnan(value):
        return math.inf
    return -value if mode == "max" else value


def read_test_metrics(result: CandidateResult, monitor: str) -> dict[str, Any]:
    """Return the metric of each run on the test split, with mean and std; nothing else here reads that split."""
    reports = [names.read_json(run.run_dir / names.REPORT) for run in result.runs]
    found = [report["splits"].get("test", {}).get(monitor) for report in reports]
    if any(value is None for value in found):
        return {"values": found, "mean": None, "std": None}
    mean, std = mean_and_std(found)
    return {"values": found, "mean": mean, "std": std}


def describe_data_differences(results: Sequence[CandidateResult]) -> Iterator[str]:
    """Yield notes on differences between the data of runs."""
    prints: dict[tuple[int, str], set[str]] = {}
    for run in (run for row in results for run in row.runs):
        prints.setdefault(run.pairing_key, set()).add(run.fingerprints["train"])
    if any(len(each) > 1 for each in prints.values()):
        yield "note: not all were trained on the same samples, so a difference may come from the data"


def _rank_key(result: CandidateResult, mode: str) -> tuple[int, int, float]:
    return (RANKED, DROPPED, FAILED).index(result.state), -result.round_number, sort_key(result.mean, mode)


def _compare_to_baseline(result: CandidateResult, baseline: CandidateResult) -> PairedTest | None:
    """Test a candidate against the baseline on the seeds that both have; None if they share none."""
    own, other = ({run.pairing_key: run.value for run in each.runs} for each in (result, baseline))
    units = [unit for unit in own if unit in other]
    return paired_t_test([own[unit] for unit in units], [other[unit] for unit in units]) if units else None
