"""Write `report.html` of a finished run: one self-contained file, rendered from the run directory alone."""

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
import tomli_w

from tuneforge.engine.loop.metric_set import scalar_metrics
from tuneforge.engine.session import messages as story
from tuneforge.engine.storage import run_dir as names
from tuneforge.plugin.results import Diagnostics, StrategyStepResult
from tuneforge.plugin.serialization import from_json
from tuneforge.report import plots as plots
from tuneforge.report.confusions import build_confusion, list_confusions

NON_FINITE = "NaN or Inf"
_MAX_EXPANDED_CLASSES = 60
_MAX_LISTED_CLASSES = 1_000
_SPLITS = {"train": "training", "val": "validation"}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the directory of a finished run, deterministically from the run's files.

    Args:
        run_dir: A directory that `tuneforge run` wrote.

    Returns:
        The path of the report.

    Raises:
        FolderError: The directory holds no run, or it cannot be written.
    """
    page = run_dir / names.REPORT_HTML
    html = _load_template().render(**_build_context(_RunRecord.read(run_dir)))
    # Ids are paths, and a path may hold what HTML or UTF-8 cannot.
    html = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", html)
    names.atomic_write(page, html.encode(errors="backslashreplace"))
    return page


@attrs.frozen
class _RunRecord:
    """The files of a run directory, parsed.

    Args:
        name: The directory as commands name it.
        run: `run.json`: configuration, components, environment.
        model: `model.json`: layer groups, changes, fingerprints.
        report: `report.json`: the metrics of every split.
        hardest_samples: Test samples with the highest loss; None if they were not recorded.
        epochs: Metrics of each epoch.
        epoch_seconds: Duration of each epoch.
        steps: Each strategy step with its result.
    """

    name: str
    run: Mapping[str, Any]
    model: Mapping[str, Any]
    report: Mapping[str, Any]
    hardest_samples: Sequence[Mapping[str, Any]] | None
    epochs: Sequence[Mapping[str, Any]]
    epoch_seconds: Mapping[int, float]
    steps: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> _RunRecord:
        """Read the files. A missing file counts as empty, but run.json or report.json must exist."""
        if not (folder / names.RUN).exists() and not (folder / names.REPORT).exists():
            names.read_json(folder / names.REPORT)
        run = _read(folder / names.RUN, {})
        return cls(
            name=_display_path(folder, run.get("config", {}).get("out")),
            run=run,
            model=_read(folder / names.MODEL, {}),
            report=_read(folder / names.REPORT, {}),
            hardest_samples=_read(folder / names.HARDEST_SAMPLES, None),
            epochs=_read_lines(folder / names.METRICS),
            epoch_seconds={line["epoch"]: line["seconds"] for line in _read_lines(folder / names.TIMINGS)},
            steps=_read_lines(folder / names.STRATEGY_STEPS),
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        return dict(self.run.get("config") or {})

    @property
    def splits(self) -> Mapping[str, Mapping[str, Any]]:
        """Metrics by split."""
        return dict(self.report.get("splits") or {})

    @property
    def monitor(self) -> str:
        """The monitored validation metric."""
        return str(self.report.get("monitor") or "")

    @property
    def primary_metrics(self) -> list[str]:
        """The metrics that get a column: those the targets name, else the first four scalar metrics."""
        known = list(self.splits.values())
        named = [name for name in self.report.get("primary_metrics") or () if any(name in each for each in known)]
        return named or list(scalar_metrics(known[0]) if known else ())[:4]

    def num_samples(self, split: str) -> int | None:
        """Number of samples of a split."""
        count = (self.report.get("num_samples") or {}).get(split)
        return None if count is None else int(count)


def format_metric(value: Any) -> str:
    """Format a metric; NaN and Inf become "NaN or Inf"."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NON_FINITE
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def format_duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200)):
        if seconds < most:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _load_template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        metric=format_metric, duration=format_duration, split=lambda name: _SPLITS.get(name, name)
    )
    return environment.get_template("report.html.j2")


