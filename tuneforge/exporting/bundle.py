"""A bundle: a folder that holds a tuned model ready for work, and what is needed to trust it. And what serves it.

=======================  ==========================================================================================
file                     what
=======================  ==========================================================================================
`bundle.json`            contracts of inputs and targets, figures, provenance, and the forms the model is in
`model.onnx`, ...        what each export format wrote
`reference.safetensors`  recorded answers, a reference for drift, digests of the training samples
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

from tuneforge.engine.data.dataset import Inputs, Targets, TensorTree, map_inputs
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
"""The file of a bundle that describes it."""

MODEL_CARD = "README.md"
"""The file of a bundle that holds the model card."""

LAYOUT_VERSION = 1
"""The version of the layout of bundles that this tuneforge writes."""

MAX_DEVIATION = 1e-2
"""How far a probability may be from the recorded one: accelerators compute convolutions in lower precision."""


@attrs.define(eq=False, slots=False)
class InferenceModel:
    """A tuned model that answers: from a bundle, a store's version or a finished run. Its methods are thread-safe.

    Args:
        path: Its folder.
        name: Of the model.
        version: Its number in a store; empty elsewhere.
        backend: What computes: `torch`, `onnxruntime`, ...
        inputs: How raw things become tensors.
        targets: How answers are read.
        record: The content of `bundle.json`; of a run folder, the same as far as it is known.
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
        """Figures of the test split, as the run reported them."""
        metrics: Mapping[str, Any] = self.record["metrics"]["test"]
        return metrics

    @property
    def input_specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape without the batch, and type such as `uint8`, of each stored tensor; a single one is named ''."""
        specs = self.record["input_specs"].items()
        return {name: (tuple(shape), dtype.removeprefix("torch.")) for name, (shape, dtype) in specs}

    @cached_property
    def reference_data(self) -> ReferenceData | None:
        """Recorded answers and the reference for drift; None for a run folder."""
        return None if "bundle" not in self.record else ReferenceData.read(self.path)

    def outputs(self, stored: TensorTree) -> Tensor:
        """The model's outputs, float32 (b, k) on the CPU, for the stored form of a batch: what targets describe."""
        return self._forward(stored)

    def predict_batch(self, stored: TensorTree) -> Tensor:
        """Probabilities, or numbers in their unit, float32 (b, k), for the stored form of a batch."""
        return compute_predictions(self.targets, self._forward(stored))

    def predict(self, raws: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The answer for each raw thing as plain data, such as class and probabilities.

        Raises:
            DataError: One of them cannot be decoded.
        """
        for raw in raws:
            stored = map_inputs(self.inputs.decode(raw), lambda tensor: tensor[None])
            yield self.targets.describe(self._forward(stored)[0])

    def verify(self) -> int:
        """Answer the recorded test inputs again and compare, in one batch and alone.

        Returns:
            How many were compared; 0 for a run folder, which records none.

        Raises:
            HaltError: An answer is another one, or is no number.
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
                    f"{self.name} {self.version}".strip() + " disagrees with its own recorded answers",
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
    """Open a bundle, once its hashes have been compared.

    Args:
        path: Its folder.
        backend: `torch`, `onnxruntime`, or another that the bundle has a form for; `auto` takes the first that can
            be used here of those in the order in which they were exported.
        device_name: Where torch computes.
        name: What to call the model; by default what the bundle says.
        version: Its number in a store.

    Raises:
        FolderError: It is no bundle, or a file of it is missing or changed.
        UsageError: It has no form for that backend.
        MissingDependencyError: A package that the backend needs is not installed.
    """
    path = Path(path)
    verify_manifest(path)
    record = names.read_json(path / BUNDLE)
    if record["bundle"] > LAYOUT_VERSION:
        raise FolderError(
            f"the bundle '{path}' was written by a newer tuneforge ({record['tuneforge']})",
            where=BUNDLE,
            why=f"its layout has version {record['bundle']}, and this one reads up to {LAYOUT_VERSION}",
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
