"""The device that a run computes on; the only module that knows the kinds of devices."""

from __future__ import annotations

import importlib
import os

import attrs
import torch
from torch import Tensor

from tuneforge.errors import UsageError


@attrs.frozen
class Device:
    """The device that a run computes on.

    Args:
        torch: The device as torch names it.
        lazy: True for a device that queues operations until a step is marked, such as a TPU through torch-xla.
    """

    torch: torch.device
    lazy: bool = False

    def move(self, tensor: Tensor) -> Tensor:
        """Return the tensor on this device; the same object if it is already there."""
        return tensor if tensor.device == self.torch else tensor.to(self.torch, non_blocking=True)

    def mark_step(self) -> None:
        """Tell a lazy device that the graph of a step is complete; do nothing on other devices."""
        if self.lazy:
            importlib.import_module("torch_xla.core.xla_model").mark_step()

    def loss_accumulator(self) -> Tensor:
        """Return a zero scalar to sum losses in: float64, or float32 on MPS, which has no float64."""
        wide = torch.float32 if self.torch.type == "mps" else torch.float64
        return torch.zeros((), dtype=wide, device=self.torch)

    def empty_cache(self) -> None:
        """Return cached memory that is not in use to the device."""
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()

    def reseed(self, seed: int) -> None:
        """Seed the generator of the device, if it has one beside that of the CPU."""
        if self.torch.type in ("cuda", "mps", "xpu"):
            getattr(torch, self.torch.type).manual_seed(seed)


def resolve_device(name: str) -> Device:
    """Return the device of that name; `auto` chooses an accelerator if there is one.

    Raises:
        UsageError: This machine has no such device.
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
    """Return the device that torchrun assigns to this process where a machine has several of one type."""
    if str(device) == device.type != "cpu" and "LOCAL_RANK" in os.environ:
        return torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    return device


def _with_index(device: torch.device) -> torch.device:
    """Return the device with its index, as tensors report it: `cuda` becomes `cuda:0`."""
    return torch.empty(0, device=device).device


_OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of the messages of the plain RuntimeErrors that the CPU, MPS and cuBLAS raise when memory runs out."""


def root_cause(error: BaseException) -> BaseException:
    """Return the error at the end of the chain of causes."""
    return error if error.__cause__ is None else root_cause(error.__cause__)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the error was caused by memory running out, on any device and however it has been wrapped."""
    root = root_cause(error)
    return isinstance(root, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(root) for words in _OUT_OF_MEMORY_MESSAGES
    )
