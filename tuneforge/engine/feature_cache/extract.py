"""Extract features: load them from the cache, or compute them in batches of one size; loaded ones are spot-checked."""

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

from tuneforge.engine.context.batches import augment, get_workers, make_batch
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Split, TensorTree, named_tensors
from tuneforge.engine.data.loader import fetch_batches
from tuneforge.engine.data.sample_seeds import FIXED_DRAW, epoch_key
from tuneforge.engine.data.sampler import SampleRNG, derive_seed
from tuneforge.engine.feature_cache.cache import FeatureCache, Values, num_megabytes
from tuneforge.engine.feature_cache.disk import DiskCache, default_cache_dir
from tuneforge.engine.feature_cache.graph_split import NotCacheableError, SplitModel
from tuneforge.engine.model.model import call_module
from tuneforge.engine.model.module_state import bitwise_equal
from tuneforge.engine.model.numerics import describe_numerics
from tuneforge.errors import HaltError, TryAgainError
from tuneforge.plugin.declaration import get_option_values


@attrs.frozen(eq=False)
class _LaterPhase:
    """The split model of a later phase, and the part of its keys that depends on the model."""

    split_model: SplitModel
    model_key: str


class FeatureExtractor:
    """Loads or computes the features of splits, in batches of one size."""

    def __init__(self, run: Run, cache: FeatureCache, save_if_due: Callable[[], None], *, use_disk: bool) -> None:
        self._run, self._cache, self._save_if_due = run, cache, save_if_due
        self.batch_size = _choose_batch_size(run.example)
        self._checked: dict[tuple[int, int | None, int], Values] = {}
        self._use_mmap = num_megabytes(run, cache) > run.config.cache_mb
        self._disk: DiskCache | None = None
        if run.config.cache == "auto" and use_disk and num_megabytes(run, cache) <= run.config.cache_disk_mb:
            self._disk = DiskCache(run.config.cache_dir or default_cache_dir(), run.config.cache_disk_mb)
        self._model_key = _hash_model(run, cache.split_model.backbone, self.batch_size)
        self._later_phases: list[_LaterPhase] = []
        self._names = cache.split_model.cut.crossing
        self._backbone: nn.Module = cache.split_model.backbone

    def add_later_phases(self, caches: list[FeatureCache]) -> None:
        """Extract the features of these caches in the same pass."""
        if not self._use_mmap:
            self._later_phases = [
                _LaterPhase(each.split_model, _hash_model(self._run, each.split_model.backbone, self.batch_size))
                for each in caches
            ]
            crossing = [name for each in caches for name in each.split_model.cut.crossing]
            self._names = tuple(dict.fromkeys([*self._names, *crossing]))
            split_model = self._cache.split_model
            self._backbone = split_model.trace.extract_backbone(self._names, split_model.cut.live)

    def rows(self, split: Split, start: int) -> Tensor:
        """Return the rows of one batch, whose position and size follow from the split alone."""
        return torch.arange(start, min(start + self.batch_size, len(split)))

    def prepare(self, split: Split, indices: Tensor, samples: TensorTree, copy_index: int | None) -> Any:
        """Return what the model takes for stored samples, augmented for one copy of a training split."""
        inputs = self._run.prepare_inputs(samples)
        if copy_index is None or not self._cache.num_augmented_copies:
            return inputs
        rng = SampleRNG(self._run.config.seed, copy_index, indices)
        return augment(self._run, make_batch(self._run, split, indices, inputs, rng, None)).inputs

    def compute(self, inputs: Any) -> Values:
        """Return the features of prepared inputs: the values at the cut, then those that later phases need."""
        with torch.no_grad(), self._run.autocast():
            values: Values = call_module(self._backbone, self._run.forward_pass.convert(inputs))
        return values

    def reuse(self, split: Split, start: int, values: Values) -> None:
        """Take these values as the features of a batch of the first copy of a split, instead of computing them."""
        self._checked[id(split), 0, start] = values

    def load_or_extract(self, name: str, split: Split, copy_index: int | None) -> Values:
        """Return the features of all samples of a split, from memory or disk if they are there.

        Args:
            name: Of the split, for messages.
            split: The split.
            copy_index: The augmented copy of a training split; None for validation.
        """
        key = self._key(split, copy_index, self._model_key)
        later_features = self._run.engine_state.later_features
        if key in later_features:
            values = later_features.pop(key)
            self._verify_features(values, split, copy_index, key)
            self._cache.num_hits += 1
            return values
        if self._use_mmap and key is None:
            raise NotCacheableError(
                f"its features need the disk, and the {name} split has no fingerprint to find them by"
            )
        if self._disk is None or key is None:
            return self._extract_in_memory(split, copy_index)
        stored, warning = self._disk.get(key, use_mmap=self._use_mmap)
        if self._run.process_group.all_reduce_any(stored is None)[0]:  # either all ranks compute them or none does
            stored = None
        if warning:
            self._run.log(f"  {warning}")
        if stored is not None:
            self._verify_features(stored, split, copy_index, key)
            self._cache.num_hits += 1
            return stored if self._use_mmap else tuple(map(self._run.device.move, stored))
        return self._extract_to_disk(self._disk, key, name, split, copy_index)

    def _extract_to_disk(self, disk: DiskCache, key: str, name: str, split: Split, copy_index: int | None) -> Values:
        if not self._run.process_group.is_main:
            return self._extract_in_memory(split, copy_index)
        metadata = {"model": type(self._run.model.module).__name__, "split": name, "samples": len(split)}
        in_memory = None if self._use_mmap else self._extract_in_memory(split, copy_index)
        if in_memory is not None and split.inputs_changed():
            self._run.log("  feature cache: not written to disk, because the data source changed during the run")
            return in_memory
        try:
            disk.put(
                key,
                [in_memory] if in_memory is not None else self._extract_batches(split, copy_index),
                metadata,
            )
        except OSError as error:
            why = f"the cache cannot be written ({error.strerror or error})"
            if in_memory is None:  # without the cache the run would give other bits
                raise TryAgainError(
                    "there is no room for the features of the frozen backbone",
                    where=str(disk.directory),
                    why=why,
                    fix="start another run with another --cache-dir or --cache off; or free some space there, then go "
                    f"on with: tuneforge resume {shlex.quote(str(self._run.run_dir))}",
                ) from None
            self._run.log(f"  feature cache: not written to disk, because {why}")
        if in_memory is not None:
            return in_memory
        values, warning = disk.get(key, use_mmap=True)
        if values is None:
            what = "features that were just written to disk cannot be read"
            raise TryAgainError(what, where=str(disk.directory), why=warning)
        return values

    def _extract_in_memory(self, split: Split, copy_index: int | None) -> Values:
        """Return the features in memory; those of later phases are stored on the way."""
        features: dict[str, Tensor] = {}
        start = 0
        for block in self._extract_batches(split, copy_index):
            for name, value in zip(self._names, block, strict=True):
                if name not in features:
                    shape = (len(split), *value.shape[1:])
                    features[name] = torch.empty(shape, dtype=value.dtype, device=value.device)
                check_shape(value, features[name][start : start + len(block[0])].shape)
                features[name][start : start + len(value)] = value
            start += len(block[0])
        for each in self._later_phases:
            key = self._key(split, copy_index, each.model_key)
            if key is not None:
                crossing = each.split_model.cut.crossing
                self._run.engine_state.later_features[key] = tuple(features[name] for name in crossing)
        return tuple(features[name] for name in self._cache.split_model.cut.crossing)

    def _extract_batches(self, split: Split, copy_index: int | None) -> Iterator[Values]:
        ranks, starts = self._run.process_group, range(0, len(split), self.batch_size)
        reused = {start: self._checked.get((id(split), copy_index, start)) for start in starts}
        local_starts = starts[ranks.rank :: ranks.world_size]
        indices = (self.rows(split, start) for start in local_starts if reused[start] is None or ranks.world_size > 1)
        key = FIXED_DRAW if copy_index is None else epoch_key(self._run.config.seed, copy_index)
        local = fetch_batches(split, indices, workers=get_workers(self._run), key=key)
        for first in range(0, len(starts), ranks.world_size):
            self._save_if_due()
            group = [self.rows(split, start) for start in starts[first : first + ranks.world_size]]
            if ranks.world_size == 1:
                values = reused[starts[first]]
                yield self._compute_features(split, *next(local), copy_index) if values is None else values
            else:
                yield from self._extract_distributed(split, group, local, copy_index)
            self._cache.num_computed_batches += len(group)

    def _extract_distributed(
        self,
        split: Split,
        group: list[Tensor],
        local: Iterator[tuple[Tensor, TensorTree]],
        copy_index: int | None,
    ) -> Iterator[Values]:
        """Yield one batch per rank, each computed by one rank and sent to all."""
        ranks = self._run.process_group
        batch = next(local, None)  # the last group may have no batch for this rank, which then computes the first
        indices, stored = batch or (group[0], split.fetch(group[0]))  # these values are dropped
        sizes = [
            len(indices) if rank < len(group) else 0
            for rank, indices in enumerate([*group, *group[:1] * ranks.world_size])
        ]
        values = self._compute_features(split, indices, stored, copy_index)
        gathered = [ranks.all_gather(value, sizes[: ranks.world_size]) for value in values]
        yield from zip(*(torch.split(value, [len(indices) for indices in group]) for value in gathered), strict=True)

    def _compute_features(self, split: Split, indices: Tensor, samples: TensorTree, copy_index: int | None) -> Values:
        return self.compute(self.prepare(split, indices, samples, copy_index))

    def _verify_features(self, values: Values, split: Split, copy_index: int | None, key: str) -> None:
        """Compare features with batches that are computed now: a key does not cover changed code, for example.

        Raises:
            HaltError: The bits differ.
        """
        batches = {
            start: each
            for (owner, copy, start), each in self._checked.items()
            if (owner, copy) == (id(split), copy_index)
        }
        if not batches:
            batch = derive_seed(self._run.config.seed, key) % math.ceil(len(split) / self.batch_size)
            indices = self.rows(split, batch * self.batch_size)
            draw = FIXED_DRAW if copy_index is None else epoch_key(self._run.config.seed, copy_index)
            samples = split.fetch(indices, draw)
            batches = {int(indices[0]): self._compute_features(split, indices, samples, copy_index)}
        pairs = [
            (each[start : start + len(again)], again)
            for start, computed in batches.items()
            for each, again in zip(values, computed, strict=False)
        ]
        if not all(bitwise_equal(one.cpu(), other.cpu()) for one, other in pairs):
            raise HaltError(
                "cached features are not what the model computes now",
                where="memory" if self._disk is None else str(self._disk.entry_dir(key)),
                why="a batch was computed again, and its bits differ: something has changed that the key of the "
                "cache does not hold, such as the code of the model or of the preprocessing",
                fix="delete them with: tuneforge cache clear; or run with --cache off",
            )

    def _key(self, split: Split, copy_index: int | None, model_key: str) -> str | None:
        """Return a hash of everything that the features depend on; None if the inputs have no fingerprint."""
        inputs = split.inputs_fingerprint()
        if inputs is None:
            return None
        run = self._run
        parts: dict[str, Any] = {"model": model_key, "inputs": inputs}
        parts["preprocess"] = [type(run.data.inputs).__qualname__, get_option_values(run.data.inputs)]
        if copy_index is not None and self._cache.num_augmented_copies:
            augmentations = [[spec.name, spec.options] for spec in run.engine_state.augment_specs]
            parts["view"] = [run.config.seed, copy_index, augmentations]
        return _hash(parts)


