"""Plots of a run as inline SVG, which takes its colors, light or dark, from the page.

matplotlib draws with placeholder colors, each of which then becomes a variable of the page's style sheet. The output is
deterministic: nothing here is random or depends on the time or on the user's settings.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import attrs
import matplotlib
import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

_INK, _MUTED, _GRID = "#0a0b01", "#0a0b02", "#0a0b03"
_SERIES = tuple(f"#0a0c{number:02x}" for number in range(1, 7))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line"} | {
    color: f"--series-{number}" for number, color in enumerate(_SERIES, start=1)
}
_CORRECT_RGB, _INCORRECT_RGB = (
    (13, 148, 136),
    (234, 88, 12),
)  # legible on white and on black, so an image needs no variables
_LIGHT = {
    "--ink": "#1b2026", "--muted": "#535d69", "--line": "#d5dae0", "--series-1": "#0072b2", "--series-2": "#c2410c",
    "--series-3": "#0f7b5f", "--series-4": "#9a3c8f", "--series-5": "#7a5c00", "--series-6": "#4b5563",
}  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # seven, so that with six colors 42 points differ
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "tuneforge", "text.parse_math": False, "font.size": 10,
    "text.color": _INK, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED,
    "xtick.labelcolor": _MUTED, "ytick.labelcolor": _MUTED, "axes.edgecolor": _GRID, "grid.color": _GRID,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.6, "axes.formatter.useoffset": False,
}  # fmt: skip
_WIDTH_IN, _LETTER_PT = 5.2, 5.6
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_MAX_LINEAR_RATIO = 30  # costs that lie further apart are drawn on a logarithmic axis
_MAX_NAME_LENGTH, _MAX_VERTICAL_LENGTH, _MAX_MARKERS = 24, 12, 40


@attrs.frozen
class Plot:
    """A plot as SVG, with a text alternative.

    Args:
        svg: Markup to place in a page.
        alt: What it shows, in a sentence.
    """

    svg: Markup
    alt: str


@attrs.frozen
class CostPoint:
    """A candidate of a comparison: its costs and metric values, measured one or more times.

    Args:
        name: Label in the legend.
        seconds: Cost of each run.
        values: Metric of each run.
        hollow: Whether the marker is hollow, for a candidate that is not comparable with the others.
    """

    name: str
    seconds: Sequence[float]
    values: Sequence[float]
    hollow: bool = False


def plot_losses(epochs: Sequence[Mapping[str, Any]]) -> Plot:
    """Plot the training loss, the validation loss if there is one, and the learning rate.

    Args:
        epochs: Entries of `metrics.jsonl`, at least one.
    """
    with _style():
        figure, (upper, lower) = _make_panels(3, 1)
        _draw_line(upper, epochs, [_to_float(entry.get("train", {}).get("loss")) for entry in epochs], "training", 0)
        if any("loss" in entry.get("val", {}) for entry in epochs):
            _draw_line(upper, epochs, _metric_series(epochs, "loss"), "validation", 1)
        upper.set_ylabel("loss")
        upper.legend()
        _draw_line(lower, epochs, [_to_float(entry.get("lr")) for entry in epochs], "learning rate", 2)
        lower.set_ylabel("lr")
        lower.set_ylim(bottom=0)
        lower.yaxis.set_major_locator(MaxNLocator(3))
        _shade_phases(figure, (upper, lower), epochs)
        course = [_to_float(entry.get("train", {}).get("loss")) for entry in epochs]
        change = f"{_describe_change(course)} over {len(course)} epoch(s)"
        alt = f"Training loss by epoch: {change}. Below it the learning rate."
        return _to_plot(figure, alt, name="losses")


def plot_metrics(epochs: Sequence[Mapping[str, Any]], names: Sequence[str], *, monitor: str) -> Plot | None:
    """Plot validation metrics by epoch, on one axis if all lie in 0..1, else on one axis each.

    Args:
        epochs: Entries of `metrics.jsonl`, at least one.
        names: The metrics; those that no epoch has are skipped, and so are all after the first six.
        monitor: The metric whose best epoch is marked in each phase.

    Returns:
        The plot, or None where no metric was measured.
    """
    courses = {
        name: _metric_series(epochs, name) for name in names if any(name in entry.get("val", {}) for entry in epochs)
    }
    courses = dict(list(courses.items())[: len(_SERIES)])
    if not courses:
        return None
    shared = all(0 <= value <= 1 for course in courses.values() for value in course if math.isfinite(value))
    with _style():
        figure, panels = _make_panels(*([1] if shared else [1] * len(courses)))
        for index, (name, course) in enumerate(courses.items()):
            axes = panels[0] if shared else panels[index]
            _draw_line(axes, epochs, course, name, index)
            if name == monitor:
                _mark_best_epochs(axes, epochs, course)
            if not shared:
                axes.set_ylabel(_shorten(name))
        if shared:
            panels[0].set_ylabel("validation")
            figure.legend(loc="outside lower center", ncols=2)
        _shade_phases(figure, panels, epochs)
        ends = "; ".join(f"{_shorten(name)} {_describe_change(course)}" for name, course in courses.items())
        alt = f"Metrics of the validation split by epoch: {ends}, over {len(epochs)} epoch(s)."
        return _to_plot(figure, alt, name="metrics")


def plot_confusion_matrix(shares: NDArray[np.float64], *, alt: str) -> Plot:
    """Plot a confusion matrix that is too large for a table.

    Args:
        shares: Share of each true class that got each answer (classes, classes).
        alt: What it shows, in a sentence.
    """
    size = len(shares)
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[..., :3] = np.where(np.eye(size, dtype=bool)[..., None], _CORRECT_RGB, _INCORRECT_RGB)
    pixels[..., 3] = np.round(255 * np.sqrt(np.clip(shares, 0, 1)))
    with _style():
        figure = Figure(figsize=(6.4, 6.2), layout="constrained")
        axes = figure.subplots()
        axes.imshow(pixels, interpolation="none", extent=(0.5, size + 0.5, size + 0.5, 0.5))
        axes.grid(visible=False)
        axes.set_xlabel("answer (number of the class)")
        axes.set_ylabel("truth (number of the class)")
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
        return _to_plot(figure, alt, name="confusion")


def plot_metric_against_cost(points: Sequence[CostPoint], metric_name: str) -> Plot:
    """Plot a metric against seconds: one point per candidate at the means, with error bars of one standard deviation.

    Args:
        points: At least one.
        metric_name: Label of the metric's axis.
    """
    with _style():
        figure, (axes,) = _make_panels(1)
        for index, point in enumerate(points):
            color, marker = _SERIES[index % len(_SERIES)], _MARKERS[index % len(_MARKERS)]
            (x, across), (y, up) = _mean_and_std(point.seconds), _mean_and_std(point.values)
            bars: dict[str, Any] = {"elinewidth": 1.2, "capsize": 3, "markersize": 7, "linestyle": "none"}
            bars["markerfacecolor"] = "none" if point.hollow else color
            axes.errorbar(x, y, xerr=across, yerr=up, color=color, marker=marker, label=_shorten(point.name), **bars)
        costs = [_mean_and_std(point.seconds)[0] for point in points]
        if min(costs) > 0 and max(costs) > _MAX_LINEAR_RATIO * min(costs):
            axes.set_xscale("log")
        else:
            axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(LogLocator() if axes.get_xscale() == "log" else MaxNLocator(6))
        axes.set_xlabel("seconds of tuning, mean over seeds")
        axes.set_ylabel(f"{_shorten(metric_name)} on validation")
        figure.legend(loc="outside lower center", ncols=2)
        figure.set_figheight(figure.get_figheight() + 0.2 * (len(points) + 1) // 2)
        shown = (
            f"{_shorten(each.name)} {np.mean(each.values):.4g} at {np.mean(each.seconds):.3g} s" for each in points
        )
        return _to_plot(figure, f"{_shorten(metric_name)} on validation against cost: {'; '.join(shown)}.", name="cost")


def to_standalone_svg(plot: Plot) -> str:
    """Return a plot as a file of its own, on white, in the light colors of the page."""
    text = str(plot.svg).replace("<svg ", f"<svg {_NAMESPACES} ", 1)
    opening, _, rest = text.partition(">")
    for variable, color in _LIGHT.items():
        rest = rest.replace(f"var({variable})", color)
    return f'{opening}><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'


def _mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and, for two values or more, the standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _style() -> Any:
    return matplotlib.style.context(["default", _STYLE])


def _make_panels(*heights: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH_IN, max(3.6, 1.3 * len(heights))), layout="constrained")
    grid = figure.subplots(len(heights), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    panels = list(grid[:, 0])
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, panels


def _draw_line(axes: Axes, epochs: Sequence[Mapping[str, Any]], values: list[float], name: str, series: int) -> None:
    marker = "o" if len(epochs) <= _MAX_MARKERS else ""
    style: Any = _DASHES[series]
    numbers = _epoch_numbers(epochs)
    axes.plot(
        numbers, values, color=_SERIES[series], linestyle=style, marker=marker, markersize=3, label=_shorten(name)
    )


def _mark_best_epochs(axes: Axes, epochs: Sequence[Mapping[str, Any]], series: list[float]) -> None:
    """Draw a ring at the best epoch of each phase."""
    best = {str(entry.get("phase")): index for index, entry in enumerate(epochs) if entry.get("best")}
    places = [_epoch_numbers(epochs)[index] for index in best.values()]
    heights = [series[index] for index in best.values()]
    label = "best of its phase"
    axes.scatter(places, heights, s=70, facecolors="none", edgecolors=_INK, zorder=3, clip_on=False, label=label)


def _shade_phases(figure: Figure, panels: Sequence[Axes], epochs: Sequence[Mapping[str, Any]]) -> None:
    """Shade a band for each phase, with its name above it: horizontal if it fits, else vertical, else omitted."""
    pairs = zip(epochs, _epoch_numbers(epochs), strict=True)
    grouped = groupby(pairs, lambda pair: str(pair[0].get("phase", "")))
    phases = [(_shorten(name), [number for _, number in each]) for name, each in grouped]
    room_pt = 0.84 * 72 * _WIDTH_IN / len(epochs)
    level = all(_LETTER_PT * len(name) <= room_pt * len(numbers) for name, numbers in phases)
    if not level:
        figure.set_figheight(figure.get_figheight() + _LETTER_PT * _MAX_VERTICAL_LENGTH / 72)
    for index, (name, numbers) in enumerate(phases):
        start, end = numbers[0] - 0.5, numbers[-1] + 0.5
        for axes in panels:
            axes.axvspan(start, end, facecolor=_INK, alpha=(0.09, 0.03)[index % 2], linewidth=0, zorder=0)
        if level or room_pt * len(numbers) >= 2 * _LETTER_PT:
            place: dict[str, Any] = {"transform": panels[0].get_xaxis_transform(), "ha": "center", "va": "bottom"}
            shown = name if level else _shorten(name, max_length=_MAX_VERTICAL_LENGTH)
            panels[0].text((start + end) / 2, 1.02, shown, rotation=0 if level else 90, fontsize=9, **place)
    panels[0].set_xlim(phases[0][1][0] - 0.5, phases[-1][1][-1] + 0.5)


def _epoch_numbers(epochs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(entry.get("epoch", index)) for index, entry in enumerate(epochs, start=1)]


def _metric_series(epochs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [_to_float(entry.get("val", {}).get(name)) for entry in epochs]


def _to_float(value: Any) -> float:
    """Return a finite number as it is, and NaN for anything else, which leaves a gap in the curve."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _describe_change(series: list[float]) -> str:
    known = [value for value in series if math.isfinite(value)]
    return f"from {known[0]:.4g} to {known[-1]:.4g}" if known else "NaN or Inf"


def _shorten(name: str, *, max_length: int = _MAX_NAME_LENGTH) -> str:
    """Return a name on one line, without characters that fonts and XML cannot represent."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", " ", name).split())
    text = text if len(text) <= max_length else text[: max_length - 1] + "…"
    return text if not text.startswith("_") else "\u2009" + text  # matplotlib hides labels that begin with _


def _to_plot(figure: Figure, alt: str, *, name: str) -> Plot:
    """Return the plot as one <svg> element whose ids begin with `name`, so that a page can hold several."""
    buffer = io.StringIO()
    with warnings.catch_warnings():  # a name in another script: the browser has a font for it where matplotlib has none
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    inside = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    inside = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", inside, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        inside = inside.replace(color, f"var({variable})")
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", inside)
    width, height = (72 * side for side in figure.get_size_inches())
    opening = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(width, height, alt)
    drawn = Markup(inside)  # noqa: S704 - matplotlib escapes what it writes
    return Plot(opening + drawn + Markup("</svg>"), alt)
