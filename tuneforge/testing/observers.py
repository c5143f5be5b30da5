"""Callbacks that observe a run for the conformance kit, independently of the engine's own freeze check."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuneforge import Phase, Run, hookimpl

MIN_GRADIENT = 1e-6
"""Smaller gradients may change nothing, because optimizers add an epsilon to their divisor."""

UPSTREAM_PREFIXES: Mapping[str, tuple[str, ...]] = {"stem.0": (), "body.1": ("stem.", "twins.", "body.0.")}
"""For each norm of the fixtures without parameters, the modules before it; if none trains, the norm is frozen."""

_DDP_PREFIX = "module."
"""The prefix that DistributedDataParallel adds to every name."""


def get_named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, including buffers that are never saved."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def is_bit_equal(one: Tensor, other: Tensor) -> bool:
    """Return True if both tensors hold the same bits; NaN equals itself."""
    return one.dtype == other.dtype and torch.equal(_view_as_bytes(one), _view_as_bytes(other))


class InvariantChecker:
    """Checks that each phase changes what it trains and nothing else; `violations` holds a sentence for each failure.

    Args:
        check_forward: Check the outputs of frozen norms and dropout too; the hooks for it turn the feature cache off.
    """

    def __init__(self, *, check_forward: bool = False) -> None:
        self.violations: list[str] = []
        self.changed_tensors: dict[str, set[str]] = {}
        self.num_forward_checks = 0
        self._check_forward = check_forward
        self._handles: list[Any] = []

    @hookimpl
    def phase_started(self, run: Run) -> None:
        """Copy every tensor, and record which may not change."""
        tensors = get_named_tensors(run.model.module)
        self._before = {name: each.detach().clone() for name, each in tensors.items()}
        parameters = run.model.parameters()
        self._trainable = {name for name, each in parameters.items() if each.requires_grad}
        self._trains_all = len(self._trainable) == len(parameters)
        self._frozen = {name for name in self._before if self._must_not_change(name, run)}
        self._with_gradient: set[str] = set()
        self._without_optimizer: set[str] = set()
        if self._check_forward:
            self._register_forward_hooks(run)

    @hookimpl(wrapper=True)
    def optimizer_step(self, run: Run) -> Generator[None, Any, Any]:
        """Record tensors whose gradient must change them, and tensors with a gradient but without an optimizer."""
        lrs = {id(each): group["lr"] for group in run.optimization.param_groups() for each in group["params"]}
        for name, each in run.model.parameters().items():
            if name not in self._with_gradient and _must_change(each, lrs.get(id(each), 1.0)):
                self._with_gradient.add(name)
            if each.requires_grad and id(each) not in lrs and name not in self._without_optimizer:
                self._without_optimizer.add(name)
                self._add_violation(
                    f"phase '{_get_phase(run).name}': {name} requires a gradient, and no optimizer holds it"
                )
        result = yield
        return result

    @hookimpl
    def epoch_ended(self, run: Run) -> None:
        """Compare after each validation."""
        self._compare(run, "after a validation")

    @hookimpl(tryfirst=True)
    def phase_ended(self, run: Run) -> None:
        """Compare at the end, before the best weights are restored."""
        self._compare(run, "at the end")
        phase, now = _get_phase(run), get_named_tensors(run.model.module)
        changed = {name for name, each in self._before.items() if not is_bit_equal(each, now[name].detach())}
        for name in sorted((self._with_gradient & self._trainable) - changed):
            self._add_violation(f"phase '{phase.name}': {name} trains, got a gradient and did not change")
        self.changed_tensors[phase.name] = changed
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _add_violation(self, sentence: str) -> None:
        if sentence not in self.violations:
            self.violations.append(sentence)

    def _compare(self, run: Run, when: str) -> None:
        now = get_named_tensors(run.model.module)
        for name in sorted(self._frozen):
            if not is_bit_equal(self._before[name], now[name].detach()):
                self._add_violation(f"phase '{_get_phase(run).name}': {name} is frozen and has changed, {when}")
                self._frozen.discard(name)

    def _must_not_change(self, name: str, run: Run) -> bool:
        if name in run.model.parameters():
            return name not in self._trainable
        path = name.rpartition(".")[0]
        norm = run.model.module.get_submodule(path)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or _get_phase(run).batchnorm_stats == "updating":
            return False
        return self._is_frozen(path, norm)

    def _is_frozen(self, path: str, norm: nn.Module) -> bool:
        """Return True for a norm with a frozen parameter, or with no parameters and nothing trainable before it.

        Where all parameters train, nothing is frozen, and every norm behaves as after `module.train()`.
        """
        if self._trains_all:
            return False
        own = list(norm.parameters(recurse=False))
        if own:
            return not all(each.requires_grad for each in own)
        before = UPSTREAM_PREFIXES.get(path.removeprefix(_DDP_PREFIX))
        return before is not None and not any(
            name.removeprefix(_DDP_PREFIX).startswith(before) for name in self._trainable
        )

    def _register_forward_hooks(self, run: Run) -> None:
        name = _get_phase(run).name
        for path, module in run.model.module.named_modules():
            if isinstance(module, nn.Dropout):
                self._handles.append(module.register_forward_hook(self._make_dropout_hook(name, path)))
            has_statistics = isinstance(module, nn.BatchNorm1d) and module.track_running_stats
            if has_statistics and _get_phase(run).batchnorm_stats != "updating" and self._is_frozen(path, module):
                self._handles.append(module.register_forward_hook(self._make_batchnorm_hook(name, path)))

    def _make_dropout_hook(self, phase: str, path: str) -> Callable[..., None]:
        def check(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() and not args[0].requires_grad:
                self.num_forward_checks += 1
                if not torch.equal(args[0], output):
                    self._add_violation(f"phase '{phase}': dropout '{path}' is active, but nothing before it trains")

        return check

    def _make_batchnorm_hook(self, phase: str, path: str) -> Callable[..., None]:
        def check(module: nn.BatchNorm1d, args: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled():
                self.num_forward_checks += 1
                mean, variance = module.running_mean, module.running_var
                expected = F.batch_norm(args[0], mean, variance, module.weight, module.bias, eps=module.eps)
                if not torch.allclose(expected, output, atol=1e-4):
                    self._add_violation(
                        f"phase '{phase}': norm '{path}' is frozen and normalizes with batch statistics"
                    )

        return check


class TrainModeCaller:
    """A callback that sets the whole model to training mode before and after every optimizer step and evaluation."""

    def __init__(self) -> None:
        self.num_calls = 0

    @hookimpl
    def phase_started(self, run: Run) -> None:
        """Before the first step."""
        self._train(run)

    @hookimpl(wrapper=True)
    def optimizer_step(self, run: Run) -> Generator[None, Any, Any]:
        """After each step."""
        result = yield
        self._train(run)
        return result

    @hookimpl
    def evaluation_started(self, run: Run) -> None:
        """Before each evaluation."""
        self._train(run)

    @hookimpl
    def evaluation_ended(self, run: Run) -> None:
        """After each evaluation."""
        self._train(run)

    def _train(self, run: Run) -> None:
        self.num_calls += 1
        run.model.module.train()


class SampleRecorder:
    """Records the indices of the samples of each batch, with the optimizer step that uses them."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, tuple[int, ...]]] = []
        self.indices_by_epoch: dict[int, list[int]] = {}

    @hookimpl(wrapper=True)
    def train_step(self, run: Run, batch: Any) -> Generator[None, Any, Any]:
        """Record the indices, except during a diagnosis."""
        if run.optimization.optimizer is not None and run.engine_state.freeze_check is not None:
            self.batches.append((run.step, tuple(batch.indices.tolist())))
            self.indices_by_epoch.setdefault(run.epoch, []).extend(batch.indices.tolist())
        result = yield
        return result


def _must_change(parameter: Tensor, lr: float) -> bool:
    """Return True if the gradient must change the tensor: a plain SGD step exceeds the rounding error."""
    if parameter.grad is None:
        return False
    gradient, least = parameter.grad.abs(), 4 * torch.finfo(parameter.dtype).eps * parameter.detach().abs()
    return bool(((gradient > MIN_GRADIENT) & (lr * gradient > least)).any())


def _get_phase(run: Run) -> Phase:
    assert run.phase is not None
    return run.phase


def _view_as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)
