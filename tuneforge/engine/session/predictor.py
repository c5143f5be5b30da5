"""A finished run put to use: load its model from the folder alone, predict with it, evaluate it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Data, Inputs, Split, Targets, map_inputs
from tuneforge.engine.loop.build import part
from tuneforge.engine.loop.evaluation import evaluate as evaluate_split
from tuneforge.engine.model import device
from tuneforge.engine.model.model import Model, answer_of
from tuneforge.engine.session import from_objects as given
from tuneforge.engine.storage import run_dir as folder
from tuneforge.engine.storage.safetensors_io import load_state, load_tensors
from tuneforge.errors import DataError, FolderError
from tuneforge.plugin.config import RunConfig, resolve
from tuneforge.plugin.hooks import Hooks, implementations
from tuneforge.plugin.steps import Use


@attrs.frozen(eq=False)
class Tuned:
    """A tuned model with its two contracts: it takes raw things and gives answers for people.

    Args:
        path: The run's folder.
        run: A run that only looks: no data splits, nothing is written.
        inputs: How raw things become tensors.
        targets: How answers are read.
    """

    path: Path
    run: Run
    inputs: Inputs
    targets: Targets

    @property
    def model(self) -> Model:
        """The tuned model, in eval mode."""
        return self.run.model

    def outputs(self, raws: Iterable[Any], *, batch_size: int = 64) -> Iterator[Tensor]:
        """The model's output (k,) for each raw thing, on the CPU, in order.

        Raises:
            DataError: One of them cannot be decoded.
        """
        remaining = iter(raws)
        while chunk := list(islice(remaining, batch_size)):
            stored = _stacked([self.inputs.decode(raw) for raw in chunk])
            with torch.inference_mode():
                ready = self.inputs.ready(map_inputs(stored, self.run.device.move))
                yield from answer_of(self.run.forward(self.run.place(ready))).float().cpu()

    def predict(self, raws: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The answer for each raw thing as plain data, such as class and probabilities."""
        for output in self.outputs(raws):
            yield self.targets.describe(output)


def load(path: str | Path, *, model: Any = None, device_name: str = "auto") -> Tuned:
    """Load a finished run.

    Args:
        path: The run's folder.
        model: The module, where the run was given one as an object; it is built from the folder otherwise.
        device_name: Where to compute.

    Raises:
        FolderError: The folder holds no finished run, or the weights do not fit.
        PluginLoadError: A component that the model is built with is not installed.
    """
    path = Path(path)
    require_done(path)
    record = folder.read_json(path / folder.MODEL)
    table = folder.read_json(path / folder.RUN, "config")["config"]
    table.pop("out", None)
    config = resolve({**table, "device": device_name}, where=str(path / folder.RUN))
    inputs, targets = (_contract(group, record[group]) for group in ("inputs", "targets"))
    run = Run(
        config=config, folder=None, device=device.choose(device_name), hooks=_hooks(config, model), restoring=True
    )
    run.take_data(_placeholder(record, inputs, targets))
    built = run.hooks.call.model_adapt(run=run, model=None)
    run.take_model(attrs.evolve(built, kept=built.labels, pretrained=True))  # which the weights make true
    tensors, _ = load_tensors(path / folder.WEIGHTS)
    load_state(run.model.module, tensors, where=str(path / folder.WEIGHTS))
    run.model.module.eval()
    return Tuned(path, run, inputs, targets)


def require_done(path: Path) -> None:
    """Refuse a run that has no result yet.

    Raises:
        FolderError: It holds no run, or one that is running, stopped or failed.
    """
    status = folder.read_json(path / folder.STATUS)
    if (state := status["state"]) != "done":
        go_on = f"go on with it: tuneforge resume {shlex.quote(str(path))}"
        fixes = {"running": f"wait for it, or {go_on}", "stopped": go_on}
        raise FolderError(
            f"the run in '{path}' is not done",
            where=folder.STATUS,
            why=f"it is {state}" + (f": {status['reason']}" if status.get("reason") else ""),
            fix=fixes.get(state, "see why, and begin again with tuneforge run"),
        )


def predict(path: str | Path, raws: Iterable[Any], *, model: Any = None) -> Iterator[dict[str, Any]]:
    """Answers of a finished run for raw things: files, bytes, arrays, or rows, as its inputs take them."""
    return load(path, model=model).predict(raws)


