"""Which sample comes when, and each sample's random numbers: pure functions of (seed, epoch, sample).

Nothing here holds state, so a run resumed anywhere, with any number of workers or ranks, sees the same order and
the same augmentation. An order is a keyed permutation that can be asked at any position, never a shuffled list:
memory stays flat at a billion samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
_MASK = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 6  # a Feistel network of 4 rounds is a pseudorandom permutation (Luby and Rackoff 1988); 2 to spare


def splitmix64(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of the input reaches every bit of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive_seed(*parts: int | str) -> int:
    """One 64-bit key from numbers and names; the same parts give the same key on every machine."""
    key = 0
    for part in parts:
        word = zlib.crc32(part.encode()) if isinstance(part, str) else part
        key = _splitmix64_int(key + 0x9E3779B97F4A7C15 + word & _MASK)
    return key


def _splitmix64_int(word: int) -> int:
    """`splitmix64` of one word: twelve times faster than by an array of one."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK
    return word ^ (word >> 31)


@attrs.frozen
class Permutation:
    """A keyed permutation of `range(size)`, asked at any positions.

    A balanced Feistel network permutes the next power of four; positions that land outside `size` walk on along
    their cycle until they land inside (Black and Rogaway 2002), which takes fewer than four steps on average.
    """

    size: int
    key: int

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The members at `positions` (n,), each in `range(size)`."""
        walk = self._build_step(len(positions))
        members = walk(positions.astype(np.uint64))
        while (outside := members >= np.uint64(self.size)).any():
            members[outside] = walk(members[outside])
        return members.astype(np.int64)

    def _build_step(self, count: int) -> Callable[[Words], Words]:
        """One step of the cycle: looked up in a table where the positions asked are a good part of all.

        An epoch of 1,437 samples took 1.9 ms without the table and takes 0.3 ms with it (2 cores).
        """
        domain = 1 << (2 * self._half_bits)
        if domain > min(1 << 20, 16 * count):
            return self._feistel
        table = self._feistel(np.arange(domain, dtype=np.uint64))
        return lambda words: table[words]

    @property
    def _half_bits(self) -> int:
        """Bits of each half of a word."""
        return max(1, ((self.size - 1).bit_length() + 1) // 2)

    def _feistel(self, words: Words) -> Words:
        half = np.uint64(self._half_bits)
        mask = np.uint64((1 << int(half)) - 1)
        left, right = words >> half, words & mask
        for number in range(_ROUNDS):
            round_key = np.uint64(_splitmix64_int(self.key + number & _MASK))
            left, right = right, left ^ (splitmix64(right ^ round_key) & mask)
        return (left << half) | right


@attrs.frozen(eq=False)
class EpochSampler:
    """The order of one epoch.

    Args:
        size: Samples in the split, and draws in the epoch.
        seed: The run's.
        epoch: Counted over the whole run.
        num_draws: Draws of each pool (pools,), where sampling is weighted; they sum to `size`.
        groups: Rows of each pool, where sampling is weighted.
    """

    size: int
    seed: int
    epoch: int
    num_draws: tuple[int, ...] = ()
    groups: tuple[Tensor, ...] = ()

    def indices(self, start: int, stop: int) -> Tensor:
        """The rows at positions `start` to `stop` of this epoch, int64 (stop - start,)."""
        return self.indices_at(np.arange(start, stop))

    def indices_at(self, positions: NDArray[np.int64]) -> Tensor:
        """The rows at these positions of this epoch, int64 (m,)."""
        places = Permutation(self.size, derive_seed(self.seed, "order", self.epoch))(positions)
        return torch.from_numpy(places) if not self.groups else self._draw_from_groups(places)

    def _draw_from_groups(self, places: NDArray[np.int64]) -> Tensor:
        """Each pool fills its share of places, and walks its own permutation as often as it must."""
        borders = np.cumsum(self.num_draws)
        chosen = np.searchsorted(borders, places, side="right")
        within = places - np.concatenate([[0], borders[:-1]])[chosen]
        rows = torch.empty(len(places), dtype=torch.int64)
        for pool in np.unique(chosen):
            here = chosen == pool
            members = self.groups[pool]
            lap, place = np.divmod(within[here], len(members))
            rows[torch.from_numpy(here)] = members[
                torch.from_numpy(self._permute_laps(int(pool), len(members), lap, place))
            ]
        return rows

    def _permute_laps(
        self, group: int, size: int, lap: NDArray[np.int64], place: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        out = np.empty(len(place), np.int64)
        for number in np.unique(lap):
            here = lap == number
            out[here] = Permutation(size, derive_seed(self.seed, "pool", self.epoch, group, int(number)))(place[here])
        return out


@attrs.frozen(eq=False)
class SampleRNG:
    """Random numbers of a batch, each sample's from its own counter.

    Args:
        seed: The run's.
        epoch: Counted over the whole run.
        indices: Rows of the split in this batch, int64 (batch,).
        salt: Tells two users of one stream apart.
    """

    seed: int
    epoch: int
    indices: Tensor
    salt: int = 0

    def uniform(self, stream: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32 (batch, *shape), on the CPU; another `stream` is independent."""
        count = int(np.prod(shape, dtype=np.int64)) if shape else 1
        start = splitmix64(
            self.indices.numpy().astype(np.uint64) ^ np.uint64(derive_seed(self.seed, stream, self.epoch, self.salt))
        )
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        words = splitmix64(start[:, None] + steps[None, :])
        numbers = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return torch.from_numpy(numbers.reshape(len(self.indices), *shape))

    def normal(self, stream: str, *shape: int) -> Tensor:
        """Standard normal, float32 (batch, *shape), by Box and Muller's transform of two uniforms."""
        radius = (-2.0 * torch.log1p(-self.uniform(stream + "/radius", *shape))).sqrt()
        return radius * torch.cos(2.0 * torch.pi * self.uniform(stream + "/angle", *shape))
