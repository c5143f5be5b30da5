"""The result of a comparison as text, as JSON and as a table; times are stored apart from metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from tuneforge.comparison.paired_tests import ALPHA, ci_half_width, seeds_to_decide
from tuneforge.comparison.ranking import (
    BETTER,
    DROPPED,
    FAILED,
    NO_DIFFERENCE,
    RANKED,
    WORSE,
    CandidateResult,
    Ranking,
    read_test_metrics,
)
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.atomic import nonfinite_to_none
from tuneforge.plugin.config import parse_budget
from tuneforge.report import plots as plots
from tuneforge.report.report import format_duration, format_metric
from tuneforge.report.text_table import format_table

RESULTS, COSTS, TABLE, COST_PLOT = "results.json", "costs.json", "table.txt", "cost.svg"
_UNKNOWN = "-"


@attrs.frozen(eq=False)
class Comparison:
    """The result of a comparison; `str` gives the table with the decision.

    Args:
        study_dir: The directory of the files; None if none were written.
        results: The content of `results.json`: everything but times.
        costs: The content of `costs.json`: seconds by candidate.
        table: The table and the decision as text.
    """

    study_dir: Path | None
    results: Mapping[str, Any]
    costs: Mapping[str, Any]
    table: str

    @property
    def winner(self) -> str:
        """The candidate with the best validation mean; `results` holds whether it is significantly better."""
        return str(self.results["winner"])

    def __str__(self) -> str:
        return self.table


def summarize(ranking: Ranking, *, notes: Iterable[str], soup: Mapping[str, Any] | None, study_dir: Path | None,
             extra: Mapping[str, Any]) -> Comparison:  # fmt: skip
    """Build and write the results of a ranking; only then read the test metrics of winner and baseline.

    Args:
        ranking: The ranking.
        notes: Further notes.
        soup: The summary of the model soup, or None.
        study_dir: The output directory; None writes nothing.
        extra: Further content of `results.json`, such as seeds.
    """
    notes = [*notes, *_collect_notes(ranking)]
    chosen = {row.name: row for row in ranking.ranked if row.name in (ranking.winner.name, ranking.baseline)}
    test = {name: read_test_metrics(row, ranking.monitor) for name, row in chosen.items()}
    results = nonfinite_to_none(
        {**extra, **_build_results(ranking, study_dir), "soup": soup, "test": test, "notes": notes}
    )
    costs = {row.name: {"runs": [run.seconds for run in row.runs], "total": row.total_s} for row in ranking.results}
    text = "\n".join([*_format_lines(ranking, soup, test), *notes])
    comparison = Comparison(study_dir, results, costs, text)
    if study_dir is not None:
        _write(comparison, study_dir, ranking)
    return comparison


def describe_decision(ranking: Ranking) -> str:
    """Return the decision: the best candidate, and whether it is significantly better than the baseline."""
    first, monitor = ranking.winner, ranking.monitor
    opening = f"best on validation: {first.name}, {monitor} {_format_mean_std(first.mean, first.std)}"
    others = {row.name: ranking.describe_verdict(row) for row in ranking.ranked if row.name != ranking.baseline}
    if not others:
        return f"{opening}; there is no other candidate to compare it with"
    if first.name == ranking.baseline:
        worse = [name for name, verdict in others.items() if verdict == WORSE]
        untested = all(verdict.startswith("not tested") for verdict in others.values())
        beaten = f"significantly worse: {', '.join(worse)}" if worse else "no significant difference from any other"
        return f"{opening}; it is the baseline; {'nothing was tested' if untested else beaten}"
    verdict = others[first.name]
    if verdict in (BETTER, NO_DIFFERENCE):
        words = "significantly better than" if verdict == BETTER else "no significant difference from"
        return f"{opening}; {words} {ranking.baseline} ({_describe_test(ranking, first.name)})"
    return f"{opening}; {verdict}, so it may be best by chance"


def _describe_test(ranking: Ranking, name: str) -> str:
    difference, p = ranking.differences[name], ranking.corrected_p_values[name]
    assert difference.ci_low is not None
    assert difference.ci_high is not None
    comparisons = _pluralize(ranking.num_comparisons, "comparison")
    return (
        f"{difference.mean:+.4f}, 95 % interval {difference.ci_low:+.4f} to {difference.ci_high:+.4f}, "
        f"p {_format_p_value(p)} after Holm for {comparisons}, {difference.num_pairs} seeds"
    )


def _describe_seeds_needed(ranking: Ranking) -> Iterator[str]:
    """Yield how many seeds would decide between the best candidate, or the one after it, and the baseline."""
    others = [row.name for row in ranking.ranked if row.name != ranking.baseline]
    for name in others[:1]:
        difference, p = ranking.differences.get(name), ranking.corrected_p_values.get(name)
        if difference is None or p is None or p < ALPHA:
            continue
        needed = seeds_to_decide(difference, num_comparisons=ranking.num_comparisons)
        words = f"about {max(needed, difference.num_pairs + 1)} seeds" if needed else "more than 1,000 seeds"
        yield (
            f"note: a difference of {difference.mean:+.4f} between {name} and {ranking.baseline} would be significant "
            f"with {words}, if it stays as it is"
        )


def _collect_notes(ranking: Ranking) -> Iterator[str]:
    ranked = ranking.ranked
    pairs = {each.num_pairs for each in ranking.differences.values()}
    if ranking.baseline not in {row.name for row in ranked}:
        yield f"note: the baseline '{ranking.baseline}' failed, so nothing was tested"
    elif max(pairs, default=2) < 2:
        yield "note: one seed, so there is no test: a difference may be chance; use more with --seeds"
    elif pairs:
        most = max(pairs)
        yield (
            f"note: with {most} seeds a confidence interval extends {ci_half_width(most):.1f} standard deviations of "
            f"the differences to each side (with 10 seeds: {ci_half_width(10):.1f}); it holds for other seeds on "
            "the same samples, not for other samples"
        )
        yield from _describe_seeds_needed(ranking)
    early = [f"{row.name} after {row.mean_cost(kind):.3g}" for row in ranked if (kind := _unspent_budget_kind(row))]
    if early:
        yield (
            f"note: some finished before their budget of {ranked[0].budget}, as their own options determine: "
            f"{', '.join(early)}"
        )


def _unspent_budget_kind(row: CandidateResult) -> str:
    """Return the kind of budget that a candidate did not use up, or an empty string."""
    kind, amount = parse_budget(row.budget) if row.budget is not None else ("epochs", 0.0)
    spent = any(run.stopped_by_budget for run in row.runs) or row.mean_cost(kind) >= amount
    return "" if spent else kind


def _build_results(ranking: Ranking, folder: Path | None) -> dict[str, Any]:
    """Return everything that does not depend on time measurements."""
    return {
        "monitor": ranking.monitor,
        "mode": ranking.mode,
        "baseline": ranking.baseline,
        "winner": ranking.winner.name,
        "decision": describe_decision(ranking),
        "num_comparisons": ranking.num_comparisons,
        "alpha": ALPHA,
        "candidates": [_build_entry(ranking, row, folder) for row in ranking.results],
    }


def _build_entry(ranking: Ranking, row: CandidateResult, folder: Path | None) -> dict[str, Any]:
    difference = ranking.differences.get(row.name)
    return {
        "name": row.name,
        "state": row.state,
        "verdict": ranking.describe_verdict(row),
        "budget": row.budget,
        "round": row.round_number,
        "mean": row.mean,
        "std": row.std,
        "difference": None if difference is None else attrs.asdict(difference),
        "corrected_p_value": ranking.corrected_p_values.get(row.name),
        "runs": [
            {
                "run_dir": _relative(run.run_dir, folder),
                "seed": run.seed,
                "value": run.value,
                "epochs": run.epochs,
                "steps": run.steps,
                "stopped_by_budget": run.stopped_by_budget,
            }
            for run in row.runs
        ],
    }


def _relative(run: Path, folder: Path | None) -> str:
    return str(run.relative_to(folder)) if folder is not None and run.is_relative_to(folder) else str(run)


def _format_lines(ranking: Ranking, soup: Mapping[str, Any] | None, test: Mapping[str, Any]) -> Iterator[str]:
    head = ["candidate", ranking.monitor, "std", "seeds", "epochs", "seconds", f"vs. {ranking.baseline}", "p (Holm)"]
    rows = [_format_cells(ranking, row) for row in ranking.results]
    if soup is not None and soup.get("value") is not None:
        counts = f"{len(soup['ingredients'])} of {len(soup['candidates'])} runs"
        words = f"average of {counts}, chosen on the validation split: not tested"
        rows.insert(len(ranking.ranked), [soup["name"], format_metric(soup["value"]), *[_UNKNOWN] * 6, words])
    yield from format_table([*head, "verdict"], rows, right=range(1, len(head)))
    yield ""
    yield describe_decision(ranking)
    for name, found in test.items():
        shown = "none" if found["mean"] is None else _format_mean_std(found["mean"], found["std"])
        yield f"test split, read after the decision: {name}, {ranking.monitor} {shown}"
    total = sum(row.total_s for row in ranking.results)
    yield f"cost: {format_duration(total)} of training"


def _format_cells(ranking: Ranking, row: CandidateResult) -> list[str]:
    difference, p = ranking.differences.get(row.name), ranking.corrected_p_values.get(row.name)
    shown = _UNKNOWN if difference is None else f"{difference.mean:+.4f}"
    if difference is not None and difference.ci_low is not None and difference.ci_high is not None:
        shown += f" ({difference.ci_low:+.4f}, {difference.ci_high:+.4f})"
    has_value = bool(row.runs) and row.state != FAILED
    return [
        row.name,
        format_metric(row.mean) if has_value else _UNKNOWN,
        format_metric(row.std) if has_value and row.std is not None else _UNKNOWN,
        str(len(row.runs)),
        f"{row.mean_cost('epochs'):.3g}" if has_value else _UNKNOWN,
        f"{row.mean_cost('seconds'):.3g}" if has_value else _UNKNOWN,
        shown,
        _format_p_value(p),
        ranking.describe_verdict(row),
    ]


def _write(comparison: Comparison, folder: Path, ranking: Ranking) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names.write_json(folder / RESULTS, comparison.results)
    names.write_json(folder / COSTS, comparison.costs)
    names.atomic_write(folder / TABLE, comparison.table + "\n")
    points = [
        plots.CostPoint(row.name, [run.seconds for run in row.runs], row.values, hollow=row.state == DROPPED)
        for row in ranking.results
        if row.state in (RANKED, DROPPED) and row.runs
    ]
    names.atomic_write(
        folder / COST_PLOT, plots.to_standalone_svg(plots.plot_metric_against_cost(points, ranking.monitor))
    )


def _format_mean_std(mean: float, std: float | None) -> str:
    return format_metric(mean) + (f" +- {std:.4f}" if std is not None else "")


def _format_p_value(p: float | None) -> str:
    if p is None or math.isnan(p):
        return _UNKNOWN
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _pluralize(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
