"""Promotion: a run becomes a bundle, the gate judges it as it would be served, and the store admits it or not."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from tuneforge.engine.data.dataset import Data, Split, Targets
from tuneforge.engine.session.predictor import load
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import PluginError
from tuneforge.exporting.atomic_dir import verify_manifest
from tuneforge.exporting.bundle import BUNDLE, InferenceModel, load_bundle
from tuneforge.exporting.exporter import export, prepare_data
from tuneforge.exporting.parity import ParityError
from tuneforge_serve.registry.gate import GateDecision, GateRules, PairedSplit, make_refusal, run_gate, same_contract
from tuneforge_serve.registry.model_registry import CHALLENGER_DIR, ModelRegistry
from tuneforge_serve.registry.test_sets import list_labeled_files, load_bundle_data, load_labeled_files

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@attrs.frozen
class PromotionResult:
    """How it ended.

    Args:
        decision: What the gate said.
        name: Of the model.
        version: Its number, where it was promoted.
        previous_champion: The champion that it was judged against.
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
    to: Sequence[str] | None = None,
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
    """Make a run, or a bundle of one, the champion of a name if the gate lets it pass.

    Args:
        run: The folder of a finished run, or of a bundle.
        registry: The store's folder.
        name: Of the model; None: what the run's data source is called.
        to: The forms that the version holds, of a run; None: ONNX where its packages are installed and the network can
            be written so, and safetensors.
        data: The run's data, where it was given them as objects.
        model: The module, where the run was given one as an object.
        old_test_set: The old world's test split; None: the champion's own, prepared again.
        old_targets: How its targets are read; by default as the champion reads them.
        new_test_set: The new world's held-out split, or a folder of its files with one folder a class; None:
            superiority on the old one decides.
        new_targets: Of the new split; by default as the challenger reads them.
        reference_splits: What production sent, as far as the run did not train on it: drift is measured from it too.
        rules: What the challenger must keep to.
        log: Where sentences for the user go.

    Raises:
        FolderError: The run is not done, or another process is promoting.
        DataError: The data is no longer what the run or the champion was tested on, or there are no new files.
    """
    gate_inputs = _GateInputs(old_test_set, old_targets, new_test_set, new_targets, rules)
    gate_inputs.require_files()
    model_registry = ModelRegistry(registry, name or _default_name(Path(run)))
    with model_registry.lock():
        return _PromotionJob(model_registry, Path(run), to, data, model, reference_splits, log).decide(gate_inputs)


@attrs.frozen(eq=False)
class _GateInputs:
    """What a challenger is judged by; the fields are what `promote` is given."""

    old_test_set: Split | PairedSplit | None
    old_targets: Targets | None
    new_test_set: Split | PairedSplit | str | Path | None
    new_targets: Targets | None
    rules: GateRules | None

    def require_files(self) -> None:
        """See that a folder of new files has some, before anything else is done."""
        if isinstance(self.new_test_set, (str, Path)):
            list_labeled_files(Path(self.new_test_set))

    def load_new_test_set(self, challenger: InferenceModel) -> Split | PairedSplit | None:
        """The new world, as the challenger stores its inputs."""
        if isinstance(self.new_test_set, (str, Path)):
            return load_labeled_files(
                Path(self.new_test_set), challenger.inputs, self.new_targets or challenger.targets
            )
        return self.new_test_set


@attrs.frozen(eq=False)
class _PromotionJob:
    """A promotion while it goes on, in a store that is locked; the fields are what `promote` is given."""

    registry: ModelRegistry
    run: Path
    to: Sequence[str] | None
    data: Any
    model: Any
    reference_splits: Sequence[Split]
    log: Callable[[str], None]

    def decide(self, gate_inputs: _GateInputs) -> PromotionResult:
        """Export the run, let the gate judge, and admit the bundle or clear it away."""
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
        about = {"run": str(self.run), "decision": names.nonfinite_to_none(decision.to_dict())}
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
        """Write the challenger's bundle beside the versions; returns the data it was tuned and tested on."""
        run = self.run
        if (run / BUNDLE).is_file():
            verify_manifest(run)
            shutil.copytree(run, incoming)
            return load_bundle_data(names.read_json(run / BUNDLE), self.data)
        data = prepare_data(load(run, model=self.model, device_name="cpu"), self.data)
        options = {
            "out": incoming,
            "name": self.registry.name,
            "data": data,
            "model": self.model,
            "reference_splits": self.reference_splits,
        }
        if self.to is None and all(importlib.util.find_spec(each) for each in _ONNX_PACKAGES):
            try:
                export(run, to=("onnx", "safetensors"), **options, log=self.log)
                return data
            except ParityError:
                raise
            except PluginError as error:
                self.log(f"note: {error.what}, so the version holds safetensors alone ({error.why})")
        elif self.to is None:
            self.log("note: without the packages of 'tuneforge[export]' the version holds safetensors alone")
        export(run, to=self.to or ("safetensors",), **options, log=self.log)
        return data


def _default_name(run: Path) -> str:
    """What the run's data source is called: it stays when the model is tuned again."""
    if (run / BUNDLE).is_file():
        config = names.read_json(run / BUNDLE)["run"]["config"]
    else:
        config = names.read_json(run / names.RUN)["config"]
    name = config["data"]["name"]
    return run.absolute().name if "." in name or ":" in name else name.rpartition("/")[2]


def _prepare_old_test_set(
    champion: InferenceModel | None, challenger: InferenceModel, data: Data
) -> Split | PairedSplit:
    """The champion's own test split, also as the challenger stores inputs where it does so otherwise."""
    own = challenger.record["fingerprints"]["test"]
    if champion is None or champion.record["fingerprints"]["test"] == own:
        return data.test
    before = load_bundle_data(champion.record).test
    if same_contract(champion.inputs, challenger.inputs):
        return before
    now = load_bundle_data(champion.record, storage_record=challenger.record).test
    same = len(now) == len(before) and all(now.id_of(row) == before.id_of(row) for row in range(len(now)))
    return PairedSplit(before, now) if same else before
