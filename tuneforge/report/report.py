"""The page of a finished run: `report.html`, one file that needs nothing else, made from the run's folder alone."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import attrs
import jinja2
import numpy as np
import tomli_w

from tuneforge.engine.loop.metric_set import single_numbers
from tuneforge.engine.session import messages as story
from tuneforge.engine.storage import run_dir as names
from tuneforge.plugin.results import Readings, Report
from tuneforge.plugin.serialization import from_json
from tuneforge.report import plots as pictures

NOT_A_NUMBER = "not a number"
_MOST_IN_MATRIX = 30
_MOST_OPEN = 60
_LARGEST_KEPT = 20
_SPLITS = {"train": "training", "val": "validation"}


def write_page(folder: Path) -> Path:
    """Write `report.html` into the folder of a finished run; the same files give the same bytes.

    Args:
        folder: As `tuneforge run` has written it.

    Returns:
        The path of the page.

    Raises:
        FolderError: The folder holds no run, or it cannot be written.
    """
    page = folder / names.PAGE
    html = _template().render(**_content(_Record.read(folder)))
    # Ids are paths, and a path may hold what HTML or UTF-8 cannot.
    html = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", html)
    names.write_whole(page, html.encode(errors="backslashreplace"))
    return page


@attrs.frozen
class _Record:
    """What a run's folder says.

    Args:
        name: How commands name the folder.
        run: `run.json`: configuration, components, environment.
        model: `model.json`: layer groups, changes, fingerprints.
        report: `report.json`: the figures of every split.
        mistakes: The worst answers on the test split; None where nobody looked.
        epochs: Each epoch's figures.
        seconds: How long each epoch took.
        steps: Each step with its answer.
    """

    name: str
    run: Mapping[str, Any]
    model: Mapping[str, Any]
    report: Mapping[str, Any]
    mistakes: Sequence[Mapping[str, Any]] | None
    epochs: Sequence[Mapping[str, Any]]
    seconds: Mapping[int, float]
    steps: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> _Record:
        """Read the files; one that is missing is empty, but without both the first and the last there is no run."""
        if not (folder / names.RUN).exists() and not (folder / names.REPORT).exists():
            names.read_json(folder / names.REPORT)
        run = _read(folder / names.RUN, {})
        return cls(
            name=_command_name(folder, run.get("config", {}).get("out")),
            run=run,
            model=_read(folder / names.MODEL, {}),
            report=_read(folder / names.REPORT, {}),
            mistakes=_read(folder / names.MISTAKES, None),
            epochs=_lines(folder / names.METRICS),
            seconds={line["epoch"]: line["seconds"] for line in _lines(folder / names.TIMINGS)},
            steps=_lines(folder / names.STEPS),
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        return dict(self.run.get("config") or {})

    @property
    def splits(self) -> Mapping[str, Mapping[str, Any]]:
        """Figures by split."""
        return dict(self.report.get("splits") or {})

    @property
    def monitor(self) -> str:
        """The validation figure that decided."""
        return str(self.report.get("monitor") or "")

    @property
    def headline(self) -> list[str]:
        """The figures worth a column: those the targets name, else the first that there are."""
        known = list(self.splits.values())
        named = [name for name in self.report.get("headline") or () if any(name in each for each in known)]
        return named or list(single_numbers(known[0]) if known else ())[:4]

    def samples(self, split: str) -> int | None:
        """Number of samples of a split."""
        count = (self.report.get("samples") or {}).get(split)
        return None if count is None else int(count)


def figure(value: Any) -> str:
    """A figure for people: what is no number is said in words."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOT_A_NUMBER
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200)):
        if seconds < most:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(figure=figure, duration=duration, split=lambda name: _SPLITS.get(name, name))
    return environment.get_template("report.html.j2")


def _content(record: _Record) -> dict[str, Any]:
    return {
        "heading": _heading(record),
        "result": _result(record),
        "weakest": _weakest(record),
        "curves": _curves(record),
        "epochs": record.epochs,
        "seconds": record.seconds,
        "steps": _steps(record),
        "ended": record.report.get("ended"),
        "unmoved": _unmoved(record),
        "monitor": record.monitor,
        "classes": _classes(record),
        "confusion": _confusion(record),
        "outputs": _test(record).get("per_output"),
        "mistakes": _mistakes(record),
        "data": _data(record),
        "model": _model(record),
        "config": tomli_w.dumps(_without_none(record.config)),
        "environment": _environment(record),
        "components": [dict(each) for each in record.run.get("components") or ()],
        "run": record.name,
    }


