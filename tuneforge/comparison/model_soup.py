"""Greedy soup: an average of fine-tuned models, each added if the validation metric does not get worse.

Wortsman et al. 2022, "Model soups", arXiv 2203.05482, recipe 1: the models are sorted by the validation metric, the
best one is the first ingredient, and each further one is added if the uniform average with it is at least as good.

BatchNorm running statistics are averaged with the weights and not recomputed from data, so that only the validation
split is used; where that does not fit, the metric gets worse and the model is not added. Batch counts are those of the
last model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tuneforge.comparison.candidates import SOUP
from tuneforge.comparison.ranking import FinishedRun, sort_key
from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.evaluation import evaluate
from tuneforge.engine.loop.weight_average import Snapshot, interpolate
from tuneforge.engine.session.predictor import load
from tuneforge.engine.session.resume import TASK
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.safetensors_io import load_state_dict, load_tensors, save_tensors

_MUST_MATCH = ("head", "labels", "groups", "inputs", "targets")
_COPIED_FILES = (names.RUN, names.MODEL, TASK)


@attrs.define(eq=False)
class _Soup:
    """The soup so far.

    Args:
        state: The average of the ingredients' weights.
        metrics: Its metrics on the validation split.
        ingredients: The runs that were averaged, the best one first.
    """

    state: Snapshot
    metrics: Mapping[str, Any]
    ingredients: list[FinishedRun]


def greedy_soup(
    runs: Sequence[FinishedRun],
    soup_dir: Path,
    *,
    data: Any = None,
    model: Any = None,
    metrics: Iterable[Any] = (),
    device_name: str = "auto",
) -> dict[str, Any]:
    """Build the soup of some runs and save it as the directory of a finished run, or read that of the same runs.

    Args:
        runs: Finished runs on the same data that monitor the same metric.
        soup_dir: The output directory, which `tuneforge predict`, `evaluate` and `report` accept as a run.
        data: The data source, if the runs were given it as an object.
        model: The module, if the runs were given it as an object; it is not changed.
        metrics: The metrics that the runs were given as objects.
        device_name: The device to compute on.

    Returns:
        The `value` on the validation split and the names of the `ingredients`, of all `candidates`, best first, and
        of those `skipped` because their model has another shape than the best one's.
    """
    ordered = sorted(runs, key=lambda run: sort_key(run.value, run.mode))
    if (soup_dir / names.STATUS).exists():
        made: dict[str, Any] = names.read_json(soup_dir / names.REPORT)["soup"]
        if {*made["candidates"], *made["skipped"]} == {_relative_name(each, soup_dir) for each in ordered}:
            return made
        (soup_dir / names.STATUS).unlink()
    alike = [run for run in ordered if _signature(run) == _signature(ordered[0])]
    tuned = load(ordered[0].run_dir, model=copy.deepcopy(model), device_name=device_name)
    run = tuned.with_data(data, metrics=metrics)
    soup = _build_greedily(run, alike)
    made = {
        "name": SOUP,
        "value": soup.metrics[alike[0].monitor],
        "ingredients": [_relative_name(each, soup_dir) for each in soup.ingredients],
        "candidates": [_relative_name(each, soup_dir) for each in alike],
        "skipped": [_relative_name(each, soup_dir) for each in ordered if each not in alike],
        "run_dir": soup_dir.name,
    }
    _save(soup, made, soup_dir, labels=run.model.labels)
    return made


def _build_greedily(run: Run, ordered: Sequence[FinishedRun]) -> _Soup:
    """Add one model after the other if the metric does not get worse."""
    monitor, mode = ordered[0].monitor, ordered[0].mode
    state, _ = load_tensors(ordered[0].run_dir / names.WEIGHTS)
    soup = _Soup(state, _evaluate_state(run, state), [ordered[0]])
    for each in ordered[1:]:
        state, _ = load_tensors(each.run_dir / names.WEIGHTS)
        average = interpolate(soup.state, state, 1 / (len(soup.ingredients) + 1))
        metrics = _evaluate_state(run, average)
        if sort_key(metrics[monitor], mode) <= sort_key(soup.metrics[monitor], mode):
            soup = _Soup(average, metrics, [*soup.ingredients, each])
    return soup


def _evaluate_state(run: Run, state: Snapshot) -> dict[str, Any]:
    load_state_dict(run.model.module, state, where="the soup")
    return evaluate(run, run.data.val, "val")


def _signature(run: FinishedRun) -> tuple[Any, ...]:
    """Return what models must share to be averaged: labels, inputs, and the name and shape of every tensor."""
    record = names.read_json(run.run_dir / names.MODEL)
    tensors, _ = load_tensors(run.run_dir / names.WEIGHTS)
    return (*(record[key] for key in _MUST_MATCH), {name: tensor.shape for name, tensor in tensors.items()})


def _save(soup: _Soup, summary: Mapping[str, Any], soup_dir: Path, *, labels: Sequence[str]) -> None:
    """Write the directory; the status comes last, so that a partial one is built again."""
    best = soup.ingredients[0]
    soup_dir.mkdir(parents=True, exist_ok=True)
    for name in _COPIED_FILES:
        names.atomic_write(soup_dir / name, (best.run_dir / name).read_bytes())
    _, metadata = load_tensors(best.run_dir / names.WEIGHTS)  # which holds the extra state of modules
    save_tensors(soup.state, soup_dir / names.WEIGHTS, metadata={**metadata, "labels": labels})
    before = names.read_json(best.run_dir / names.REPORT)
    kept = {key: before[key] for key in ("monitor", "primary_metrics", "num_samples")}
    report = {"strategy": SOUP, **kept, "splits": {"val": soup.metrics}, "soup": summary}
    names.write_json(soup_dir / names.REPORT, report)
    names.write_json(soup_dir / names.STATUS, {"state": "done"})


def _relative_name(run: FinishedRun, folder: Path) -> str:
    return str(run.run_dir.relative_to(folder.parent))
