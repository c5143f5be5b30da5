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
from tuneforge.comparison.ranking import Finished, ahead_of
from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.evaluation import evaluate
from tuneforge.engine.loop.head_fit import Snapshot, mixed
from tuneforge.engine.session.predictor import load, with_data
from tuneforge.engine.session.resume import BRIEF
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.safetensors_io import load_state, load_tensors, save_tensors

_SAME = ("head", "labels", "groups", "inputs", "targets")
_COPIED = (names.RUN, names.MODEL, BRIEF)


@attrs.define(eq=False)
class _Pot:
    """What is in the soup so far.

    Args:
        state: The average of the ingredients.
        figures: Of it on validation.
        ingredients: Runs that it is made of, the first one the best.
    """

    state: Snapshot
    figures: Mapping[str, Any]
    ingredients: list[Finished]


def greedy_soup(
    runs: Sequence[Finished],
    folder: Path,
    *,
    data: Any = None,
    model: Any = None,
    metrics: Iterable[Any] = (),
    device_name: str = "auto",
) -> dict[str, Any]:
    """Make the soup of some runs and save it as the folder of a run that is done; that of the same runs is read.

    Args:
        runs: Finished runs on the same data, judged by the same figure.
        folder: Where it is written: `tuneforge predict`, `evaluate` and `report` take it as they take a run.
        data: The data source, where the runs were given one as an object.
        model: The module, where they were given one as an object; it stays as it is.
        metrics: Metrics that they were given as objects.
        device_name: Where to compute.

    Returns:
        `value` on validation, names of the `ingredients`, of the runs `tried`, the best first, and of those `left_out`:
        their model has another shape than the best one's.
    """
    ordered = sorted(runs, key=lambda run: ahead_of(run.value, run.mode))
    if (folder / names.STATUS).exists():
        made: dict[str, Any] = names.read_json(folder / names.REPORT)["soup"]
        if {*made["tried"], *made["left_out"]} == {_name(each, folder) for each in ordered}:
            return made
        (folder / names.STATUS).unlink()
    alike = [run for run in ordered if _shape(run) == _shape(ordered[0])]
    tuned = load(ordered[0].folder, model=copy.deepcopy(model), device_name=device_name)
    run = with_data(tuned, data=data, metrics=metrics)
    pot = _cook(run, alike)
    made = {
        "name": SOUP,
        "value": pot.figures[alike[0].monitor],
        "ingredients": [_name(each, folder) for each in pot.ingredients],
        "tried": [_name(each, folder) for each in alike],
        "left_out": [_name(each, folder) for each in ordered if each not in alike],
        "folder": folder.name,
    }
    _save(pot, made, folder, labels=run.model.labels)
    return made


def _cook(run: Run, ordered: Sequence[Finished]) -> _Pot:
    """Add one model after the other, each where the figure does not fall."""
    monitor, mode = ordered[0].monitor, ordered[0].mode
    state, _ = load_tensors(ordered[0].folder / names.WEIGHTS)
    pot = _Pot(state, _figures(run, state), [ordered[0]])
    for each in ordered[1:]:
        state, _ = load_tensors(each.folder / names.WEIGHTS)
        tasted = mixed(pot.state, state, 1 / (len(pot.ingredients) + 1))
        figures = _figures(run, tasted)
        if ahead_of(figures[monitor], mode) <= ahead_of(pot.figures[monitor], mode):
            pot = _Pot(tasted, figures, [*pot.ingredients, each])
    return pot


def _figures(run: Run, state: Snapshot) -> dict[str, Any]:
    load_state(run.model.module, state, where="the soup")
    return evaluate(run, run.data.val, "val")


def _shape(run: Finished) -> tuple[Any, ...]:
    """What models must share to be averaged: classes, contracts, and the name and shape of every tensor."""
    record = names.read_json(run.folder / names.MODEL)
    tensors, _ = load_tensors(run.folder / names.WEIGHTS)
    return (*(record[key] for key in _SAME), {name: tensor.shape for name, tensor in tensors.items()})


def _save(pot: _Pot, made: Mapping[str, Any], folder: Path, *, labels: Sequence[str]) -> None:
    """Write the folder; the status comes last, so that a half-written one is made again."""
    best = pot.ingredients[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        names.write_whole(folder / name, (best.folder / name).read_bytes())
    save_tensors(pot.state, folder / names.WEIGHTS, metadata={"labels": labels})
    before = names.read_json(best.folder / names.REPORT)
    kept = {key: before[key] for key in ("monitor", "headline", "samples")}
    report = {"strategy": SOUP, **kept, "splits": {"val": pot.figures}, "soup": made}
    names.write_json(folder / names.REPORT, report)
    names.write_json(folder / names.STATUS, {"state": "done"})


def _name(run: Finished, folder: Path) -> str:
    return str(run.folder.relative_to(folder.parent))