def _heading(record: _Record) -> dict[str, Any]:
    chosen = {key: (record.config.get(key) or {}).get("name") or "?" for key in ("data", "model", "strategy")}
    return {
        **chosen,
        "strategy": record.report.get("strategy") or chosen["strategy"],
        "epochs": len(record.epochs),
        "seconds": sum(record.seconds.values()),
        "parameters": sum(group["parameters"] for group in record.model.get("groups") or ()),
        "version": record.run.get("tuneforge"),
    }


def _result(record: _Record) -> dict[str, Any]:
    """Every split's figures: the headline, and all that are one number or null, which stands for no number."""
    splits = record.splits
    known = dict.fromkeys(name for figures in splits.values() for name in figures)
    values = {name: [figures.get(name) for figures in splits.values()] for name in known}
    every = [name for name in known if all(each is None or isinstance(each, (int, float)) for each in values[name])]
    return {
        "columns": record.headline,
        "rows": [(name, record.samples(name), figures) for name, figures in splits.items()],
        "every": every,
        "ece": _test(record).get("ece"),
    }


def _weakest(record: _Record) -> dict[str, Any] | None:
    """The class of the test split with the lowest recall, and what it was most often taken for."""
    seen = [(name, row) for name, row in _per_class(record) if row.get("support") and row.get("recall") is not None]
    if not seen:
        return None
    name, row = min(seen, key=lambda pair: pair[1]["recall"])
    weakest = {"name": name, "recall": row["recall"], "support": row["support"], "taken": None}
    weakest["found"] = round(row["recall"] * row["support"])
    taken = [each for each in _largest(record) if each["truth"] == name and each["count"] > 1]
    return weakest | ({"taken": taken[0]} if taken else {})


def _curves(record: _Record) -> list[pictures.Picture]:
    if not record.epochs:
        return []
    drawn = list(dict.fromkeys([*record.headline[:5], *filter(None, [record.monitor])]))
    of_validation = pictures.figures(record.epochs, drawn, monitor=record.monitor)
    return [pictures.losses(record.epochs), *([of_validation] if of_validation else [])]


def _steps(record: _Record) -> list[dict[str, Any]]:
    """What each step did, with the epochs it took counted over the whole run."""
    out, before = [], 0
    for line in record.steps:
        step, answer = line["step"], line["answer"]
        kind = type(step).__name__.lower()
        what = story.of_step(step).removeprefix(f"{kind} '{step.name}': ")
        told = {"kind": kind, "name": step.name, "what": what, "why": step.why}
        if isinstance(answer, Readings):
            out.append({**told, "answer": None, "readings": dict(answer.values)})
            continue
        assert isinstance(answer, Report)
        numbers = range(before + 1, before + answer.epochs + 1)
        seconds = [record.seconds[number] for number in numbers if number in record.seconds]
        timing = {"first": before + 1, "last": before + answer.epochs, "seconds": sum(seconds) if seconds else None}
        out.append({**told, **timing, "answer": answer, "monitor": answer.val.get(record.monitor), "readings": {}})
        before += answer.epochs
    return out


def _unmoved(record: _Record) -> list[tuple[Sequence[str], list[str]]]:
    """Tensors that had a rate and never moved, with the steps of which that is true."""
    steps: dict[tuple[str, ...], list[str]] = {}
    for line in record.steps:
        if isinstance(line["answer"], Report) and line["answer"].unmoved:
            steps.setdefault(line["answer"].unmoved, []).append(line["step"].name)
    return list(steps.items())


def _classes(record: _Record) -> dict[str, Any] | None:
    """The classes of the test split, the weakest first, those without a sample last."""
    rows = sorted(_per_class(record), key=lambda pair: (not pair[1].get("support"), pair[1].get("recall") or 0.0))
    return {"rows": rows, "folded": len(rows) > _MOST_OPEN} if rows else None


def _confusion(record: _Record) -> dict[str, Any] | None:
    """The confusion matrix of the test split: a table, or a picture and the largest confusions where it is large."""
    counts = np.asarray(_test(record).get("confusion") or [], dtype=np.float64)
    if not counts.size:
        return None
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size, right, total = len(counts), int(counts.trace()), int(counts.sum())
    content = {"names": _labels(record, size), "size": size, "right": right, "total": total}
    if size <= _MOST_IN_MATRIX:
        rows = zip(counts.astype(np.int64).tolist(), shares.tolist(), strict=True)
        cells = [list(zip(*row, strict=True)) for row in rows]
        return {**content, "cells": cells, "picture": None, "largest": []}
    alt = f"Confusion matrix of {size} classes: {right:,} of {total:,} answers lie on the diagonal, which is right."
    largest = _largest(record)[:_LARGEST_KEPT]
    return {**content, "cells": [], "picture": pictures.confusion(shares, alt=alt), "largest": largest}


