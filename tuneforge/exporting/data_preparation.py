"""Prepare the data of a finished run or of a bundle again, and compute metrics of outputs without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Data
from tuneforge.engine.model import device
from tuneforge.engine.session.components import resolve_component
from tuneforge.engine.session.predictor import Predictor, placeholder_data
from tuneforge.engine.storage.run_files import MODEL, read_json
from tuneforge.errors import DataError
from tuneforge.exporting.bundle import BUNDLE, build_contracts
from tuneforge.plugin.config import RunConfig, resolve_config
from tuneforge.plugin.hooks import Hooks


def prepare_data(source: Any, *, config: RunConfig | None = None, model_data: Data | None = None) -> Data:
    """Prepare the splits of a data source outside a run.

    Args:
        source: A data source as `Engine` accepts it.
        config: The configuration whose seeds the source draws from; None uses the defaults.
        model_data: What `run.data` is while the source prepares, for sources that follow the form of earlier data.
    """
    run = _create_run(config or resolve_config({}), model_data)
    run.hooks.add(resolve_component("data_prepare", source, where="--data")[0])
    run.hooks.get_provider("data_prepare")
    data: Data = run.hooks.call.data_prepare(run=run)
    return data


def prepare_run_data(predictor: Predictor, data: Any = None) -> Data:
    """Prepare the data that a run was trained and tested on.

    Args:
        predictor: The finished run, as `load` returns it.
        data: The run's data, if the run was given them as Python objects.

    Raises:
        DataError: The data has changed since.
    """
    found = predictor.with_data(data).data
    recorded = read_json(predictor.run_dir / MODEL)["fingerprints"]
    changed = [each for each in ("train", "test") if getattr(found, each).fingerprint() != recorded[each]]
    if changed:
        raise DataError(
            f"the {' and the '.join(changed)} split is not what the run was made with",
            where=str(predictor.run_dir),
            why="its fingerprint differs from the one in model.json, so the run's metrics do not describe it",
            fix="restore the data, or train again",
        )
    return found


def prepare_bundle_data(
    record: Mapping[str, Any], data: Any = None, *, storage_record: Mapping[str, Any] | None = None
) -> Data:
    """Prepare the data that the model of a bundle was trained and tested on.

    Args:
        record: The content of the bundle's `bundle.json`.
        data: A data source that replaces the one in `record`.
        storage_record: The record of another bundle. Its data source then splits and stores the samples, with the seed
            of `record`; the result need not be what the model was tested on.

    Raises:
        DataError: The test split is not what the model was tested on.
    """
    stored_as = storage_record or record
    table = {key: value for key, value in record["run"]["config"].items() if key != "out"}
    config = resolve_config({**table, "data": stored_as["run"]["config"]["data"], "device": "cpu"}, where=BUNDLE)
    placeholder = placeholder_data(stored_as, *build_contracts(stored_as))
    prepared = prepare_data(config.data if data is None else data, config=config, model_data=placeholder)
    if storage_record is None and prepared.test.fingerprint() != record["fingerprints"]["test"]:
        raise DataError(
            f"the test split of '{record['name']}' is not what the model was tested on",
            why="its fingerprint differs from the one in the bundle",
            fix="restore the data, or pass the old test split from Python: tuneforge_serve.promote(old_test_set=...)",
        )
    return prepared


def compute_metrics(
    data: Data, split: str, outputs: Tensor, labels: Tensor, *, metrics: Iterable[Any] = ()
) -> dict[str, Any]:
    """Compute the metrics of outputs that another process has computed.

    Args:
        data: The data whose targets describe the outputs.
        split: The name of the split that the samples belong to.
        outputs: The outputs (n, k).
        labels: The targets of the same samples (n, ...).
        metrics: Metrics by name, or instances; by default those of the data's targets.
    """
    run = _create_run(resolve_config({}), data)
    for metric in tuple(metrics) or data.targets.metrics:
        run.hooks.add(resolve_component("evaluate", metric, where="--metrics")[0])
    run.eval_split = split
    accumulator = run.hooks.call.evaluate(run=run)
    accumulator.update(outputs, labels)
    computed: dict[str, Any] = accumulator.compute()
    return computed


def _create_run(config: RunConfig, data: Data | None) -> Run:
    run = Run(
        config=config,
        run_dir=None,
        device=device.resolve_device("cpu"),
        hooks=Hooks(),
        restoring=data is not None,  # then a data source follows the form of `data`, such as the order of its classes
    )
    if data is not None:
        run.set_data(data)
    return run
