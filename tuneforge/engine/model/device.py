"""The one place that knows what kinds of device there are."""

from __future__ import annotations

import importlib
import os

import attrs
import torch
from torch import Tensor

from tuneforge.errors import UsageError


@attrs.frozen
class Device:
    """Where a run computes.

    Args:
        torch: The device as torch names it.
        lazy: True where operations wait until a step is marked, as on a TPU through torch-xla.
    """

    torch: torch.device
    lazy: bool = False

    def move(self, tensor: Tensor) -> Tensor:
        """The tensor on this device; the same object where it is there already."""
        return tensor if tensor.device == self.torch else tensor.to(self.torch, non_blocking=True)

    def mark_step(self) -> None:
        """Tell a lazy device that a step's graph is complete; nothing on eager ones."""
        if self.lazy:
            importlib.import_module("torch_xla.core.xla_model").mark_step()

    def loss_accumulator(self) -> Tensor:
        """A zero to add losses to, wide enough for many."""
        wide = torch.float32 if self.torch.type == "mps" else torch.float64
        return torch.zeros((), dtype=wide, device=self.torch)

    def empty_cache(self) -> None:
        """Give back memory that is held and not used."""
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()

    def reseed(self, seed: int) -> None:
        """Seed the device's own generator, where it has one beside the CPU's."""
        if self.torch.type in ("cuda", "mps", "xpu"):
            getattr(torch, self.torch.type).manual_seed(seed)


def resolve_device(name: str) -> Device:
    """The device of that name; `auto` takes an accelerator where there is one.

    Raises:
        UsageError: There is no such device here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return Device(_with_index(_local_device(found)) if found is not None else torch.device("cpu"))
    try:
        if name.partition(":")[0] == "xla":
            return Device(importlib.import_module("torch_xla.core.xla_model").xla_device(), lazy=True)
        return Device(_with_index(_local_device(torch.device(name))))
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(
            f"device '{name}' is not available",
            where="--device",
            why=str(error).partition("\n")[0],
            fix="use --device auto, or see what there is: tuneforge doctor",
        ) from None


def _local_device(device: torch.device) -> torch.device:
    """Of several devices of one kind, the one that torchrun means this process to have."""
    if str(device) == device.type != "cpu" and "LOCAL_RANK" in os.environ:
        return torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    return device


def _with_index(device: torch.device) -> torch.device:
    """The device with its index, as tensors report it: `cuda` is `cuda:0`."""
    return torch.empty(0, device=device).device


_OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How the CPU, Apple's GPUs and CUDA's libraries say in a plain RuntimeError that memory has run out."""


def root_cause(error: BaseException) -> BaseException:
    """What an error was made from, at the bottom of its causes."""
    return error if error.__cause__ is None else root_cause(error.__cause__)


def is_out_of_memory(error: BaseException) -> bool:
    """True where memory ran out, on whatever device and however the error has been wrapped."""
    root = root_cause(error)
    return isinstance(root, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(root) for words in _OUT_OF_MEMORY_MESSAGES
    )
