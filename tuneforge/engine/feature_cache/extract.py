"""The values of the frozen part: found, or computed in one fixed geometry, and checked each time they are found."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.context.run import Features, Run
from tuneforge.engine.data.dataset import Batch, Inputable, Split, tensors_of
from tuneforge.engine.data.loader import fetched
from tuneforge.engine.data.sampler import Noise, key_of
from tuneforge.engine.feature_cache.disk import Store, default_folder
from tuneforge.engine.feature_cache.graph_split import NoPrefixError, Parts
from tuneforge.engine.model.freeze_check import same_bits
from tuneforge.engine.model.model import call
from tuneforge.errors import HaltError, TryAgainError
from tuneforge.plugin.component import values_of

Values = tuple[Tensor, ...]


@attrs.define(eq=False)
class Prefix:
    """A model in two parts, with what the first one gave for the training and the validation split.

    Args:
        parts: The model in two.
        bytes_each: Size of the values of one sample.
        views: Fixed augmented views of each training sample; 0 where nothing is augmented.
        kept: The values of a split's samples, by the split's identity and the view.
        computed: Batches that were computed to fill it; 0 where all was found.
        found: How many of its parts were found, in memory or on disk.
    """

    parts: Parts
    bytes_each: int = 0
    views: int = 0
    kept: dict[tuple[int, int], Values] = attrs.field(factory=dict)
    computed: int = 0
    found: int = 0

    @property
    def training(self) -> nn.Module:
        """The values to the answer, while the phase trains."""
        return self.parts.training

    @property
    def evaluating(self) -> nn.Module:
        """The same in eval mode."""
        return self.parts.evaluating

    def values(self, split: Split, rows: Tensor, *, epoch: int = 0) -> Features | None:
        """The values of some samples, or None where the split is not kept; `epoch` picks the view."""
        kept = self.kept.get((id(split), epoch % self.views if self.views else 0))
        return None if kept is None else Features(tuple(each.index_select(0, rows.to(each.device)) for each in kept))


def num_megabytes(run: Run, prefix: Prefix) -> float:
    """Size of all that a prefix keeps."""
    return prefix.bytes_each * (len(run.data.train) * max(1, prefix.views) + len(run.data.val)) / 2**20


@attrs.frozen(eq=False)
class _Later:
    """The prefix of a later phase, and its part of the key."""

    parts: Parts
    model: str


class Filler:
    """Finds or computes the values of a split, in one fixed geometry."""

    def __init__(self, run: Run, prefix: Prefix, pause: Callable[[], None], *, shared: bool) -> None:
        self._run, self._prefix, self._pause = run, prefix, pause
        self._size = _fill_batch(run.example)
        self._mapped = num_megabytes(run, prefix) > run.config.cache_mb
        self._store: Store | None = None
        if run.config.cache == "auto" and shared and num_megabytes(run, prefix) <= run.config.cache_disk_mb:
            self._store = Store(run.config.cache_dir or default_folder(), run.config.cache_disk_mb)
        self._model = _model_key(run, prefix.parts.head, self._size)
        self._later: list[_Later] = []

    def look_ahead(self, later: list[Prefix]) -> None:
        """Keep what these need too, from the same pass."""
        if not self._mapped:
            self._later = [_Later(each.parts, _model_key(self._run, each.parts.head, self._size)) for each in later]

    def values(self, name: str, split: Split, view: int | None) -> Values:
        """The values of all samples of a split, from the store where they are in it."""
        key = self._key(split, view, self._model)
        if key in self._run.features:
            values = self._run.features.pop(key)
            self._guard(values, split, view, key)
            self._prefix.found += 1
            return values
        if self._mapped and key is None:
            raise NoPrefixError(f"its values need the disk, and the {name} split has no fingerprint to find them by")
        if self._store is None or key is None:
            return self._held(split, view)
        stored, trouble = self._store.get(key, mapped=self._mapped)
        if self._run.ranks.agree(stored is None)[0]:  # all of them fill it, or none
            stored = None
        if trouble:
            self._run.note(f"  {trouble}")
        if stored is not None:
            self._guard(stored, split, view, key)
            self._prefix.found += 1
            return stored if self._mapped else tuple(map(self._run.device.move, stored))
        return self._made(self._store, key, name, split, view)

    def _made(self, store: Store, key: str, name: str, split: Split, view: int | None) -> Values:
        if not self._run.ranks.leads:
            return self._held(split, view)
        about = {"model": type(self._run.model.module).__name__, "split": name, "samples": len(split)}
        held = None if self._mapped else self._held(split, view)
        if held is not None and split.inputs_changed():
            self._run.note("  not shared with other runs: what the data source gives has changed meanwhile")
            return held
        try:
            store.put(key, [held] if held is not None else self._blocks(self._prefix.parts.head, split, view), about)
        except OSError as error:
            why = f"the cache cannot be written ({error.strerror or error})"
            if held is None:  # going on without it would give other bits
                raise TryAgainError(
                    "there is no room for what the frozen part gives",
                    where=str(store.folder),
                    why=why,
                    fix="begin another run with another --cache-dir or --cache off; or free some space there, then go "
                    f"on with: tuneforge resume {shlex.quote(str(self._run.folder))}",
                ) from None
            self._run.note(f"  not shared with other runs: {why}")
        if held is not None:
            return held
        values, trouble = store.get(key, mapped=True)
        if values is None:
            raise TryAgainError("the cache lost what was just written", where=str(store.folder), why=trouble)
        return values

    def _held(self, split: Split, view: int | None) -> Values:
        """The values in memory; those of later phases are put aside on the way."""
        own = self._prefix.parts.border
        names = list(dict.fromkeys([*own, *(name for each in self._later for name in each.parts.border)]))
        kept: dict[str, Tensor] = {}
        start = 0
        for block in self._blocks(self._prefix.parts.trace.before(names), split, view):
            for name, value in zip(names, block, strict=True):
                if name not in kept:
                    kept[name] = torch.empty(len(split), *value.shape[1:], dtype=value.dtype, device=value.device)
                kept[name][start : start + len(value)] = value
            start += len(block[0])
        for each in self._later:
            key = self._key(split, view, each.model)
            if key is not None:
                self._run.features[key] = tuple(kept[name] for name in each.parts.border)
        return tuple(kept[name] for name in own)

    def _blocks(self, head: nn.Module, split: Split, view: int | None) -> Iterator[Values]:
        ranks, starts = self._run.ranks, range(0, len(split), self._size)
        rows = (self._rows(split, start) for start in starts[ranks.rank :: ranks.size])
        own = fetched(split, rows, workers=self._run.workers)
        for first in range(0, len(starts), ranks.size):
            self._pause()
            group = [self._rows(split, start) for start in starts[first : first + ranks.size]]
            if ranks.alone:
                yield self._values_of(head, split, *next(own), view)
            else:
                yield from self._shared(head, split, group, own, view)
            self._prefix.computed += len(group)

    def _shared(
        self,
        head: nn.Module,
        split: Split,
        group: list[Tensor],
        own: Iterator[tuple[Tensor, Inputable]],
        view: int | None,
    ) -> Iterator[Values]:
        """One batch a rank, each computed by one of them and given to all."""
        ranks = self._run.ranks
        asked = next(own, None)  # the last group may have no batch for this rank; it computes one to keep in step
        rows, stored = asked or (group[0], split.fetch(group[0]))
        sizes = [len(rows) if rank < len(group) else 0 for rank, rows in enumerate([*group, *group[:1] * ranks.size])]
        values = self._values_of(head, split, rows, stored, view)
        whole = [ranks.gathered(value, sizes[: ranks.size]) for value in values]
        yield from zip(*(torch.split(value, [len(rows) for rows in group]) for value in whole), strict=True)

    def _rows(self, split: Split, start: int) -> Tensor:
        """The rows of one batch, whose place and size follow from the split alone."""
        return torch.arange(start, min(start + self._size, len(split)))

    def _values_of(self, head: nn.Module, split: Split, rows: Tensor, stored: Inputable, view: int | None) -> Values:
        run = self._run
        with torch.no_grad(), run.autocast():
            inputs = run.ready(stored)
            if view is not None and self._prefix.views:
                noise = Noise(run.config.seed, view, rows)
                inputs = run.augmented(Batch(inputs, run.place(split.targets[rows]), rows, None, noise)).inputs
            values: Values = call(head, inputs)
        return values

    def _guard(self, values: Values, split: Split, view: int | None, key: str) -> None:
        """Compute one batch again and compare: a key cannot hold what it does not know of.

        Raises:
            HaltError: The bits differ.
        """
        place = key_of(self._run.config.seed, key) % math.ceil(len(split) / self._size)
        rows = self._rows(split, place * self._size)
        again = self._values_of(self._prefix.parts.head, split, rows, split.fetch(rows), view)
        kept = [each[rows[0] : rows[-1] + 1] for each in values]
        if not all(same_bits(one.cpu(), other.cpu()) for one, other in zip(kept, again, strict=True)):
            raise HaltError(
                "features in the cache are not what the model gives now",
                where="memory" if self._store is None else str(self._store.path_of(key)),
                why="one batch was computed again, and its bits differ: something has changed that the key of the "
                "cache does not hold, such as the code of the model or of the preprocessing",
                fix="delete them with: tuneforge cache clear; or run with --cache off",
            )

    def _key(self, split: Split, view: int | None, model: str) -> str | None:
        """All that the values depend on, in one hash; None where the inputs cannot be told apart."""
        inputs = split.inputs_fingerprint()
        if inputs is None:
            return None
        run = self._run
        parts: dict[str, Any] = {"model": model, "inputs": inputs}
        parts["preprocess"] = [type(run.data.inputs).__qualname__, values_of(run.data.inputs)]
        if view is not None and self._prefix.views:
            parts["view"] = [run.config.seed, view, [[use.name, use.options] for use in run.config.augment]]
        return _hash(parts)


def _model_key(run: Run, head: Any, size: int) -> str:
    """The prefix itself, its weights and buffers, and what else the bits depend on."""
    tensors = hashlib.sha256()
    for name, tensor in [*head.named_parameters(remove_duplicate=False), *head.named_buffers(remove_duplicate=False)]:
        plain = tensor.detach().cpu().contiguous()
        tensors.update(f"{name} {plain.dtype} {tuple(plain.shape)} {tensor.stride()} ".encode())
        tensors.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    parts = {
        "code": head.code,
        "modules": _modules_called(head),
        "tensors": tensors.hexdigest(),
        "batch": size,
        "precision": run.config.precision,
        "channels-last": run.channels_last,
        "device": [str(run.device.torch), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "torch": torch.__version__,
        "kernels": _kernels(run),
    }
    return _hash(parts)


def _kernels(run: Run) -> list[Any]:
    """What chooses the kernels that compute, beside the device's kind."""
    on_cuda = run.device.torch.type == "cuda"
    return [
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.cuda.get_device_name(run.device.torch) if on_cuda else "",
        torch.version.cuda,
    ]


def _modules_called(head: Any) -> dict[str, Any]:
    """What the modules of a graph were built with, as far as plain values show it."""
    plain = (bool, int, float, str, tuple, type(None))
    called = [str(node.target) for node in head.graph.nodes if node.op == "call_module"]
    return {
        f"{name}:{below}": {"": type(each).__qualname__}
        | {key: str(value) for key, value in vars(each).items() if isinstance(value, plain)}
        for name in called
        for below, each in head.get_submodule(name).named_modules()
    }


def _hash(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _fill_batch(example: Any) -> int:
    """Samples of one pass: the fastest from 16 to 64 measured so, by the size of a sample."""
    numbers = sum(tensor[0].numel() for tensor in tensors_of(example).values())
    return max(16, min(64, 1 << (2**21 // max(1, numbers)).bit_length() >> 1))
