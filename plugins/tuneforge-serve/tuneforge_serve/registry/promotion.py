"""Promotion: a run becomes a bundle, the gate decides about the bundle, and the registry accepts or refuses it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from tuneforge import Data, Split, Targets, load
from tuneforge.errors import PluginError
from tuneforge.exporting import (
    BUNDLE,
    InferenceModel,
    ParityError,
    export,
    load_bundle,
    nonfinite_to_none,
    prepare_bundle_data,
    prepare_run_data,
    read_json,
    verify_manifest,
)
from tuneforge_serve.registry.gate import GateDecision, GateRules, PairedSplit, make_refusal, run_gate, same_contract
from tuneforge_serve.registry.model_registry import CHALLENGER_DIR, ModelRegistry
from tuneforge_serve.registry.test_sets import list_labeled_files, load_labeled_files

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@attrs.frozen
class PromotionResult:
    """The result of a promotion.

    Args:
        decision: The decision of the gate.
        name: The name of the model.
        version: The number of the new version; None if the gate refused it.
        previous_champion: The champion that the gate compared with.
    """

    decision: GateDecision
    name: str
    version: int | None
    previous_champion: int | None


def promote(
    run: str | Path,
    *,
    registry: str | Path = "models",
    name: str | None = None,
    formats: Sequence[str] | None = None,
    data: Any = None,
    model: Any = None,
    old_test_set: Split | PairedSplit | None = None,
    old_targets: Targets | None = None,
    new_test_set: Split | PairedSplit | str | Path | None = None,
    new_targets: Targets | None = None,
    reference_splits: Sequence[Split] = (),
    rules: GateRules | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> PromotionResult:
    """Make a run, or a bundle, the champion of a model name if the gate accepts it.

    Args:
        run: The directory of a finished run, or of a bundle.
        registry: The directory of the registry.
        name: The name of the model; None uses the name of the run's data source.
        formats: The export formats of the version; None exports to safetensors, and to ONNX if its packages are
            installed and the model can be exported.
        data: The run's data, if the run was given them as Python objects.
        model: The module, if the run was given one as a Python object.
        old_test_set: The old test set; None prepares the champion's test split again.
        old_targets: Targets that describe its labels; by default those of the champion.
        new_test_set: Held-out samples of new data, or a directory with one folder of files per class; None tests
            superiority on the old test set.
        new_targets: Targets that describe its labels; by default those of the challenger.
        reference_splits: Samples from production that the run was not trained on; they become references for drift.
        rules: The rules of the gate; None uses the defaults.
        log: Called with messages for the user.

    Raises:
        FolderError: The run is not done, or another process is promoting.
        DataError: The data has changed since the run or the champion was tested, or there are no new files.
    """
    gate_inputs = _GateInputs(old_test_set, old_targets, new_test_set, new_targets, rules)
    gate_inputs.require_files()
    model_registry = ModelRegistry(registry, _default_name(Path(run)) if name is None else name)
    with model_registry.lock():
        return _PromotionJob(model_registry, Path(run), formats, data, model, reference_splits, log).decide(gate_inputs)


@attrs.frozen(eq=False)
class _GateInputs:
    """The test sets and rules of a promotion; the fields are arguments of `promote`."""

    old_test_set: Split | PairedSplit | None
    old_targets: Targets | None
    new_test_set: Split | PairedSplit | str | Path | None
    new_targets: Targets | None
    rules: GateRules | None

    def require_files(self) -> None:
        """Check early that a directory of new files contains some."""
        if isinstance(self.new_test_set, (str, Path)):
            list_labeled_files(Path(self.new_test_set))

    def load_new_test_set(self, challenger: InferenceModel) -> Split | PairedSplit | None:
        """Return the new test set, stored as the challenger stores its inputs."""
        if isinstance(self.new_test_set, (str, Path)):
            return load_labeled_files(
                Path(self.new_test_set), challenger.inputs, self.new_targets or challenger.targets
            )
        return self.new_test_set


@attrs.frozen(eq=False)
class _PromotionJob:
    """A running promotion of a locked model; the fields are arguments of `promote`."""

    registry: ModelRegistry
    run: Path
    formats: Sequence[str] | None
    data: Any
    model: Any
    reference_splits: Sequence[Split]
    log: Callable[[str], None]

    def decide(self, gate_inputs: _GateInputs) -> PromotionResult:
        """Export the run, run the gate, and register or remove the bundle."""
        registry, previous_champion, incoming = (
            self.registry,
            self.registry.champion,
            self.registry.path / CHALLENGER_DIR,
        )
        try:
            decision = self._run_gate(
                gate_inputs, incoming, None if previous_champion is None else registry.load(previous_champion)
            )
        except ParityError as error:
            decision = make_refusal("parity", f"{error.what}: {error.why}")
        except BaseException:
            shutil.rmtree(incoming, ignore_errors=True)
            raise
        about = {"run": str(self.run), "decision": nonfinite_to_none(decision.to_dict())}
        if decision.promoted:
            return PromotionResult(decision, registry.name, registry.register(incoming, about), previous_champion)
        shutil.rmtree(incoming, ignore_errors=True)
        registry.log_event("refused", previous_champion=previous_champion, **about)
        return PromotionResult(decision, registry.name, None, previous_champion)

    def _run_gate(self, gate_inputs: _GateInputs, incoming: Path, champion: InferenceModel | None) -> GateDecision:
        data = self._write_bundle(incoming)
        challenger = load_bundle(incoming, name=self.registry.name, version="challenger")
        challenger.verify()
        return run_gate(
            champion,
            challenger,
            gate_inputs.old_test_set
            if gate_inputs.old_test_set is not None
            else _prepare_old_test_set(champion, challenger, data),
            gate_inputs.load_new_test_set(challenger),
            rules=gate_inputs.rules,
            old_targets=gate_inputs.old_targets,
            new_targets=gate_inputs.new_targets,
            count_uses=self.registry.count_uses,
        )

    def _write_bundle(self, incoming: Path) -> Data:
        """Write the challenger's bundle beside the versions, and return its data."""
        run = self.run
        if (run / BUNDLE).is_file():
            verify_manifest(run)
            shutil.copytree(run, incoming)
            return prepare_bundle_data(read_json(run / BUNDLE), self.data)
        data = prepare_run_data(load(run, model=self.model, device_name="cpu"), self.data)
        options = {
            "out": incoming,
            "name": self.registry.name,
            "data": data,
            "model": self.model,
            "reference_splits": self.reference_splits,
        }
        if self.formats is None and all(importlib.util.find_spec(each) for each in _ONNX_PACKAGES):
            try:
                export(run, to=("onnx", "safetensors"), **options, log=self.log)
                return data
            except ParityError:
                raise
            except PluginError as error:
                self.log(f"note: {error.what}, so the version contains safetensors only ({error.why})")
        elif self.formats is None:
            self.log("note: the version contains safetensors only; for ONNX: pip install 'tuneforge[export]'")
        export(run, to=self.formats or ("safetensors",), **options, log=self.log)
        return data


def _default_name(run: Path) -> str:
    """Return the name of the run's data source, which stays the same when the model is retrained."""
    if (run / BUNDLE).is_file():
        config = read_json(run / BUNDLE)["run"]["config"]
    else:
        config = read_json(run / "run.json")["config"]
    name = config["data"]["name"]
    return run.absolute().name if "." in name or ":" in name else name.rpartition("/")[2]


def _prepare_old_test_set(
    champion: InferenceModel | None, challenger: InferenceModel, data: Data
) -> Split | PairedSplit:
    """Prepare the champion's test split, also stored for the challenger if that has other preprocessing."""
    own = challenger.record["fingerprints"]["test"]
    if champion is None or champion.record["fingerprints"]["test"] == own:
        return data.test
    before = prepare_bundle_data(champion.record).test
    if same_contract(champion.inputs, challenger.inputs):
        return before
    now = prepare_bundle_data(champion.record, storage_record=challenger.record).test
    same = len(now) == len(before) and all(now.id_of(row) == before.id_of(row) for row in range(len(now)))
    return PairedSplit(before, now) if same else before
