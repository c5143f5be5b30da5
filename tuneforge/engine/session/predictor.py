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
from tuneforge.engine.loop.build import create_component
from tuneforge.engine.loop.evaluation import evaluate as evaluate_split
from tuneforge.engine.model import device
from tuneforge.engine.model.model import Model, extract_logits
from tuneforge.engine.session import from_objects
from tuneforge.engine.storage.run_dir import MODEL, RUN, STATUS, WEIGHTS, read_json
from tuneforge.engine.storage.safetensors_io import load_state_dict, load_tensors
from tuneforge.errors import DataError, FolderError
from tuneforge.plugin.config import RunConfig, resolve_config
from tuneforge.plugin.hooks import Hooks, find_hook_implementations
from tuneforge.plugin.steps import ComponentSpec


@attrs.frozen(eq=False)
class Predictor:
    """A tuned model with its two contracts: it takes raw things and gives answers for people.

    Args:
        run_dir: The run's folder.
        run: A run that only looks: no data splits, nothing is written.
        inputs: How raw things become tensors.
        targets: How answers are read.
    """

    run_dir: Path
    run: Run
    inputs: Inputs
    targets: Targets

    @property
    def model(self) -> Model:
        """The tuned model, in eval mode."""
        return self.run.model

    def predict_outputs(self, raw_inputs: Iterable[Any], *, batch_size: int = 64) -> Iterator[Tensor]:
        """The model's output (k,) for each raw thing, on the CPU, in order.

        Raises:
            DataError: One of them cannot be decoded.
        """
        remaining = iter(raw_inputs)
        while chunk := list(islice(remaining, batch_size)):
            samples = _stack([self.inputs.decode(raw) for raw in chunk])
            with torch.inference_mode():
                inputs = self.inputs.preprocess(map_inputs(samples, self.run.device.move))
                yield from extract_logits(self.run.forward(self.run.to_device(inputs))).float().cpu()

    def predict(self, raw_inputs: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The answer for each raw thing as plain data, such as class and probabilities."""
        for output in self.predict_outputs(raw_inputs):
            yield self.targets.describe(output)


def load(path: str | Path, *, model: Any = None, device_name: str = "auto") -> Predictor:
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
    record = read_json(path / MODEL)
    table = read_json(path / RUN, "config")["config"]
    table.pop("out", None)
    config = resolve_config({**table, "device": device_name}, where=str(path / RUN))
    inputs, targets = (_build_contract(group, record[group]) for group in ("inputs", "targets"))
    run = Run(
        config=config,
        run_dir=None,
        device=device.resolve_device(device_name),
        hooks=_build_hooks(config, model),
        restoring=True,
    )
    run.set_data(_placeholder_data(record, inputs, targets))
    built = run.hooks.call.model_adapt(run=run, model=None)
    run.set_model(attrs.evolve(built, pretrained_labels=built.labels, pretrained=True))  # which the weights make true
    tensors, _ = load_tensors(path / WEIGHTS)
    load_state_dict(run.model.module, tensors, where=str(path / WEIGHTS))
    run.model.module.eval()
    return Predictor(path, run, inputs, targets)


def require_done(path: Path) -> None:
    """Refuse a run that has no result yet.

    Raises:
        FolderError: It holds no run, or one that is running, stopped or failed.
    """
    status = read_json(path / STATUS)
    if (state := status["state"]) != "done":
        go_on = f"go on with it: tuneforge resume {shlex.quote(str(path))}"
        fixes = {"running": f"wait for it, or {go_on}", "stopped": go_on}
        raise FolderError(
            f"the run in '{path}' is not done",
            where=STATUS,
            why=f"it is {state}" + (f": {status['reason']}" if status.get("reason") else ""),
            fix=fixes.get(state, "see why, and begin again with tuneforge run"),
        )


def predict(path: str | Path, raw_inputs: Iterable[Any], *, model: Any = None) -> Iterator[dict[str, Any]]:
    """Answers of a finished run for raw things: files, bytes, arrays, or rows, as its inputs take them."""
    return load(path, model=model).predict(raw_inputs)


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
    run = attach_data(load(path, model=model, device_name=device_name), data=data, metrics=metrics)
    splits = {name: split for name, split in run.data.splits().items() if name != "train"}
    return {name: evaluate_split(run, split, name) for name, split in splits.items()}


def attach_data(predictor: Predictor, *, data: Any = None, metrics: Iterable[Any] = ()) -> Run:
    """The run of a tuned model, with data and metrics, so that splits of it can be evaluated.

    Args:
        predictor: As `load` gives it.
        data: Another data source; None prepares the run's own again.
        metrics: By default those of the run.

    Raises:
        DataError: The data's classes are not the model's.
    """
    run = predictor.run
    member, _ = from_objects.resolve_member(
        "data_prepare", data if data is not None else run.config.data, where="--data"
    )
    for metric in tuple(metrics) or run.config.metrics or predictor.targets.metrics:
        run.hooks.add(from_objects.resolve_member("evaluate", metric, where="--metrics")[0])
    run.hooks.add(member)
    run.hooks.get_provider("data_prepare")
    prepared = run.hooks.call.data_prepare(run=run)
    _check_labels(prepared.targets.labels, predictor.targets.labels)
    run.set_data(
        attrs.evolve(prepared, inputs=_check_inputs(prepared.inputs, predictor.inputs), targets=predictor.targets)
    )
    return run


def _build_hooks(config: RunConfig, model: Any) -> Hooks:
    """Everything that had a hand in building the model: its chain, and any other component that changed it."""
    hooks = Hooks()
    builders = [config.model if model is None else model, *config.adapt]
    if not any(spec.name == "head" for spec in config.adapt):
        builders.append(ComponentSpec("head"))
    for spec in builders:
        hooks.add(from_objects.resolve_member("model_adapt", spec, where="--model")[0])
    others = {"train_step": config.loss, "finetune_strategy": config.strategy}
    for group, spec in [*others.items(), *(("callback", each) for each in config.callbacks)]:
        if spec is not None and not spec.name.startswith(from_objects.__name__):
            member, _ = from_objects.resolve_member(group, spec, where=group)
            if any(each.hook == "model_adapt" for each in find_hook_implementations(member)):
                hooks.add(member)
    return hooks


def _build_contract(group: str, record: dict[str, Any]) -> Any:
    return create_component(group, ComponentSpec(record["name"], record["options"]))


def _placeholder_data(record: dict[str, Any], inputs: Inputs, targets: Targets) -> Data:
    """Data of the right shapes and nothing in it, so that builders can read shapes."""
    tensors = {
        name: torch.zeros(2, *shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in record["input_specs"].items()
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


def _check_inputs(found: Inputs, known: Inputs) -> Inputs:
    """The model's own contract: what is stored must fit it, else the evaluation would feed another input."""
    from tuneforge.plugin.declaration import get_option_values

    same = type(found) is type(known) and get_option_values(found) == get_option_values(known)
    if not same:
        raise DataError(
            "the data is prepared otherwise than the model's",
            why=f"the model was tuned with {known}, the data comes as {found}",
            fix="give the data source the options of the run (see config in run.json)",
        )
    return known


def _stack(samples: list[Any]) -> Any:
    if isinstance(samples[0], Tensor):
        return torch.stack(samples)
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
