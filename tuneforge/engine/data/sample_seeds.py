"""Random numbers that a source draws while it reads a sample: all generators are seeded for each sample.

Datasets of users draw from the global generators of Python, numpy and torch, or from generators of their own. Worker
processes and a resumed run have them in other states, so every sample is read with generators that are seeded from
(seed, epoch, sample), and the process gets the states back that it had.
"""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuneforge.engine.data.sampler import derive_seed, splitmix64
from tuneforge.engine.data.tensor_tree import TensorTree, concatenate_inputs

FIXED_DRAW = 0
"""The key of every read outside of training: evaluations and reports see the same draw of a sample."""

_MAX_OBJECTS = 10_000  # objects of a source among which generators are looked for
_MAX_ITEMS = 256  # items of one collection; longer ones hold samples, not generators
_LIBRARIES = frozenset(("torch", "torchvision", "numpy", "builtins", "typing", "collections", "functools", "tuneforge"))
_LEAVES = (str, bytes, bytearray, int, float, complex, bool, type(None), Tensor, np.ndarray, np.generic)
_LOW_63_BITS = 0x7FFFFFFFFFFFFFFF


def epoch_key(seed: int, epoch: int) -> int:
    """Return the key of the draws of one training epoch."""
    return derive_seed(seed, "fetch", epoch)


class SeededFetcher:
    """Fetches samples of a source, each with all random generators seeded for it.

    A source that has a fingerprint returns the same sample at every fetch, so nothing is seeded for it.

    Args:
        source: A source. If it has a method `fetch_seeded(indices, seed_sample)`, that is called instead of `fetch`,
            and has to call `seed_sample(position)` before it reads the sample at a position of `indices`, and may call
            it with the number of samples before it works on all of them. Samples of other sources are fetched one by
            one.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._generators: Generators | None = None

    def fetch(self, indices: Tensor, key: int = FIXED_DRAW) -> TensorTree:
        """Return the stored inputs at `indices`, int64 (b,); samples differ between two keys if they are random."""
        if not is_random(self._source):
            stored: TensorTree = self._source.fetch(indices)
            return stored
        if self._generators is None:
            self._generators = Generators(self._source)
        generators = self._generators
        seeds = splitmix64(indices.numpy().astype(np.uint64) ^ np.uint64(key)).tolist()
        seeds.append(derive_seed(key, "batch", *seeds))
        with generators.preserve():
            return fetch_seeded(self._source, indices, lambda position: generators.seed(seeds[position]))


def is_random(source: Any) -> bool:
    """Return True if a source may return another sample at each fetch: it has no fingerprint."""
    if hasattr(source, "draws_random"):
        return bool(source.draws_random)
    underlying = getattr(source, "underlying", None)
    return is_random(underlying) if underlying is not None else not hasattr(source, "fingerprint")


def is_batch_dependent(source: Any) -> bool:
    """Return True if a source says that a sample may depend on the others that are fetched with it."""
    underlying = getattr(source, "underlying", None)
    return is_batch_dependent(underlying) if underlying is not None else getattr(source, "batch_dependent", False)


def draw_epoch(sampler: Any, seed: int, epoch: int) -> Tensor:
    """Return the training rows that a `TrainSampler` draws for an epoch, int64 (num_draws,)."""
    generators = Generators(sampler)
    with generators.preserve():
        generators.seed(derive_seed(seed, "sampler", getattr(sampler, "seed", 0), epoch))
        rows: Tensor = sampler.draw(epoch)
    return rows


def fetch_seeded(source: Any, indices: Tensor, seed_sample: Callable[[int], None]) -> TensorTree:
    """Return the stored inputs of a source; `seed_sample` is called with the position of each sample that is read."""
    if hasattr(source, "fetch_seeded"):
        stored: TensorTree = source.fetch_seeded(indices, seed_sample)
        return stored
    samples = []
    for position in range(len(indices)):
        seed_sample(position)
        samples.append(source.fetch(indices[position : position + 1]))
    return samples[0] if len(samples) == 1 else concatenate_inputs(samples)


class Generators:
    """The global generators of Python, numpy and torch, and those that an object reaches.

    Args:
        owner: An object that may hold generators in attributes, transforms, closures, or globals of its functions.
    """

    def __init__(self, owner: Any = None) -> None:
        self._own = _find_generators(owner)

    @contextlib.contextmanager
    def preserve(self) -> Iterator[None]:
        """Restore the state of every generator at the end of the context."""
        states = [(generator, _get_state(generator)) for generator in self._own]
        python, legacy, torch_state = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
            torch.default_generator.set_state(torch_state)
            for generator, state in states:
                _set_state(generator, state)

    def seed(self, seed: int) -> None:
        """Seed every generator from a number of 64 bits."""
        words = [seed & 0xFFFFFFFF, seed >> 32]
        random.seed(seed)
        np.random.seed(words)
        torch.default_generator.manual_seed(seed & _LOW_63_BITS)
        for place, generator in enumerate(self._own):
            _seed_one(generator, derive_seed(seed, place))


def _get_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed_one(generator: Any, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        bits: Any = type(generator.bit_generator)
        generator.bit_generator.state = bits(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed([seed & 0xFFFFFFFF, seed >> 32])
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    else:
        generator.manual_seed(seed & _LOW_63_BITS)


def _find_generators(owner: Any) -> list[Any]:
    """Return the generators that `owner` reaches, without the global ones, in the order of a breadth-first walk."""
    shared = {id(getattr(random, "_inst", None)), id(np.random.mtrand._rand), id(torch.default_generator)}
    found: list[Any] = []
    seen: set[int] = set()
    waiting = deque([owner])
    while waiting and len(seen) < _MAX_OBJECTS:
        each = waiting.popleft()
        if isinstance(each, _LEAVES) or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)):
            if id(each) not in shared and not isinstance(each, random.SystemRandom):
                found.append(each)
        else:
            waiting.extend(_references(each))
    return found


def _references(value: Any) -> Iterable[Any]:
    """Return the objects that a value reaches directly: items, attributes, and what its functions name."""
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= _MAX_ITEMS else ()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value) if len(value) <= _MAX_ITEMS else ()
    if isinstance(value, types.FunctionType):
        return _function_references(value)
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, types.BuiltinMethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, type):
        return () if _is_library(value) else [each for base in value.__mro__ for each in vars(base).values()]
    if isinstance(value, (types.ModuleType, staticmethod, classmethod, property)):
        return [each for each in (getattr(value, "__func__", None), getattr(value, "fget", None)) if each]
    slots = [getattr(value, name, None) for base in type(value).__mro__ for name in vars(base).get("__slots__", ())]
    return [*getattr(value, "__dict__", {}).values(), *slots, type(value)]


def _function_references(function: types.FunctionType) -> list[Any]:
    """Return the closure, the defaults and the globals of a function of the user; nothing of a library's."""
    if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
        return []
    closure = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the cell is empty
            closure.append(cell.cell_contents)
    names = _global_names(function.__code__)
    globals_ = [function.__globals__[name] for name in names if name in function.__globals__]
    inside = [getattr(each, name, None) for each in globals_ if isinstance(each, types.ModuleType) for name in names]
    generators = [each for each in inside if isinstance(each, (np.random.Generator, torch.Generator, random.Random))]
    return [*closure, *(function.__defaults__ or ()), *globals_, *generators]


def _global_names(code: types.CodeType) -> list[str]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return list(dict.fromkeys([*code.co_names, *(name for each in inner for name in _global_names(each))]))


def _is_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _LIBRARIES
