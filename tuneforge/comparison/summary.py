"""A comparison in words, in numbers for programs, and as a table; times are kept apart from figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from tuneforge.comparison.paired_tests import LEVEL, reach
from tuneforge.comparison.ranking import BETTER, DROPPED, FAILED, RANKED, SAME, WORSE, Row, Standings, test_figures
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.run_dir import finite
from tuneforge.plugin.config import budget_of
from tuneforge.report import plots as pictures
from tuneforge.report.report import duration, figure

RESULTS, COSTS, TABLE, PICTURE = "results.json", "costs.json", "table.txt", "cost.svg"
_UNKNOWN = "-"


@attrs.frozen(eq=False)
class Comparison:
    """What a comparison leaves; as text it is the table with the decision.

    Args:
        folder: Where the files lie; None where none were written.
        results: The content of `results.json`: everything but times.
        costs: The content of `costs.json`: seconds by entrant.
        table: What a person reads.
    """

    folder: Path | None
    results: Mapping[str, Any]
    costs: Mapping[str, Any]
    table: str

    @property
    def winner(self) -> str:
        """The entrant with the best mean on validation; `results` says whether it is significantly better."""
        return str(self.results["winner"])

    def __str__(self) -> str:
        return self.table


def conclude(standings: Standings, *, notes: Iterable[str], soup: Mapping[str, Any] | None, folder: Path | None,
             more: Mapping[str, Any]) -> Comparison:  # fmt: skip
    """Put a decision into words and numbers; then, and only then, look at the test split of winner and baseline.

    Args:
        standings: The decision.
        notes: What else must be known.
        soup: The average of the entrants, if one was made.
        folder: Where to write; None: nowhere.
        more: What `results.json` holds besides, such as seeds.
    """
    notes = [*notes, *_notes(standings)]
    chosen = {row.name: row for row in standings.ranked if row.name in (standings.winner.name, standings.baseline)}
    test = {name: test_figures(row, standings.monitor) for name, row in chosen.items()}
    results = finite({**more, **_results(standings, folder), "soup": soup, "test": test, "notes": notes})
    costs = {row.name: {"runs": [run.seconds for run in row.runs], "total": row.spent_s} for row in standings.rows}
    text = "\n".join([*_lines(standings, soup, test), *notes])
    comparison = Comparison(folder, results, costs, text)
    if folder is not None:
        _write(comparison, folder, standings)
    return comparison


def read_back(folder: Path) -> Comparison:
    """The comparison that another process has written."""
    text = (folder / TABLE).read_text(encoding="utf-8").removesuffix("\n")
    return Comparison(folder, names.read_json(folder / RESULTS), names.read_json(folder / COSTS), text)


def sentence(standings: Standings) -> str:
    """The decision: who is first, and whether the figures show it to be better than the baseline."""
    first, monitor = standings.winner, standings.monitor
    opening = f"first on validation: {first.name}, {monitor} {_with_spread(first.mean, first.sd)}"
    others = {row.name: standings.verdict(row) for row in standings.ranked if row.name != standings.baseline}
    if not others:
        return f"{opening}; there is no other to compare it with"
    if first.name == standings.baseline:
        worse = [name for name, verdict in others.items() if verdict == WORSE]
        untested = all(verdict.startswith("not tested") for verdict in others.values())
        beaten = f"significantly worse: {', '.join(worse)}" if worse else "no significant difference to any other"
        return f"{opening}; it is the baseline; {'nothing was tested' if untested else beaten}"
    verdict = others[first.name]
    if verdict in (BETTER, SAME):
        words = "significantly better than" if verdict == BETTER else "no significant difference to"
        return f"{opening}; {words} {standings.baseline} ({_tested(standings, first.name)})"
    return f"{opening}; {verdict}, so it may be first by chance"


def _tested(standings: Standings, name: str) -> str:
    difference, p = standings.differences[name], standings.corrected[name]
    assert difference.low is not None
    assert difference.high is not None
    return (
        f"{difference.mean:+.4f}, 95 % interval {difference.low:+.4f} to {difference.high:+.4f}, "
        f"p {_p(p)} after Holm for {_count(standings.comparisons, 'comparison')}, {difference.pairs} seeds"
    )


def _notes(standings: Standings) -> Iterator[str]:
    ranked = standings.ranked
    pairs = {each.pairs for each in standings.differences.values()}
    if standings.baseline not in {row.name for row in ranked}:
        yield f"note: the baseline '{standings.baseline}' did not come through, so nothing was tested"
    elif max(pairs, default=2) < 2:
        yield "note: one seed, so there is no test: a difference may be chance; ask for more with --seeds"
    elif pairs:
        most = max(pairs)
        yield (
            f"note: with {most} seeds an interval reaches {reach(most):.1f} standard deviations of the differences "
            f"each way (with 10: {reach(10):.1f}); it is about other seeds on these samples, not about other samples"
        )
    early = [f"{row.name} after {row.average(kind):.3g}" for row in ranked if (kind := _unspent(row))]
    if early:
        yield (
            f"note: some ended by themselves before their {ranked[0].budget} were spent, as their own options say: "
            f"{', '.join(early)}"
        )


def _unspent(row: Row) -> str:
    """The kind of budget that an entrant has left over; empty where it has none."""
    kind, amount = budget_of(row.budget) if row.budget is not None else ("epochs", 0.0)
    spent = any(run.by_budget for run in row.runs) or row.average(kind) >= amount
    return "" if spent else kind


def _results(standings: Standings, folder: Path | None) -> dict[str, Any]:
    """Everything that does not depend on the clock."""
    return {
        "monitor": standings.monitor,
        "mode": standings.mode,
        "baseline": standings.baseline,
        "winner": standings.winner.name,
        "decision": sentence(standings),
        "comparisons": standings.comparisons,
        "level": LEVEL,
        "entrants": [_entry(standings, row, folder) for row in standings.rows],
    }


def _entry(standings: Standings, row: Row, folder: Path | None) -> dict[str, Any]:
    difference = standings.differences.get(row.name)
    return {
        "name": row.name,
        "state": row.state,
        "verdict": standings.verdict(row),
        "budget": row.budget,
        "rung": row.rung,
        "mean": row.mean,
        "sd": row.sd,
        "difference": None if difference is None else attrs.asdict(difference),
        "p_corrected": standings.corrected.get(row.name),
        "runs": [
            {
                "folder": _relative(run.folder, folder),
                "seed": run.seed,
                "value": run.value,
                "epochs": run.epochs,
                "steps": run.steps,
                "stopped_by_budget": run.by_budget,
            }
            for run in row.runs
        ],
    }


def _relative(run: Path, folder: Path | None) -> str:
    return str(run.relative_to(folder)) if folder is not None and run.is_relative_to(folder) else str(run)


def _lines(standings: Standings, soup: Mapping[str, Any] | None, test: Mapping[str, Any]) -> Iterator[str]:
    head = ["entrant", standings.monitor, "sd", "seeds", "epochs", "seconds", f"to {standings.baseline}", "p (Holm)"]
    rows = [_cells(standings, row) for row in standings.rows]
    if soup is not None and soup.get("value") is not None:
        words = f"average of {len(soup['ingredients'])} of {len(soup['tried'])} runs, chosen on validation: not tested"
        rows.insert(len(standings.ranked), [soup["name"], figure(soup["value"]), *[_UNKNOWN] * 6, words])
    yield from _aligned([*head, "verdict"], rows)
    yield ""
    yield sentence(standings)
    for name, found in test.items():
        shown = "none" if found["mean"] is None else _with_spread(found["mean"], found["sd"])
        yield f"test, looked at after the decision: {name}, {standings.monitor} {shown}"
    total = sum(row.spent_s for row in standings.rows)
    yield f"cost: {duration(total)} of tuning"


def _cells(standings: Standings, row: Row) -> list[str]:
    difference, p = standings.differences.get(row.name), standings.corrected.get(row.name)
    shown = _UNKNOWN if difference is None else f"{difference.mean:+.4f}"
    if difference is not None and difference.low is not None and difference.high is not None:
        shown += f" ({difference.low:+.4f}, {difference.high:+.4f})"
    told = bool(row.runs) and row.state != FAILED
    return [
        row.name,
        figure(row.mean) if told else _UNKNOWN,
        figure(row.sd) if told and row.sd is not None else _UNKNOWN,
        str(len(row.runs)),
        f"{row.average('epochs'):.3g}" if told else _UNKNOWN,
        f"{row.average('seconds'):.3g}" if told else _UNKNOWN,
        shown,
        _p(p),
        standings.verdict(row),
    ]


def _aligned(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Columns as wide as what they hold; names and words to the left, numbers to the right, the last one as it is."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head) - 1)]
    for row in [head, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)),
        ]
        yield "  ".join([*cells, row[-1]])


def _write(comparison: Comparison, folder: Path, standings: Standings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names.write_json(folder / RESULTS, comparison.results)
    names.write_json(folder / COSTS, comparison.costs)
    names.write_whole(folder / TABLE, comparison.table + "\n")
    points = [
        pictures.Point(row.name, [run.seconds for run in row.runs], row.values, hollow=row.state == DROPPED)
        for row in standings.rows
        if row.state in (RANKED, DROPPED) and row.runs
    ]
    names.write_whole(folder / PICTURE, pictures.standalone(pictures.against_cost(points, standings.monitor)))


def _with_spread(mean: float, sd: float | None) -> str:
    return figure(mean) + (f" +- {sd:.4f}" if sd is not None else "")


def _p(p: float | None) -> str:
    if p is None or math.isnan(p):
        return _UNKNOWN
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