def evaluate(
    path: str | Path, *, data: Any = None, model: Any = None, metrics: Iterable[Any] = (), device_name: str = "auto"
) -> dict[str, Any]:
    """Evaluate a finished run again, on its own data or on others.

    Args:
        path: The run's folder.
        data: Another data source, as `Engine` takes it; None prepares the run's own again.
        model: The module, where the run was given one as an object.
        metrics: Metrics by name, or instances; by default those of the run.
        device_name: Where to compute.

    Returns:
        Figures of every split but the training split, by name of the split.

    Raises:
        DataError: The data's classes are not the model's.
    """
    run = with_data(load(path, model=model, device_name=device_name), data=data, metrics=metrics)
    splits = {name: split for name, split in run.data.splits().items() if name != "train"}
    return {name: evaluate_split(run, split, name) for name, split in splits.items()}


def with_data(tuned: Tuned, *, data: Any = None, metrics: Iterable[Any] = ()) -> Run:
    """The run of a tuned model, with data and metrics, so that splits of it can be evaluated.

    Args:
        tuned: As `load` gives it.
        data: Another data source; None prepares the run's own again.
        metrics: By default those of the run.

    Raises:
        DataError: The data's classes are not the model's.
    """
    run = tuned.run
    member, _ = given.member("data_prepare", data if data is not None else run.config.data, where="--data")
    for asked in tuple(metrics) or run.config.evaluate or tuned.targets.metrics:
        run.hooks.add(given.member("evaluate", asked, where="--evaluate")[0])
    run.hooks.add(member)
    run.hooks.provider("data_prepare")
    prepared = run.hooks.call.data_prepare(run=run)
    _check_labels(prepared.targets.labels, tuned.targets.labels)
    run.take_data(attrs.evolve(prepared, inputs=_same_inputs(prepared.inputs, tuned.inputs), targets=tuned.targets))
    return run


def _hooks(config: RunConfig, model: Any) -> Hooks:
    """Everything that had a hand in building the model: its chain, and any other component that changed it."""
    hooks = Hooks()
    builders = [config.model if model is None else model, *config.adapt]
    if not any(use.name == "head" for use in config.adapt):
        builders.append(Use("head"))
    for asked in builders:
        hooks.add(given.member("model_adapt", asked, where="--model")[0])
    others = {"train_step": config.step, "finetune_strategy": config.strategy}
    for group, use in [*others.items(), *(("extension", each) for each in config.extensions)]:
        if use is not None and not use.name.startswith(given.__name__):
            member, _ = given.member(group, use, where=group)
            if any(each.hook == "model_adapt" for each in implementations(member)):
                hooks.add(member)
    return hooks


def _contract(group: str, record: dict[str, Any]) -> Any:
    return part(group, Use(record["name"], record["options"]))


def _placeholder(record: dict[str, Any], inputs: Inputs, targets: Targets) -> Data:
    """Data of the right shapes and nothing in it, so that builders can read shapes."""
    tensors = {
        name: torch.zeros(2, *shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in record["stored"].items()
    }
    split = Split(tensors[""] if set(tensors) == {""} else tensors, torch.zeros(2, dtype=torch.int64))
    return Data(train=split, val=split, test=split, inputs=inputs, targets=targets)


def _check_labels(found: tuple[str, ...], known: tuple[str, ...]) -> None:
    if found != known:
        extra, missing = sorted(set(found) - set(known)), sorted(set(known) - set(found))
        raise DataError(
            "the data's classes are not the model's",
            why=f"only in the data: {extra or 'none'}; only in the model: {missing or 'none'}; order matters too",
            fix="evaluate on data with the classes that the model was tuned for",
        )


def _same_inputs(found: Inputs, known: Inputs) -> Inputs:
    """The model's own contract: what is stored must fit it, else the evaluation would feed another input."""
    from tuneforge.plugin.component import values_of

    same = type(found) is type(known) and values_of(found) == values_of(known)
    if not same:
        raise DataError(
            "the data is prepared otherwise than the model's",
            why=f"the model was tuned with {known}, the data comes as {found}",
            fix="give the data source the options of the run (see config in run.json)",
        )
    return known


def _stacked(samples: list[Any]) -> Any:
    if isinstance(samples[0], Tensor):
        return torch.stack(samples)
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
