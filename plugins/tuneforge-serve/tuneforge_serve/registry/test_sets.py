"""The data that a bundle was tuned and tested on, prepared again from what the bundle says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Data, Inputs, Split, Targets
from tuneforge.engine.loop.phase_components import create_component
from tuneforge.engine.model import device
from tuneforge.engine.session.components import resolve_component
from tuneforge.errors import DataError
from tuneforge.exporting import stack_inputs
from tuneforge.exporting.bundle import BUNDLE
from tuneforge.plugin.config import resolve_config
from tuneforge.plugin.hooks import Hooks
from tuneforge.plugin.steps import ComponentSpec


def load_bundle_data(
    record: Mapping[str, Any], data: Any = None, *, storage_record: Mapping[str, Any] | None = None
) -> Data:
    """The splits, as they were.

    Args:
        record: The content of `bundle.json`.
        data: A data source, or data, in place of the one that the bundle names.
        storage_record: Of another bundle, whose data source is asked to divide and to store as that one does, by the
            seed of this one; what comes need not be what this one was tested on.

    Raises:
        DataError: They are no longer what they were.
    """
    stored_as = storage_record or record
    table = {key: value for key, value in record["run"]["config"].items() if key != "out"}
    config = resolve_config({**table, "data": stored_as["run"]["config"]["data"], "device": "cpu"}, where=BUNDLE)
    hooks = Hooks()
    hooks.add(resolve_component("data_prepare", config.data if data is None else data, where="--data")[0])
    hooks.get_provider("data_prepare")
    run = Run(config=config, run_dir=None, device=device.resolve_device("cpu"), hooks=hooks, restoring=True)
    run.set_data(_placeholder_data(stored_as))
    prepared: Data = hooks.call.data_prepare(run=run)
    if storage_record is None and prepared.test.fingerprint() != record["fingerprints"]["test"]:
        raise DataError(
            f"the test split of '{record['name']}' is not what it was tested on",
            why="its fingerprint is another one than in its bundle",
            fix="bring the data back as it was, or give the old test split from Python: "
            "tuneforge.promote(old_test_set=...)",
        )
    return prepared


def load_labeled_files(folder: Path, inputs: Inputs, targets: Targets) -> Split:
    """Labelled files, one folder a class, as a model stores its inputs.

    Raises:
        DataError: There are none, a file cannot be decoded, or a folder is named like no class.
    """
    files = list_labeled_files(folder)
    stored = stack_inputs([inputs.decode(path) for path in files])
    answers = torch.tensor([targets.encode(path.parent.name) for path in files])
    return Split(stored, answers, ids=[str(path.relative_to(folder)) for path in files])


def list_labeled_files(folder: Path) -> list[Path]:
    """The files in the folders of a folder, each folder a class.

    Raises:
        DataError: There are none.
    """
    files = [path for path in sorted(folder.glob("*/*")) if path.is_file() and not path.name.startswith(".")]
    if not files:
        raise DataError(
            f"'{folder}' holds no labelled files" if folder.is_dir() else f"there is no folder '{folder}'",
            where="--new",
            fix="give a folder with one folder a class, files in it",
        )
    return files


def _placeholder_data(record: Mapping[str, Any]) -> Data:
    """Data of the right shapes and contracts, and nothing in it."""
    tensors = {
        name: torch.zeros(2, *shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in record["input_specs"].items()
    }
    split = Split(tensors.get("", tensors), torch.zeros(2, dtype=torch.int64))
    inputs, targets = (create_component(group, ComponentSpec(**record[group])) for group in ("inputs", "targets"))
    return Data(train=split, val=split, test=split, inputs=inputs, targets=targets)
