"""Weights and buffers that a model's forward pass writes to even in eval mode, such as embeddings with `max_norm`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tuneforge.engine.model.inspection import preserve_state
from tuneforge.engine.model.model import call_module
from tuneforge.engine.model.module_state import bitwise_equal, full_state
from tuneforge.errors import PluginError

_MAX_REPEATS = 20  # rescaling a row may leave it above the limit in its last bit


@attrs.frozen
class ForwardWrites:
    """What a forward pass in eval mode writes to.

    Args:
        rescaled: Embedding weights whose rows are scaled down when they are looked up, by name, with the largest norm
            and the type of the norm.
        written: Names of other parameters and buffers that change.
    """

    rescaled: dict[str, tuple[float, float]] = attrs.field(factory=dict)
    written: frozenset[str] = frozenset()

    @classmethod
    def find(cls, module: nn.Module, example: Any) -> ForwardWrites:
        """Observe one forward pass in eval mode; the module is left as it was."""
        names = {each.data_ptr(): name for name, each in module.named_parameters() if each.numel()}
        recorder = _Recorder(names)
        with preserve_state(module), torch.no_grad():
            before = {name: each.clone() for name, each in full_state(module).items()}
            module.eval()
            with contextlib.suppress(Exception), recorder:  # `check_output` reports a module that does not run
                call_module(module, example)
            after = full_state(module)
            written = {name for name, each in before.items() if not bitwise_equal(each, after[name])}
        return cls(recorder.rescaled, frozenset(written))

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors that a forward pass may change."""
        return self.written.union(self.rescaled)

    def settle(self, module: nn.Module, trainable: Collection[str]) -> list[str]:
        """Scale all rows of frozen embeddings as a lookup does, so that no later lookup changes them.

        Returns:
            The names of the weights that this has changed.
        """
        named = dict(module.named_parameters())
        frozen = [name for name in self.rescaled if name not in trainable]
        return [name for name in frozen if _rescale_all_rows(named[name].detach(), *self.rescaled[name])]

    def check_frozen(self, frozen: Collection[str]) -> None:
        """Check that no frozen tensor is written to.

        Raises:
            PluginError: One is.
        """
        names = [name for name in frozen if name in self.written]
        if names:
            raise PluginError(
                f"the model's forward pass writes to frozen tensors: {', '.join(names[:5])}",
                where="a forward pass in eval mode",
                why="frozen tensors must stay bit-identical",
                fix="train them, or write to them in training mode only (if self.training)",
            )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Records the embeddings that are rescaled, and leaves them as they are."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names, self.rescaled = names, dict[str, tuple[float, float]]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.embedding_renorm_.default and args[0].data_ptr() in self._names:
            self.rescaled[self._names[args[0].data_ptr()]] = (args[2], args[3])
            return args[0]
        return func(*args, **(kwargs or {}))


def _rescale_all_rows(weight: Tensor, max_norm: float, norm_type: float) -> bool:
    """Scale each row down to the norm, in place, until nothing changes; return whether anything has changed."""
    rows, before = torch.arange(len(weight), device=weight.device), weight.clone()
    with torch.no_grad():
        for _ in range(_MAX_REPEATS):
            last = weight.clone()
            torch.embedding_renorm_(weight, rows, max_norm, norm_type)
            if bitwise_equal(last, weight):
                break
    return not bitwise_equal(before, weight)