def _build_context(record: _RunRecord) -> dict[str, Any]:
    return {
        "heading": _build_heading(record),
        "result": _build_result(record),
        "weakest": _weakest_class(record),
        "curves": _plot_curves(record),
        "epochs": record.epochs,
        "seconds": record.epoch_seconds,
        "steps": _build_steps(record),
        "stop_reason": record.report.get("stop_reason"),
        "never_updated": _unchanged_parameters(record),
        "monitor": record.monitor,
        "classes": _build_class_table(record),
        "confusion": build_confusion(_test_metrics(record), record.model.get("labels") or ()),
        "outputs": _test_metrics(record).get("per_output"),
        "hardest_samples": _hardest_samples(record),
        "data": _build_data_section(record),
        "model": _build_model_section(record),
        "config": tomli_w.dumps(_without_none(record.config)),
        "environment": _build_environment(record),
        "components": [dict(each) for each in record.run.get("components") or ()],
        "run": record.name,
    }


def _build_heading(record: _RunRecord) -> dict[str, Any]:
    chosen = {key: (record.config.get(key) or {}).get("name") or "?" for key in ("data", "model", "strategy")}
    return {
        **chosen,
        "strategy": record.report.get("strategy") or chosen["strategy"],
        "epochs": len(record.epochs),
        "seconds": sum(record.epoch_seconds.values()),
        "parameters": sum(group["parameters"] for group in record.model.get("groups") or ()),
        "version": record.run.get("tuneforge"),
    }


def _build_result(record: _RunRecord) -> dict[str, Any]:
    """Collect the metrics of every split: the primary ones, and all scalars (null stands for NaN or Inf)."""
    splits = record.splits
    known = dict.fromkeys(name for metrics in splits.values() for name in metrics)
    values = {name: [metrics.get(name) for metrics in splits.values()] for name in known}
    every = [name for name in known if all(each is None or isinstance(each, (int, float)) for each in values[name])]
    return {
        "columns": record.primary_metrics,
        "rows": [(name, record.num_samples(name), metrics) for name, metrics in splits.items()],
        "every": every,
        "ece": _test_metrics(record).get("ece"),
    }


def _weakest_class(record: _RunRecord) -> dict[str, Any] | None:
    """Return the test class with the lowest recall, and what it was most often predicted as."""
    seen = [(name, row) for name, row in _per_class(record) if row.get("support") and row.get("recall") is not None]
    if not seen:
        return None
    name, row = min(seen, key=lambda pair: pair[1]["recall"])
    weakest = {"name": name, "recall": row["recall"], "support": row["support"], "confused_with": None}
    weakest["found"] = round(row["recall"] * row["support"])
    listed = list_confusions(_test_metrics(record), record.model.get("labels") or ())
    confusions = [each for each in listed if each["label"] == name and each["count"] > 1]
    return weakest | ({"confused_with": confusions[0]} if confusions else {})


def _plot_curves(record: _RunRecord) -> list[plots.Plot]:
    if not record.epochs:
        return []
    drawn = list(dict.fromkeys([*record.primary_metrics[:5], *filter(None, [record.monitor])]))
    of_validation = plots.plot_metrics(record.epochs, drawn, monitor=record.monitor)
    return [plots.plot_losses(record.epochs), *([of_validation] if of_validation else [])]


def _build_steps(record: _RunRecord) -> list[dict[str, Any]]:
    """Describe each strategy step, with its epochs numbered over the whole run."""
    out, before = [], 0
    for line in record.steps:
        step, result = line["step"], line["result"]
        told = {"kind": story.step_kind(step), "name": step.name, "what": story.describe_step(step), "why": step.why}
        if isinstance(result, Diagnostics):
            out.append({**told, "result": None, "diagnostics": dict(result.values)})
            continue
        assert isinstance(result, StrategyStepResult)
        numbers = range(before + 1, before + result.epochs + 1)
        seconds = [record.epoch_seconds[number] for number in numbers if number in record.epoch_seconds]
        timing = {"first": before + 1, "last": before + result.epochs, "seconds": sum(seconds) if seconds else None}
        out.append({**told, **timing, "result": result, "monitor": result.val.get(record.monitor), "diagnostics": {}})
        before += result.epochs
    return out


def _unchanged_parameters(record: _RunRecord) -> list[tuple[Sequence[str], list[str]]]:
    """Return the tensors that had a learning rate and never changed, with the steps concerned."""
    steps: dict[tuple[str, ...], list[str]] = {}
    for line in record.steps:
        if isinstance(line["result"], StrategyStepResult) and line["result"].never_updated:
            steps.setdefault(line["result"].never_updated, []).append(line["step"].name)
    return list(steps.items())


