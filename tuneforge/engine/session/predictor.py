"""Load a finished run: predict with its model, or evaluate it again."""

from __future__ import annotations

import pickle  # noqa: TID251 - only to try whether a module can be pickled; nothing is unpickled
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby, islice, tee
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import (
    Data,
    Inputs,
    Split,
    Targets,
    iterate_raw_inputs,
    map_inputs,
    named_tensors,
    stack_inputs,
)
from tuneforge.engine.loop.evaluation import evaluate as evaluate_split
from tuneforge.engine.loop.phase_components import create_component
from tuneforge.engine.model import device
from tuneforge.engine.model.model import Model, extract_logits
from tuneforge.engine.model.weights_file import load_weights
from tuneforge.engine.session.components import is_object, resolve_component
from tuneforge.engine.session.portability import missing_model_error, read_kept_model
from tuneforge.engine.storage.run_files import MODEL, RUN, STATUS, WEIGHTS, read_json
from tuneforge.errors import DataError, FolderError, UsageError
from tuneforge.plugin.config import RunConfig, resolve_config
from tuneforge.plugin.declaration import get_option_values
from tuneforge.plugin.hooks import Hooks
from tuneforge.plugin.steps import ComponentSpec


@attrs.frozen(eq=False)
class Predictor:
    """A fine-tuned model with its preprocessing: raw inputs go in, predictions come out.

    Args:
        run_dir: The run directory.
        run: A run without data that writes nothing.
        inputs: Turns raw inputs into tensors.
        targets: Turns the model's outputs into predictions.
    """

    run_dir: Path
    run: Run
    inputs: Inputs
    targets: Targets

    @property
    def model(self) -> Model:
        """The fine-tuned model, in eval mode."""
        return self.run.model

    def predict_outputs(self, raw_inputs: Iterable[Any], *, batch_size: int = 64) -> Iterator[Tensor]:
        """Yield the model's output (k,) for each raw input, on the CPU, in order.

        Raises:
            DataError: An input cannot be decoded.
        """
        remaining = self.inputs.expand_directories(iterate_raw_inputs(raw_inputs, tabular=self.inputs.tabular))
        while chunk := list(islice(remaining, batch_size)):
            decoded = [self.inputs.decode(raw) for raw in chunk]
            for _, samples in groupby(decoded, lambda sample: [each.shape for each in named_tensors(sample).values()]):
                stacked = stack_inputs(list(samples))  # samples of several shapes come where collate_fn pads them
                with torch.inference_mode():
                    inputs = self.inputs.preprocess(map_inputs(stacked, self.run.device.move))
                    outputs = extract_logits(self.run.forward(self.run.to_device(inputs))).float().cpu()
                yield from outputs  # not in inference mode, in which the caller's code would run

    def with_data(self, data: Any = None, *, metrics: Iterable[Any] = (), single_split: bool = False) -> Run:
        """Prepare data and metrics, and return the run, whose splits can then be evaluated.

        Args:
            data: A data source as `Engine` accepts it; None prepares the run's own data.
            metrics: Metrics by name, or instances; by default those of the run.
            single_split: Whether a source that would draw splits returns all samples as one split.

        Raises:
            DataError: The data has classes that the model lacks, or is preprocessed in another way.
        """
        run = self.run
        run.single_split = single_split
        source, _ = resolve_component("data_prepare", run.config.data if data is None else data, where="--data")
        for metric in tuple(metrics) or run.config.metrics or self.targets.metrics:
            run.hooks.add(resolve_component("evaluate", metric, where="--metrics")[0])
        run.hooks.add(source)
        run.hooks.get_provider("data_prepare")
        prepared = run.hooks.call.data_prepare(run=run)
        prepared = _align_labels(prepared, self.targets.labels)
        _check_inputs(prepared.inputs, self.inputs)
        run.set_data(attrs.evolve(prepared, inputs=self.inputs, targets=self.targets))
        return run

    def predict(self, raw_inputs: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Yield the prediction for each raw input as plain data, such as the class and the probabilities.

        Args:
            raw_inputs: Files, directories of files, bytes, arrays or rows; the rows of a DataFrame.
        """
        given = iterate_raw_inputs(raw_inputs, tabular=self.inputs.tabular)
        inputs, again = tee(self.inputs.expand_directories(given))
        for raw, output in zip(again, self.predict_outputs(inputs), strict=True):
            yield {**self.targets.describe(output), **self.inputs.describe_input(raw)}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the module and its preprocessing, so that another process can predict; data and metrics stay behind.

        Raises:
            UsageError: The module cannot be pickled.
        """
        try:
            pickle.dumps(self.model)
        except Exception as error:
            raise UsageError(
                f"a predictor of {type(self.model.module).__name__} cannot be sent to another process",
                why=f"{type(error).__name__}: {error}",
                fix=f"send the path, and load it there: tuneforge.load({str(self.run_dir)!r}, model=...)",
            ) from error
        sample = named_tensors(self.run.data.train.fetch(torch.tensor([0])))
        specs = {name: (list(tensor.shape[1:]), str(tensor.dtype)) for name, tensor in sample.items()}
        return _unpickle, (self.run_dir, self.run.config, self.model, self.inputs, self.targets, specs)


def load(path: str | Path, *, model: Any = None, device_name: str = "auto") -> Predictor:
    """Load a finished run.

    Args:
        path: The run directory.
        model: The module, if the run was given one as a Python object; otherwise it is built from the run directory.
        device_name: The device to compute on.

    Raises:
        FolderError: `path` holds no finished run, or the weights do not fit the model.
        PluginLoadError: A component that builds the model is not installed.
    """
    path = Path(path)
    require_done(path)
    model_record, run_record = read_json(path / MODEL), read_json(path / RUN, "config")
    table = {key: value for key, value in run_record["config"].items() if key != "out"}
    config = resolve_config({**table, "device": device_name}, where=str(path / RUN))
    inputs, targets = (_build_contract(group, model_record[group]) for group in ("inputs", "targets"))
    run = Run(
        config=config,
        run_dir=None,
        device=device.resolve_device(device_name),
        hooks=Hooks(),
        restoring=True,
    )
    run.set_data(placeholder_data(model_record, inputs, targets))
    kept = read_kept_model(path) if model is None else None
    built = kept or _rebuild_model(path, run, model, run_record["components"])
    # After the weights are loaded, the model is pretrained on all of its labels.
    run.set_model(attrs.evolve(built, pretrained_labels=built.labels, pretrained=True), check=kept is None)
    if kept is None:
        load_weights(path / WEIGHTS, run.model.module)
    run.model.module.eval()
    return Predictor(path, run, inputs, targets)


def _unpickle(
    path: Path, config: RunConfig, model: Model, inputs: Inputs, targets: Targets, input_specs: Mapping[str, Any]
) -> Predictor:
    hooks, where = Hooks(), device.resolve_device(config.device)
    run = Run(config=config, run_dir=None, device=where, hooks=hooks, restoring=True)
    run.set_data(placeholder_data({"input_specs": input_specs}, inputs, targets))
    run.set_model(model)
    return Predictor(path, run, inputs, targets)


def require_done(path: Path) -> None:
    """Raise an error if a run has no result yet.

    Raises:
        FolderError: `path` holds no run, or one that is running, stopped or failed.
    """
    status = read_json(path / STATUS)
    if (state := status["state"]) != "done":
        resume = f"continue it: tuneforge resume {shlex.quote(str(path))}"
        fixes = {"running": f"wait for it, or {resume}", "stopped": resume}
        raise FolderError(
            f"the run in '{path}' is not done",
            where=STATUS,
            why=f"it is {state}" + (f": {status['reason']}" if status.get("reason") else ""),
            fix=fixes.get(state, "see why it failed, and start a new one with tuneforge run"),
        )


def predict(path: str | Path, raw_inputs: Iterable[Any], *, model: Any = None) -> Iterator[dict[str, Any]]:
    """Return the predictions of a finished run for raw inputs: files, bytes, arrays or table rows."""
    return load(path, model=model).predict(raw_inputs)


def evaluate(
    path: str | Path,
    *,
    data: Any = None,
    model: Any = None,
    metrics: Iterable[Any] = (),
    device_name: str = "auto",
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run again, on its own data or on other data.

    All samples of other data are scored: as the split `test`, or in the splits that they were given in.

    Args:
        path: The run directory.
        data: A data source as `Engine` accepts it; None prepares the run's own data.
        model: The module, if the run was given one as a Python object.
        metrics: Metrics by name, or instances; by default those of the run.
        device_name: The device to compute on.
        log: Called with each note on other data.

    Returns:
        The metrics by the name of the split; of the run's own data without the training split.

    Raises:
        DataError: The data has classes that the model lacks, or is preprocessed in another way.
    """
    predictor = load(path, model=model, device_name=device_name)
    is_own = data is None or _is_own_data(predictor, data)
    run = predictor.with_data(data, metrics=metrics, single_split=not is_own)
    if is_own:
        splits = {name: split for name, split in run.data.splits().items() if name != "train"}
    else:
        names = {id(split): name for name, split in run.data.splits().items()}
        splits = {name: run.data.splits()[name] for name in names.values()}
        if log is not None:
            for note in run.data.notes:
                log(f"note: {note}")
    return {name: evaluate_split(run, split, name) for name, split in splits.items()}


def _is_own_data(predictor: Predictor, data: Any) -> bool:
    """Return True if data is what the run was trained with: the same source, or Python objects of the same content."""
    if isinstance(data, (str, ComponentSpec)):
        own = predictor.run.config.data
        return not is_object(own.name) and _resolve_data_spec(data) == _resolve_data_spec(own)
    try:
        found = attrs.evolve(predictor, run=attrs.evolve(predictor.run, hooks=Hooks())).with_data(data).data
    except DataError:
        return False
    recorded = read_json(predictor.run_dir / MODEL)["fingerprints"]
    return all(getattr(found, split).fingerprint() == recorded[split] for split in recorded)


def _resolve_data_spec(data: Any) -> ComponentSpec:
    """Return the specification of a data source with all of its options."""
    return resolve_component("data_prepare", data, where="--data")[1]


def _rebuild_model(path: Path, run: Run, model: Any, records: list[Mapping[str, Any]]) -> Model:
    """Return the model of a run from its builder, its adapters and other components with `model_adapt`.

    Components that only train are not loaded: this process need not have them.

    Args:
        path: The run directory.
        run: A run with data; the components are added to its hooks.
        model: The module, if the run was given one as a Python object.
        records: The components as `run.json` records them.

    Raises:
        FolderError: The run was given the model as an object, which is neither kept nor given again.
    """
    config = run.config
    if model is None and is_object(config.model.name):
        raise missing_model_error(path)
    builders = [config.model if model is None else model, *config.adapt]
    if not any(spec.name == "head" for spec in config.adapt):
        builders.append(ComponentSpec("head"))
    for spec in builders:
        run.hooks.add(resolve_component("model_adapt", spec, where="--model")[0])
    adapting = {each["name"] for each in records if "model_adapt" in each["implements"]}
    others = {"train_step": config.loss, "finetune_strategy": config.strategy}
    for hook, spec in [*others.items(), *(("callback", each) for each in config.callbacks)]:
        if spec is not None and spec.name in adapting:
            run.hooks.add(resolve_component(hook, spec, where=hook)[0])
    built: Model = run.hooks.call.model_adapt(run=run, model=None)
    return built


def _build_contract(group: str, record: dict[str, Any]) -> Any:
    return create_component(group, ComponentSpec(record["name"], record["options"]))


def placeholder_data(record: Mapping[str, Any], inputs: Inputs, targets: Targets) -> Data:
    """Return data of the recorded shapes filled with zeros, because model builders read shapes from the data."""
    tensors = {
        name: torch.zeros(2, *shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in record["input_specs"].items()
    }
    split = Split(tensors[""] if set(tensors) == {""} else tensors, torch.zeros(2, dtype=torch.int64))
    return Data(train=split, val=split, test=split, inputs=inputs, targets=targets)


def _align_labels(data: Data, labels: tuple[str, ...]) -> Data:
    """Return the data with class indices of the model, whose labels may be more and in another order.

    Raises:
        DataError: The data has labels that the model lacks, or its targets are not class indices.
    """
    own = data.targets.labels
    if own == labels:
        return data
    extra, missing = sorted(set(own) - set(labels)), sorted(set(labels) - set(own))
    if extra or not own or data.train.targets.dtype != torch.int64 or data.train.targets.ndim != 1:
        raise DataError(
            "the data's classes are not the model's",
            why=f"only in the data: {extra or 'none'}; only in the model: {missing or 'none'}",
            fix="evaluate on data with the classes that the model was tuned for",
        )
    index = torch.tensor([labels.index(name) for name in own])
    splits = {id(split): Split(split.source, index[split.targets], ids=split.ids) for split in data.splits().values()}
    return attrs.evolve(
        data,
        train=splits[id(data.train)],
        val=splits[id(data.val)],
        test=splits[id(data.test)],
        extra_test_splits={name: splits[id(split)] for name, split in data.extra_test_splits.items()},
    )


def _check_inputs(inputs: Inputs, model_inputs: Inputs) -> None:
    """Raise `DataError` if samples are stored in another form than the model's preprocessing expects."""
    same_type = type(inputs) is type(model_inputs)
    if not same_type or get_option_values(inputs) != get_option_values(model_inputs):
        raise DataError(
            "the data is preprocessed differently from the model's training data",
            why=f"the model was trained with {model_inputs}, the data comes as {inputs}",
            fix="give the data source the options of the run (see config in run.json)",
        )
