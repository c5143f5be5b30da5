"""The tables of the results, as Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import intervals
import numpy as np
from own_methods import DEFAULT
from peer_methods import PEERS
from records import Key, Record
from tasks import NUM_SPLITS, cells

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
    """Return which runs failed, and how many of a half's runs each method has where they are not all there."""
    chosen = [str(cell) for cell in cells(half)]
    lines = [
        f"- {record.cell}, split {record.split}, {record.method} failed: {record.error}"
        for record in found.values()
        if record.error and record.cell in chosen
    ]
    whole = NUM_SPLITS * len(chosen)
    counts = {name: sum(key[0] in chosen and key[2] == name for key in found) for name in methods_of(found)}
    runs = ", ".join(f"{name} {count} of {whole}" for name, count in counts.items() if count < whole)
    return "\n".join([*lines, f"- Runs: {runs}."] if runs else lines) or "All runs have a result."


def best_peer(found: Records, half: str) -> str | None:
    """Return the peer with the best mean over tasks, in the runs that all peers have.

    A peer with results in less than half of the cells is not considered.
    """
    chosen = [str(cell) for cell in cells(half)]
    runs: dict[str, dict[tuple[str, int], float]] = {peer: {} for peer in PEERS}
    for (cell, split, method), record in found.items():
        if method in runs and cell in chosen and record.accuracy is not None:
            runs[method][cell, split] = record.accuracy
    peers = [peer for peer, scores in runs.items() if 2 * len({cell for cell, _ in scores}) >= len(chosen)]
    shared = set.intersection(*(set(runs[peer]) for peer in peers)) if peers else set()
    if not shared:
        return None
    means = {peer: _mean_by_task([(cell, runs[peer][cell, split]) for cell, split in shared]) for peer in peers}
    return max(means, key=means.__getitem__)


def verdict(found: Records) -> str:
    """Return the comparison that was fixed beforehand: with the peer that was best on the choosing half."""
    peer = best_peer(found, "choosing")
    if peer is None:
        return "There is no run of the choosing half that all peers have."
    differences = intervals.differences(found, DEFAULT, peer, map(str, cells("reporting")))
    if not differences:
        return f"`{peer}` is the best peer of the choosing half; nothing is paired with it on the reporting half yet."
    worse = [task for task, values in differences.items() if intervals.of_task(values).high < 0]
    tasks = list(dict.fromkeys(cell.task for cell in cells("reporting")))
    open_tasks = [task for task in tasks if len(differences.get(task, ())) < 2]
    rest = f" Too few pairs for an interval: {', '.join(open_tasks)}." if open_tasks else ""
    return (
        f"`{peer}` is the best peer of the choosing half. On the reporting half tuneforge's default run has "
        f"{intervals.pooled(differences)} points more, and is significantly worse on "
        f"{', '.join(worse) if worse else 'no task'}.{rest}"
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
