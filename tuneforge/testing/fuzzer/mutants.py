"""Planted defects: each replaces one function of the engine by one that is wrong, so that the fuzzer must find it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.feature_cache import extract, verification
from tuneforge.engine.feature_cache.cache import FeatureCache, TracedState
from tuneforge.engine.feature_cache.verification import SplitVerification
from tuneforge.engine.model import inspection
from tuneforge.engine.model.freeze_check import FreezeCheck
from tuneforge.engine.model.inspection import StateCopy
from tuneforge.engine.session import resume
from tuneforge.engine.session.resume import ResumeState
from tuneforge.testing.fuzzer.runs import replace_attribute

Plant = Callable[[], AbstractContextManager[None]]


def _change_restored_state(change: Callable[[dict[str, Any]], Any]) -> Plant:
    """Return a defect that changes the state of a checkpoint before it is restored."""

    def build(restore: Any) -> Any:
        def restore_changed(self: ResumeState, state: dict[str, Any]) -> None:
            change(state)
            restore(self, state)

        return restore_changed

    return lambda: replace_attribute(ResumeState, "restore", build)


def _change_restored_run(change: Callable[[Run], Any]) -> Plant:
    """Return a defect that changes the run after a restore."""

    def build(restore: Any) -> Any:
        def restore_and_change(self: ResumeState, state: dict[str, Any]) -> None:
            restore(self, state)
            change(self.run)

        return restore_and_change

    return lambda: replace_attribute(ResumeState, "restore", build)


def _change_phase(**fields: Any) -> Plant:
    """Return a defect that restores other values of the phase under way."""
    return _change_restored_state(lambda state: state["phase"] and state["phase"].update(fields))


def _change_check(change: Callable[[FreezeCheck], Any]) -> Plant:
    """Return a defect that changes what the freeze check holds at the end of a phase."""

    def build(finish: Any) -> Any:
        def finish_changed(self: FreezeCheck, *args: Any) -> Any:
            change(self)
            return finish(self, *args)

        return finish_changed

    return lambda: replace_attribute(FreezeCheck, "finish", build)


def _drop_buffers(state: dict[str, Any]) -> None:
    """Set what is no parameter, buffers of the blocks and of norms, to zero."""
    names = ("running_mean", "running_var", "num_batches_tracked", "mean", "variance", "center", "passes")
    for name, tensor in state["model"].items():
        if name.rpartition(".")[2] in names:
            state["model"][name] = torch.zeros_like(tensor)


def _drop_last_tensor(state: dict[str, Any]) -> None:
    name = list(state["model"])[-1]
    state["model"][name] = torch.zeros_like(state["model"][name])


def _pass(verify: Any) -> Any:
    """Return a check that finds nothing."""
    return lambda *args, **kwargs: None


def _change_outcome(change: Callable[[SplitVerification, Mapping[str, Any], Any], Any]) -> Callable[[Any], Any]:
    """Return a defect of the verification: what a pass gave and left behind is compared in part only."""

    def build(outcome: Any) -> Any:
        return lambda self, results: change(self, results, outcome)

    return build


def _without_gradients(self: SplitVerification, results: Mapping[str, Any], outcome: Any) -> Any:
    return outcome(self, {name: each for name, each in results.items() if not name.startswith("gradient of ")})


def _without_state(kind: Callable[[SplitVerification, str], bool]) -> Any:
    def outcome_without(self: SplitVerification, results: Mapping[str, Any], outcome: Any) -> Any:
        found = outcome(self, results)
        return attrs.evolve(found, model={path: each for path, each in found.model.items() if not kind(self, path)})

    return outcome_without


def _fetch_once(prepare: Any) -> Any:
    return lambda self, indices, epoch=0: prepare(self, indices, 0)


def _leave_out_weights(hash_model: Any) -> Any:
    """Return a key of the features on disk that does not depend on the weights."""

    def hash_without_weights(run: Any, backbone: Any, size: int) -> Any:
        empty = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
        return f"{hash_model(run, empty, size)} {hashlib.sha256(backbone.code.encode()).hexdigest()}"

    return hash_without_weights


def _shift_rows(get: Any) -> Any:
    def get_shifted(self: FeatureCache, split: Any, indices: Tensor, **kwargs: Any) -> Any:
        return get(self, split, (indices + 1) % len(split), **kwargs)

    return get_shifted


def _restore_without(is_left: Callable[[StateCopy, str], bool], *, holders: bool = True) -> Plant:
    """Return a defect of the inspections: some tensors, or all plain attributes, are left as a pass has made them."""

    def build(restore: Any) -> Any:
        def restore_some(self: StateCopy, *args: Any) -> None:
            before = self._holders, self._tensors
            self._holders = self._holders if holders else []
            self._tensors = [each for each in self._tensors if not is_left(self, each[0])]
            try:
                restore(self, *args)
            finally:
                self._holders, self._tensors = before

        return restore_some

    return lambda: replace_attribute(StateCopy, "restore", build)


@contextlib.contextmanager
def _keep_generators() -> Iterator[None]:
    """Plant inspections after which the random generators stay where the passes left them."""
    with (
        replace_attribute(inspection, "restore_rng_states", _pass),
        replace_attribute(verification, "restore_rng_states", _pass),
    ):
        yield


def _skip_statistics(check: FreezeCheck) -> None:
    check.frozen[:] = [name for name in check.frozen if not name.endswith(("mean", "var"))]


@attrs.frozen
class Mutant:
    """A planted defect.

    Args:
        relation: The relation that it breaks.
        plant: Returns a context in which the engine has the defect.
        seed: A seed that finds it.
    """

    relation: str
    plant: Plant
    seed: int


def _verification(change: Any) -> Plant:
    return lambda: replace_attribute(SplitVerification, "_outcome", _change_outcome(change))


MUTANTS: Mapping[str, Mutant] = {
    "cache serves the next row": Mutant(
        "cache", lambda: replace_attribute(FeatureCache, "get_features", _shift_rows), 0
    ),
    "cache does not watch the model": Mutant(
        "cache", lambda: replace_attribute(TracedState, "find_change", lambda find: lambda self, evaluating: ""), 4
    ),
    "cache on disk is found for other weights": Mutant(
        "cache", lambda: replace_attribute(extract, "_hash_model", _leave_out_weights), 137
    ),
    "verification compares nothing": Mutant("cache", lambda: replace_attribute(SplitVerification, "verify", _pass), 11),
    "verification ignores gradients": Mutant("cache", _verification(_without_gradients), 18),
    "verification ignores buffers": Mutant(
        "cache", _verification(_without_state(lambda self, path: path in self.before.registered)), 151
    ),
    "verification ignores plain attributes": Mutant(
        "cache", _verification(_without_state(lambda self, path: path not in self.before.registered)), 48
    ),
    "verification fetches samples once": Mutant(
        "cache", lambda: replace_attribute(SplitVerification, "_prepare", _fetch_once), 63
    ),
    "verification accepts mixed samples": Mutant(
        "cache", lambda: replace_attribute(verification, "_check_close", _pass), 74
    ),
    "inspections leave parameters": Mutant("cache", _restore_without(lambda self, path: path in self.parameters), 0),
    "inspections leave buffers": Mutant(
        "cache", _restore_without(lambda self, path: path in self.registered - self.parameters), 27
    ),
    "inspections leave plain attributes": Mutant(
        "cache", _restore_without(lambda self, path: path not in self.registered, holders=False), 27
    ),
    "inspections leave random generators": Mutant("cache", _keep_generators, 22),
    "restore forgets the optimizer's state": Mutant(
        "resume", _change_restored_state(lambda state: state.update(optimizer={})), 2
    ),
    "restore forgets the step counter": Mutant("resume", _change_restored_run(lambda run: setattr(run, "step", 0)), 2),
    "restore forgets the epoch": Mutant("resume", _change_restored_run(lambda run: setattr(run, "epoch", 0)), 2),
    "restore forgets the random state": Mutant(
        "resume", _change_restored_state(lambda state: state.update(random=torch.Generator().get_state())), 217
    ),
    "restore forgets the generators of Python and numpy": Mutant(
        "resume", lambda: replace_attribute(resume, "restore_generators", _pass), 22
    ),
    "restore forgets buffers": Mutant("resume", _change_restored_state(_drop_buffers), 13),
    "restore forgets a parameter": Mutant("resume", _change_restored_state(_drop_last_tensor), 2),
    "restore forgets plain attributes": Mutant(
        "resume", _change_restored_state(lambda state: [each.update(attributes={}) for each in state["ranks"]]), 2
    ),
    "restore forgets the components' state": Mutant(
        "resume", _change_restored_run(lambda run: run.engine_state.component_states.clear()), 20
    ),
    "restore forgets the position in the epoch": Mutant("resume", _change_phase(batch=0), 2),
    "restore forgets the steps of the phase": Mutant("resume", _change_phase(steps_done=0), 2),
    "restore forgets the loss so far": Mutant("resume", _change_phase(count=1), 2),
    "freeze check compares nothing": Mutant("freezing", _change_check(lambda check: check.frozen.clear()), 0),
    "freeze check compares the first tensor": Mutant(
        "freezing", _change_check(lambda check: check.frozen.__delitem__(slice(1, None))), 0
    ),
    "freeze check skips statistics": Mutant("freezing", _change_check(_skip_statistics), 38),
    "freeze check accepts trained tensors that stand still": Mutant(
        "freezing", _change_check(lambda check: check.unmoved.clear()), 1
    ),
}
"""Every planted defect by name."""
