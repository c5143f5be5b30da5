"""Means with 95 % intervals, paired over seeds, and the tables that the scripts print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click
import numpy as np
from scipy import stats


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and the bounds of its 95 % interval (Student's t); NaN bounds for one value."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2:
        return float(found.mean()), float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return float(found.mean()), float(found.mean() - half), float(found.mean() + half)


def p_value(values: Sequence[float]) -> float:
    """Return the two-sided p value of Student's paired t-test; 1 where all differences are 0."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2 or not found.any():
        return 1.0
    error = found.std(ddof=1) / np.sqrt(len(found))
    return float(2 * stats.t.sf(abs(found.mean()) / error, len(found) - 1)) if error else 0.0


def difference(values: Sequence[float], *, scale: float = 100.0, digits: int = 1) -> str:
    """Return a paired difference as text: `+1.2 (+0.4 to +2.0), p 0.01`; in points where `scale` is 100."""
    mean, low, high = (scale * each for each in interval(values))
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}), p {p_value(values):.2g}"


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    click.echo("| " + " | ".join(head) + " |")
    click.echo("|" + " --- |" * len(head))
    for row in rows:
        click.echo("| " + " | ".join(row) + " |")
