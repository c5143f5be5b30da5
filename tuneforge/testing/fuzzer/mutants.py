"""Planted defects: each replaces one function of the engine by one that is wrong, so that the fuzzer must find it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tuneforge.engine.feature_cache.cache import FeatureCache
from tuneforge.engine.feature_cache.verification import SplitVerification
from tuneforge.engine.model.freeze_check import FreezeCheck
from tuneforge.engine.session.resume import ResumeState

Mutant = Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def _replace(owner: Any, name: str, build: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by what `build` makes of it."""
    before = vars(owner)[name]
    setattr(owner, name, build(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def _change_restored_state(change: Callable[[dict[str, Any]], Any]) -> Mutant:
    """Return a defect that changes the state of a checkpoint before it is restored."""

    def build(restore: Any) -> Any:
        def restore_changed(self: ResumeState, state: dict[str, Any]) -> None:
            change(state)
            restore(self, state)

        return restore_changed

    return lambda: _replace(ResumeState, "restore", build)


def _change_phase(**fields: Any) -> Mutant:
    """Return a defect that restores other values of the phase under way."""
    return _change_restored_state(lambda state: state["phase"] and state["phase"].update(fields))


def _change_check(change: Callable[[FreezeCheck], Any]) -> Mutant:
    """Return a defect that changes what the freeze check holds at the end of a phase."""

    def build(finish: Any) -> Any:
        def finish_changed(self: FreezeCheck, *args: Any) -> Any:
            change(self)
            return finish(self, *args)

        return finish_changed

    return lambda: _replace(FreezeCheck, "finish", build)


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


def _hide_results(prefix: str) -> Callable[[Any], Any]:
    """Return a defect of the comparison of steps: results whose names begin with `prefix` are not compared."""

    def build(outcome: Any) -> Any:
        def outcome_without(self: SplitVerification, results: Mapping[str, Any]) -> Any:
            return outcome(self, {name: each for name, each in results.items() if not name.startswith(prefix)})

        return outcome_without

    return build


def _shift_rows(get: Any) -> Any:
    def get_shifted(self: FeatureCache, split: Any, indices: Tensor, **kwargs: Any) -> Any:
        return get(self, split, (indices + 1) % len(split), **kwargs)

    return get_shifted


def _skip_statistics(check: FreezeCheck) -> None:
    check.frozen[:] = [name for name in check.frozen if not name.endswith(("mean", "var"))]


MUTANTS: Mapping[str, Mutant] = {
    "cache serves the next row": lambda: _replace(FeatureCache, "get_features", _shift_rows),
    "verification compares nothing": lambda: _replace(SplitVerification, "verify", _pass),
    "verification ignores gradients": lambda: _replace(SplitVerification, "_outcome", _hide_results("gradient of ")),
    "restore forgets the optimizer's state": _change_restored_state(lambda state: state.update(optimizer={})),
    "restore forgets the step counter": _change_restored_state(lambda state: state.update(step=0)),
    "restore forgets the epoch": _change_restored_state(lambda state: state.update(epoch=0)),
    "restore forgets the random state": _change_restored_state(
        lambda state: state.update(random=torch.Generator().get_state())
    ),
    "restore forgets buffers": _change_restored_state(_drop_buffers),
    "restore forgets a parameter": _change_restored_state(_drop_last_tensor),
    "restore forgets the components' state": _change_restored_state(lambda state: state.update(components={})),
    "restore forgets the position in the epoch": _change_phase(batch=0),
    "restore forgets the steps of the phase": _change_phase(steps_done=0),
    "restore forgets the loss so far": _change_phase(count=1),
    "freeze check compares nothing": _change_check(lambda check: check.frozen.clear()),
    "freeze check compares the first tensor": _change_check(lambda check: check.frozen.__delitem__(slice(1, None))),
    "freeze check skips statistics": _change_check(_skip_statistics),
    "freeze check accepts trained tensors that stand still": _change_check(lambda check: check.unmoved.clear()),
}
"""Every planted defect by name."""
