"""The tables of the results, as Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import intervals
import numpy as np
from own_methods import DEFAULT
from peer_methods import PEERS
from records import Key, Record
from tasks import cells

Records = Mapping[Key, Record]


def render(found: Records, half: str) -> str:
    """Return all tables of a half: accuracy, differences, and what failed or did not run."""
    parts = ["choosing", "reporting"] if half == "all" else [half]
    blocks = []
    for part in parts:
        blocks += [f"### {part.capitalize()} half", accuracy_table(found, part)]
        if DEFAULT in methods_of(found):
            blocks.append(difference_table(found, part))
        blocks.append(missing(found, part))
    if DEFAULT in methods_of(found):
        blocks.append(verdict(found))
    if below_the_best(found, half):
        blocks.append(strategy_table(found, half))
    return "\n\n".join(blocks)


def methods_of(found: Records) -> list[str]:
    """Return the methods that have results: ours, the peers, then others."""
    present = {record.method for record in found.values()}
    order = [DEFAULT, *PEERS]
    return [name for name in order if name in present] + sorted(present - set(order))


def accuracy_table(found: Records, half: str) -> str:
    """Return the mean accuracy of each method in each cell, in percent, over the splits that it has."""
    methods = methods_of(found)
    rows = []
    for cell in map(str, cells(half)):
        means = [_mean(found, cell, method) for method in methods]
        rows.append([cell, *("" if mean is None else f"{100 * mean:.1f}" for mean in means)])
    return _markdown(["cell", *methods], rows)


def difference_table(found: Records, half: str) -> str:
    """Return the default run minus each other method, in points with intervals of 95 %: each task, and pooled."""
    chosen = [str(cell) for cell in cells(half)]
    tasks = list(dict.fromkeys(cell.partition("/")[0] for cell in chosen))
    rows = []
    for method in methods_of(found):
        differences = intervals.differences(found, DEFAULT, method, chosen)
        if method == DEFAULT or not differences:
            continue
        each = [str(intervals.of_task(differences[task])) if task in differences else "" for task in tasks]
        pooled = intervals.pooled(differences)
        rows.append([method, str(pooled), str(intervals.over_tasks(differences)), str(pooled.pairs), *each])
    return _markdown(["tuneforge minus", "pooled, new splits", "pooled, new tasks", "pairs", *tasks], rows)


def missing(found: Records, half: str) -> str:
    """Return which runs failed, and how many splits each cell of a method has where they are not all there."""
    lines = [
        f"- {record.cell}, split {record.split}, {record.method} failed: {record.error}"
        for record in found.values()
        if record.error and record.cell in map(str, cells(half))
    ]
    for method in methods_of(found):
        counts = [sum(key[0] == str(cell) and key[2] == method for key in found) for cell in cells(half)]
        runs = ", ".join(f"{cell}: {count}" for cell, count in zip(cells(half), counts, strict=True) if count < 5)
        if runs:
            lines.append(f"- {method}, splits that ran of 5: {runs}")
    return "\n".join(lines) or "All runs have a result."


def best_peer(found: Records, half: str) -> str | None:
    """Return the peer with the best mean over tasks of its mean accuracy, among those with results in every cell."""
    means = {}
    for peer in PEERS:
        scores = [_mean(found, str(cell), peer) for cell in cells(half)]
        if None not in scores:
            means[peer] = _mean_by_task(list(zip(cells(half), scores, strict=True)))
    return max(means, key=means.__getitem__) if means else None


def verdict(found: Records) -> str:
    """Return the comparison that was fixed beforehand: with the peer that was best on the choosing half."""
    peer = best_peer(found, "choosing")
    if peer is None:
        return "No peer has results in every cell of the choosing half."
    differences = intervals.differences(found, DEFAULT, peer, map(str, cells("reporting")))
    if not differences:
        return f"`{peer}` is the best peer of the choosing half; nothing is paired with it on the reporting half yet."
    worse = [task for task, values in differences.items() if intervals.of_task(values).high < 0]
    return (
        f"`{peer}` is the best peer of the choosing half. On the reporting half tuneforge's default run has "
        f"{intervals.pooled(differences)} points more, and is significantly worse on "
        f"{', '.join(worse) if worse else 'no task'}."
    )


def below_the_best(found: Records, half: str) -> dict[str, float]:
    """Return how many points each strategy is below the best one in hindsight, by its name, pooled over tasks.

    The best one is chosen in each cell by its test accuracy over the splits, so that even equal strategies seem to be
    below it. Cells in which a strategy has no result are left out, for all.
    """
    names = [name for name in methods_of(found) if name.partition(":")[0] == DEFAULT]
    means = {str(cell): [_mean(found, str(cell), name) for name in names] for cell in cells(half)}
    whole = {cell: scores for cell, scores in means.items() if None not in scores}
    if len(names) < 2 or not whole:
        return {}
    return {
        name: 100 * _mean_by_task([(cell, max(scores) - scores[i]) for cell, scores in whole.items()])
        for i, name in enumerate(names)
    }


def strategy_table(found: Records, half: str) -> str:
    """Return how far the strategies are below the best one in hindsight."""
    rows = [[name, f"{points:.1f}"] for name, points in below_the_best(found, half).items()]
    return _markdown(["strategy", "points below the best in hindsight"], rows)


def _mean(found: Records, cell: str, method: str) -> float | None:
    scores = [r.accuracy for r in found.values() if (r.cell, r.method) == (cell, method) and r.accuracy is not None]
    return float(np.mean(scores)) if scores else None


def _mean_by_task(scores: Sequence[tuple[object, float | None]]) -> float:
    by_task: dict[str, list[float]] = {}
    for cell, score in scores:
        by_task.setdefault(str(cell).partition("/")[0], []).append(score or 0.0)
    return float(np.mean([np.mean(each) for each in by_task.values()]))


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(_lines(list(head), rows))


def _lines(head: list[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join(['---'] * len(head))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
