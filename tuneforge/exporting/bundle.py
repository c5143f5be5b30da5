"""Bundles: directories that hold a fine-tuned model for deployment and the records to verify it; and their loading.

=======================  ==========================================================================================
file                     content
=======================  ==========================================================================================
`bundle.json`            inputs, targets, metrics, provenance, and the formats of the model
`model.onnx`, ...        the model in each export format
`reference.safetensors`  reference outputs, a reference for drift, digests of the training samples
`README.md`              the model card
`manifest.json`          size and SHA-256 of every other file
=======================  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from tuneforge.engine.data.dataset import Inputs, Targets, TensorTree, iterate_raw_inputs, map_inputs
from tuneforge.engine.loop.phase_components import create_component
from tuneforge.engine.session.predictor import load
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import FolderError, HaltError, MissingDependencyError, UsageError, suggest_name
from tuneforge.exporting.atomic_dir import verify_manifest
from tuneforge.exporting.formats import ExportFormat, Forward, compute_predictions, make_forward
from tuneforge.exporting.parity import measure_deviation
from tuneforge.exporting.reference_outputs import ReferenceData
from tuneforge.plugin.steps import ComponentSpec

BUNDLE = "bundle.json"
"""The file that describes a bundle."""

MODEL_CARD = "README.md"
"""The model card of a bundle."""

LAYOUT_VERSION = 1
"""The version of the bundle layout that this tuneforge writes."""

MAX_DEVIATION = 1e-2
"""Largest allowed difference to a reference probability; accelerators compute convolutions in lower precision."""


@attrs.define(eq=False, slots=False)
class InferenceModel:
    """A fine-tuned model for inference, of a bundle, a registry version or a finished run. It is thread-safe.

    Args:
        path: The directory of the bundle or run.
        name: The name of the model.
        version: The version in the model registry; empty elsewhere.
        backend: The library that computes: `torch`, `onnxruntime`, ...
        inputs: Decodes and preprocesses raw inputs.
        targets: Interprets outputs.
        record: The content of `bundle.json`; for a run directory, the same fields as far as they are known.
    """

    path: Path
    name: str
    version: str
    backend: str
    inputs: Inputs
    targets: Targets
    record: Mapping[str, Any]
    _forward: Forward

    @property
    def test_metrics(self) -> Mapping[str, Any]:
        """The metrics of the test split, as the run reported them."""
        metrics: Mapping[str, Any] = self.record["metrics"]["test"]
        return metrics

    @property
    def input_specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape without the batch dimension, and dtype such as `uint8`, by tensor name; a single tensor is named ''."""
        specs = self.record["input_specs"].items()
        return {name: (tuple(shape), dtype.removeprefix("torch.")) for name, (shape, dtype) in specs}

    @cached_property
    def reference_data(self) -> ReferenceData | None:
        """Reference outputs and the reference for drift; None for a run directory."""
        return None if "bundle" not in self.record else ReferenceData.read(self.path)

    def outputs(self, stored: TensorTree) -> Tensor:
        """Return the outputs of the model, float32 (batch, outputs) on the CPU, for a batch of stored tensors."""
        return self._forward(stored)

    def predict_batch(self, stored: TensorTree) -> Tensor:
        """Return probabilities, or values in their unit, float32 (batch, outputs), for a batch of stored tensors."""
        return compute_predictions(self.targets, self._forward(stored))

    def predict(self, raws: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Yield the prediction for each raw input as plain data, such as class and probabilities.

        Raises:
            DataError: An input cannot be decoded.
        """
        for raw in iterate_raw_inputs(raws, tabular=self.inputs.tabular):
            stored = map_inputs(self.inputs.decode(raw), lambda tensor: tensor[None])
            yield {**self.targets.describe(self._forward(stored)[0]), **self.inputs.describe_input(raw)}

    def verify(self) -> int:
        """Predict the recorded test inputs again and compare with the reference, as one batch and singly.

        Returns:
            The number of compared samples; 0 for a run directory, which has no reference.

        Raises:
            HaltError: A prediction differs, or is NaN.
        """
        reference = self.reference_data
        if reference is None:
            return 0
        expected = compute_predictions(self.targets, reference.probe_outputs)
        alone = map_inputs(reference.probe_inputs, lambda tensor: tensor[:1])
        for actual, recorded in (
            (self.predict_batch(reference.probe_inputs), expected),
            (self.predict_batch(alone), expected[:1]),
        ):
            deviation = measure_deviation(actual, recorded)
            if not deviation <= MAX_DEVIATION:
                raise HaltError(
                    f"{self.name} {self.version}".strip() + " differs from its own reference outputs",
                    where=str(self.path),
                    why=f"an answer is off by {deviation:.3g}, and {MAX_DEVIATION:g} is allowed ({self.backend})",
                    fix="export it again on this machine, or look for what changed in its packages",
                )
        return len(expected)


def load_bundle(
    path: str | Path,
    *,
    backend: str = "auto",
    device_name: str = "auto",
    name: str = "",
    version: str = "",
) -> InferenceModel:
    """Load a bundle after its hashes have been verified.

    Args:
        path: The directory of the bundle.
        backend: `torch`, `onnxruntime`, or that of another format of the bundle; `auto` is the first available one in
            the order of export.
        device_name: The device of torch.
        name: The name of the model; by default that in the bundle.
        version: The version in the model registry.

    Raises:
        FolderError: The directory is no bundle, or a file is missing or changed.
        UsageError: The bundle has no format for that backend.
        MissingDependencyError: A package that the backend needs is not installed.
    """
    path = Path(path)
    verify_manifest(path)
    record = names.read_json(path / BUNDLE)
    if record["bundle"] > LAYOUT_VERSION:
        raise FolderError(
            f"the bundle '{path}' was written by a newer tuneforge ({record['tuneforge']})",
            where=BUNDLE,
            why=f"its layout has version {record['bundle']}, and this tuneforge reads up to {LAYOUT_VERSION}",
            fix="update tuneforge",
        )
    chosen, forward = _open_first_available(path, record["formats"], backend, device_name)
    inputs, targets = build_contracts(record)
    return InferenceModel(path, name or record["name"], version, chosen, inputs, targets, record, forward)


def build_contracts(record: Mapping[str, Any]) -> tuple[Inputs, Targets]:
    """Build the `Inputs` and the `Targets` that `bundle.json` or `model.json` records."""
    inputs, targets = (
        create_component(group, ComponentSpec(record[group]["name"], record[group]["options"]))
        for group in ("inputs", "targets")
    )
    return inputs, targets


def load_inference_model(
    path: str | Path,
    *,
    backend: str = "auto",
    device_name: str = "auto",
    model: Any = None,
    name: str = "",
    version: str = "",
) -> InferenceModel:
    """Load a bundle or a finished run for inference.

    Args:
        path: The directory of the bundle or the run.
        backend: As for `load_bundle`; a run has the backend `torch` only.
        device_name: The device that torch computes on.
        model: The module, if the run was given one as a Python object.
        name: The name of the model; by default the name in the bundle, or the name of the run directory.
        version: The version of the model in a registry.

    Raises:
        FolderError: `path` is neither.
    """
    path = Path(path)
    if (path / BUNDLE).is_file():
        return load_bundle(path, backend=backend, device_name=device_name, name=name, version=version)
    if backend not in ("auto", "torch"):
        raise UsageError(f"a run has no form for '{backend}'", where=str(path), fix="export it: tuneforge export RUN")
    predictor = load(path, model=model, device_name=device_name)
    record = {**names.read_json(path / names.MODEL), "metrics": names.read_json(path / names.REPORT)["splits"]}
    inputs, targets = predictor.inputs, predictor.targets
    name = name or path.absolute().name
    return InferenceModel(path, name, version, "torch", inputs, targets, record, make_forward(predictor))


def list_backends(path: str | Path) -> tuple[str, ...]:
    """List the backends that a bundle or a run has a format for, in the order of the export."""
    path = Path(path)
    if not (path / BUNDLE).is_file():
        return ("torch",)
    return tuple(each["backend"] for each in names.read_json(path / BUNDLE)["formats"].values())


def load_format(name: str) -> ExportFormat:
    """The export format of that name.

    Raises:
        UnknownNameError: It is not installed.
    """
    built: ExportFormat = create_component("export", ComponentSpec(name))
    return built


def _open_first_available(
    path: Path, formats: Mapping[str, Any], backend: str, device_name: str
) -> tuple[str, Forward]:
    """The first form that fits the backend and can be used here."""
    fitting = [name for name, each in formats.items() if backend in ("auto", each["backend"])]
    if not fitting:
        known = [each["backend"] for each in formats.values()]
        raise UsageError(
            f"'{path}' has no form for backend '{backend}'", where="--backend", fix=suggest_name(backend, known)
        )
    for place, name in enumerate(fitting):
        try:
            return formats[name]["backend"], load_format(name).load(path, device_name=device_name)
        except MissingDependencyError:
            if place == len(fitting) - 1:
                raise
    raise AssertionError("unreachable: the last form either opens or raises")
