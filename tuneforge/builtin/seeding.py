"""Initial weights that depend only on a seed, not on earlier random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Seed the CPU generator inside the context, and restore its state afterwards."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
