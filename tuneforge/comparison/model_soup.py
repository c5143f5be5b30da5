"""Greedy soup: the average of tuned models, each added where validation does not fall; nothing is trained.

Wortsman et al. 2022, "Model soups", arXiv 2203.05482, recipe 1: the models are sorted by validation, the best one is
the soup, and each further one joins it if the uniform average with it is at least as good on validation.

The running statistics of a BatchNorm are averaged with the weights and not computed again from data, so that nothing
but validation is looked at; where that does not fit, validation falls and the model stays out. Counts are the last
one's.
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
    """What is in the soup so far.

    Args:
        state: The average of the ingredients.
        metrics: Of it on validation.
        ingredients: Runs that it is made of, the first one the best.
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
    """Make the soup of some runs and save it as the folder of a run that is done; that of the same runs is read.

    Args:
        runs: Finished runs on the same data, judged by the same figure.
        soup_dir: Where it is written: `tuneforge predict`, `evaluate` and `report` take it as they take a run.
        data: The data source, where the runs were given one as an object.
        model: The module, where they were given one as an object; it stays as it is.
        metrics: Metrics that they were given as objects.
        device_name: Where to compute.

    Returns:
        `value` on validation, names of the `ingredients`, of the runs `candidates`, the best first, and of those
        `skipped`: their model has another shape than the best one's.
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
    """Add one model after the other, each where the figure does not fall."""
    monitor, mode = ordered[0].monitor, ordered[0].mode
    state, _ = load_tensors(ordered[0].run_dir / names.WEIGHTS)
    soup = _Soup(state, _evaluate_state(run, state), [ordered[0]])
    for each in ordered[1:]:
        state, _ = load_tensors(each.run_dir / names.WEIGHTS)
        tasted = interpolate(soup.state, state, 1 / (len(soup.ingredients) + 1))
        figures = _evaluate_state(run, tasted)
        if sort_key(figures[monitor], mode) <= sort_key(soup.metrics[monitor], mode):
            soup = _Soup(tasted, figures, [*soup.ingredients, each])
    return soup


def _evaluate_state(run: Run, state: Snapshot) -> dict[str, Any]:
    load_state_dict(run.model.module, state, where="the soup")
    return evaluate(run, run.data.val, "val")


def _signature(run: FinishedRun) -> tuple[Any, ...]:
    """What models must share to be averaged: classes, contracts, and the name and shape of every tensor."""
    record = names.read_json(run.run_dir / names.MODEL)
    tensors, _ = load_tensors(run.run_dir / names.WEIGHTS)
    return (*(record[key] for key in _MUST_MATCH), {name: tensor.shape for name, tensor in tensors.items()})


def _save(soup: _Soup, summary: Mapping[str, Any], soup_dir: Path, *, labels: Sequence[str]) -> None:
    """Write the folder; the status comes last, so that a half-written one is made again."""
    best = soup.ingredients[0]
    soup_dir.mkdir(parents=True, exist_ok=True)
    for name in _COPIED_FILES:
        names.atomic_write(soup_dir / name, (best.run_dir / name).read_bytes())
    save_tensors(soup.state, soup_dir / names.WEIGHTS, metadata={"labels": labels})
    before = names.read_json(best.run_dir / names.REPORT)
    kept = {key: before[key] for key in ("monitor", "primary_metrics", "num_samples")}
    report = {"strategy": SOUP, **kept, "splits": {"val": soup.metrics}, "soup": summary}
    names.write_json(soup_dir / names.REPORT, report)
    names.write_json(soup_dir / names.STATUS, {"state": "done"})


def _relative_name(run: FinishedRun, folder: Path) -> str:
    return str(run.run_dir.relative_to(folder.parent))