def _largest(record: _Record) -> list[dict[str, Any]]:
    """The confusions of the test split, the most frequent first."""
    counts = np.asarray(_test(record).get("confusion") or [], dtype=np.int64)
    if not counts.size:
        return []
    labels, support = _labels(record, len(counts)), counts.sum(1)
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [
        {"truth": labels[row], "answer": labels[column], "count": int(wrong[row, column]), "of": int(support[row])}
        for row, column in pairs
    ]


def _mistakes(record: _Record) -> dict[str, Any] | None:
    if record.mistakes is None or "test" not in record.splits:
        return None
    are_numbers = any("value" in each["answer"] or "values" in each["answer"] for each in record.mistakes)
    shown = [
        {
            "id": str(each.get("id", "")),
            "truth": str(each.get("truth", "")),
            "answer": _answer_words(each["answer"]),
            "probability": each["answer"].get("probability"),
            "of_truth": (each["answer"].get("probabilities") or {}).get(each.get("truth")),
            "picture": each.get("picture"),
            "text": each.get("text"),
        }
        for each in record.mistakes
    ]
    title = "Worst answers" if are_numbers else "Worst mistakes"
    are_pictures = any(each["picture"] for each in shown)
    return {"shown": shown, "title": title, "are_numbers": are_numbers, "are_pictures": are_pictures}


def _answer_words(answer: Mapping[str, Any]) -> str:
    """An answer of any kind of targets, in words."""
    if "class" in answer:
        return str(answer["class"]) if answer["class"] is not None else NOT_A_NUMBER
    if "labels" in answer:
        return ", ".join(answer["labels"]) or "none"
    if "value" in answer:
        return _with_unit(answer["value"], answer.get("unit"))
    if "values" in answer:
        units = answer.get("units") or {}
        return ", ".join(f"{name} {_with_unit(value, units.get(name))}" for name, value in answer["values"].items())
    return story.shortened_text(json.dumps(answer, sort_keys=True))


def _with_unit(value: Any, unit: Any) -> str:
    return f"{value:.6g} {unit or ''}".strip() if isinstance(value, (int, float)) else NOT_A_NUMBER


def _data(record: _Record) -> dict[str, Any]:
    prints = record.model.get("fingerprints") or {}
    splits = dict.fromkeys([*(record.report.get("samples") or {}), *prints])
    return {
        "splits": [(name, record.samples(name), str(prints.get(name) or "")[:12]) for name in splits],
        "notes": list(record.model.get("notes") or ()),
        "labels": len(record.model.get("labels") or ()),
        "parts": [
            f"{key} {record.model[key]['name']}" for key in ("inputs", "targets") if "name" in record.model.get(key, {})
        ],
        "stored": [_stored_words(*item) for item in (record.model.get("stored") or {}).items()],
    }


def _stored_words(name: str, kind: Sequence[Any]) -> str:
    shape, dtype = kind
    sizes = "x".join(map(str, shape)) or "one number"
    return f"{name} {sizes} {dtype.removeprefix('torch.')}".strip()


def _model(record: _Record) -> dict[str, Any]:
    groups = record.model.get("groups") or ()
    return {
        "groups": groups,
        "total": sum(group["parameters"] for group in groups),
        "changes": list(record.model.get("changes") or ()),
    }


def _environment(record: _Record) -> dict[str, str]:
    given = {"tuneforge": record.run.get("tuneforge"), **(record.run.get("environment") or {})}
    words = {name: str(value) for name, value in given.items() if value is not None and name != "command"}
    command = [str(each) for each in given.get("command") or ()]
    return words | ({"command": shlex.join([PurePath(command[0]).name, *command[1:]])} if command else {})


def _test(record: _Record) -> Mapping[str, Any]:
    return record.splits.get("test") or {}


def _per_class(record: _Record) -> list[tuple[str, Mapping[str, Any]]]:
    return list((_test(record).get("per_class") or {}).items())


def _labels(record: _Record, size: int) -> list[str]:
    """Names of the classes in the order of the confusion matrix; numbers where they are not known."""
    for known in (record.model.get("labels") or (), [name for name, _ in _per_class(record)]):
        if len(known) == size:
            return [str(name) for name in known]
    return [str(number) for number in range(size)]


def _read(path: Path, default: Any) -> Any:
    return names.read_json(path) if path.exists() else default


def _lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [from_json(line) for line in file if line.strip()]


def _command_name(folder: Path, out: str | None) -> str:
    """The folder as the user named it; without a home directory where that can be avoided, since pages are sent on."""
    place = folder.resolve()
    given = out if out and PurePath(out).name == place.name else f"{place.parent.name}/{place.name}"
    return shlex.quote(given)


def _without_none(value: Any) -> Any:
    """Plain data without what TOML cannot say."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value if item is not None] if isinstance(value, list) else value