def _build_class_table(record: _RunRecord) -> dict[str, Any] | None:
    """Return the classes of the test split, lowest recall first, those without samples last."""
    rows = sorted(_per_class(record), key=lambda pair: (not pair[1].get("support"), pair[1].get("recall") or 0.0))
    folded = len(rows) > _MAX_EXPANDED_CLASSES
    return {"rows": rows[:_MAX_LISTED_CLASSES], "total": len(rows), "folded": folded} if rows else None


def _hardest_samples(record: _RunRecord) -> dict[str, Any] | None:
    if record.hardest_samples is None or "test" not in record.splits:
        return None
    are_numbers = any(
        "value" in each["prediction"] or "values" in each["prediction"] for each in record.hardest_samples
    )
    shown = [
        {
            "id": str(each.get("id", "")),
            "label": str(each.get("label", "")),
            "prediction": _format_prediction(each["prediction"]),
            "probability": each["prediction"].get("probability"),
            "label_probability": (each["prediction"].get("probabilities") or {}).get(each.get("label")),
            "image": each.get("image"),
            "text": each.get("text"),
        }
        for each in record.hardest_samples
    ]
    title = "Hardest samples"
    are_images = any(each["image"] for each in shown)
    return {"shown": shown, "title": title, "are_numbers": are_numbers, "are_images": are_images}


def _format_prediction(prediction: Mapping[str, Any]) -> str:
    """Format a prediction of any kind of targets."""
    if "class" in prediction:
        return str(prediction["class"]) if prediction["class"] is not None else NON_FINITE
    if "labels" in prediction:
        return ", ".join(prediction["labels"]) or "none"
    if "value" in prediction:
        return _format_with_unit(prediction["value"], prediction.get("unit"))
    if "values" in prediction:
        units = prediction.get("units") or {}
        return ", ".join(
            f"{name} {_format_with_unit(value, units.get(name))}" for name, value in prediction["values"].items()
        )
    return story.truncate_text(json.dumps(prediction, sort_keys=True))


def _format_with_unit(value: Any, unit: Any) -> str:
    return f"{value:.6g} {unit or ''}".strip() if isinstance(value, (int, float)) else NON_FINITE


def _build_data_section(record: _RunRecord) -> dict[str, Any]:
    prints = record.model.get("fingerprints") or {}
    splits = dict.fromkeys([*(record.report.get("num_samples") or {}), *prints])
    return {
        "splits": [(name, record.num_samples(name), str(prints.get(name) or "")[:12]) for name in splits],
        "notes": list(record.model.get("notes") or ()),
        "labels": len(record.model.get("labels") or ()),
        "parts": [
            f"{key} {record.model[key]['name']}" for key in ("inputs", "targets") if "name" in record.model.get(key, {})
        ],
        "input_specs": [_format_tensor_spec(*item) for item in (record.model.get("input_specs") or {}).items()],
    }


def _format_tensor_spec(name: str, kind: Sequence[Any]) -> str:
    shape, dtype = kind
    sizes = "x".join(map(str, shape)) or "one number"
    return f"{name} {sizes} {dtype.removeprefix('torch.')}".strip()


def _build_model_section(record: _RunRecord) -> dict[str, Any]:
    groups = record.model.get("groups") or ()
    return {
        "groups": groups,
        "total": sum(group["parameters"] for group in groups),
        "changes": list(record.model.get("changes") or ()),
    }


def _build_environment(record: _RunRecord) -> dict[str, str]:
    given = {"tuneforge": record.run.get("tuneforge"), **(record.run.get("environment") or {})}
    words = {name: str(value) for name, value in given.items() if value is not None and name != "command"}
    command = [str(each) for each in given.get("command") or ()]
    return words | ({"command": shlex.join([PurePath(command[0]).name, *command[1:]])} if command else {})


def _test_metrics(record: _RunRecord) -> Mapping[str, Any]:
    return record.splits.get("test") or {}


def _per_class(record: _RunRecord) -> list[tuple[str, Mapping[str, Any]]]:
    return list((_test_metrics(record).get("per_class") or {}).items())


def _read(path: Path, default: Any) -> Any:
    return names.read_json(path) if path.exists() else default


def _read_lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [from_json(line) for line in file if line.strip()]


def _display_path(folder: Path, out: str | None) -> str:
    """Return the directory as the user named it, without the home directory if possible, since reports are shared."""
    place = folder.resolve()
    given = out if out and PurePath(out).name == place.name else f"{place.parent.name}/{place.name}"
    return shlex.quote(given)


def _without_none(value: Any) -> Any:
    """Remove None, which TOML cannot represent."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value if item is not None] if isinstance(value, list) else value
