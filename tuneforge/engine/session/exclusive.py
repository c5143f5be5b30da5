"""The state of the process that a run takes for itself: random generators, gradient mode, autocast."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

from tuneforge.engine.model.inspection import restore_rng_states, rng_states
from tuneforge.errors import UsageError

_lock = threading.RLock()


def _replace_lock() -> None:
    """Replace the lock in a forked process, which would inherit it from a thread that it does not have."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_replace_lock)


@contextlib.contextmanager
def exclusive_process_state(device_type: str, *, seed: int) -> Iterator[None]:
    """Give a run the global random generators, gradients and plain precision, whatever the caller left switched on.

    A run within a run, in the same thread, is allowed: the generators are restored after it.

    Args:
        device_type: The type of the device whose autocast is switched off, such as `"cpu"`.
        seed: Seed of the generators of Python and numpy, from which a model may draw; the run seeds torch's itself.

    Raises:
        UsageError: A run is under way in another thread of this process.
    """
    lock = _lock
    autocast = torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else None
    if not lock.acquire(blocking=False):
        raise UsageError(
            "another run is under way in another thread of this process",
            where=f"thread '{threading.current_thread().name}'",
            why="both would draw from the same random generator, so neither could be repeated",
            fix="run one after the other, or each in a process of its own, as tuneforge compare does",
        )
    try:
        with (
            _seeded_generators(seed),
            torch.inference_mode(False),
            torch.enable_grad(),
            autocast or contextlib.nullcontext(),
        ):
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def _seeded_generators(seed: int) -> Iterator[None]:
    """Seed the generators of Python and numpy, and restore these and torch's afterwards."""
    states = rng_states()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        restore_rng_states(states)
