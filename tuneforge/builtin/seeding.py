"""Initial weights that follow from the run's seed, whatever was drawn before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Inside, the CPU's generator starts from `seed`; afterwards it stands where it stood."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