def check_shape(value: Tensor, expected: torch.Size) -> None:
    """Check the shape of features of one batch.

    Raises:
        NotCacheableError: It is another one.
    """
    if value.shape != expected:
        raise NotCacheableError(
            f"the shape of its features differs between batches ({tuple(value.shape)}, not {tuple(expected)})"
        )


def _hash_model(run: Run, backbone: Any, size: int) -> str:
    """Return a hash of the backbone, its weights and buffers, and what else the bits of its results depend on."""
    tensors = hashlib.sha256()
    for name, tensor in [
        *backbone.named_parameters(remove_duplicate=False),
        *backbone.named_buffers(remove_duplicate=False),
    ]:
        plain = tensor.detach().cpu().contiguous()
        tensors.update(f"{name} {plain.dtype} {tuple(plain.shape)} {tensor.stride()} ".encode())
        tensors.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    parts = {
        "code": backbone.code,
        "modules": _describe_modules(backbone),
        "tensors": tensors.hexdigest(),
        "batch": size,
        "precision": run.config.precision,
        "channels-last": run.forward_pass.channels_last,
        "numerics": describe_numerics(run.device.torch),
    }
    return _hash(parts)


def _describe_modules(backbone: Any) -> dict[str, Any]:
    """Return the plain attributes of the modules that a graph calls."""
    plain = (bool, int, float, str, tuple, type(None))
    called = [str(node.target) for node in backbone.graph.nodes if node.op == "call_module"]
    return {
        f"{name}:{below}": {"": type(each).__qualname__}
        | {key: str(value) for key, value in vars(each).items() if isinstance(value, plain)}
        for name in called
        for below, each in backbone.get_submodule(name).named_modules()
    }


def _hash(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _choose_batch_size(example: Any) -> int:
    """Return the number of samples per pass, from 16 to 64 by the size of a sample: the fastest in measurements."""
    numbers = sum(tensor[0].numel() for tensor in named_tensors(example).values())
    return max(16, min(64, 1 << (2**21 // max(1, numbers)).bit_length() >> 1))
