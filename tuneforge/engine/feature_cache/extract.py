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

from tuneforge.engine.context.batches import augment, get_workers
from tuneforge.engine.context.forward import Features
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch, Split, TensorTree, named_tensors
from tuneforge.engine.data.loader import fetch_batches
from tuneforge.engine.data.sampler import SampleRNG, derive_seed
from tuneforge.engine.feature_cache.disk import DiskCache, default_cache_dir
from tuneforge.engine.feature_cache.graph_split import NotCacheableError, SplitModel
from tuneforge.engine.model.model import call_module
from tuneforge.engine.model.module_state import bitwise_equal
from tuneforge.errors import HaltError, TryAgainError
from tuneforge.plugin.declaration import get_option_values

Values = tuple[Tensor, ...]


@attrs.define(eq=False)
class FeatureCache:
    """A model in two parts, with what the first one gave for the training and the validation split.

    Args:
        split_model: The model in two.
        bytes_per_sample: Size of the values of one sample.
        num_augmented_copies: Fixed augmented views of each training sample; 0 where nothing is augmented.
        features: The values of a split's samples, by the split's identity and the view.
        num_computed_batches: Batches that were computed to fill it; 0 where all was found.
        num_hits: How many of its parts were found, in memory or on disk.
    """

    split_model: SplitModel
    bytes_per_sample: int = 0
    num_augmented_copies: int = 0
    features: dict[tuple[int, int], Values] = attrs.field(factory=dict)
    num_computed_batches: int = 0
    num_hits: int = 0

    @property
    def train_tail(self) -> nn.Module:
        """The values to the answer, while the phase trains."""
        return self.split_model.train_tail

    @property
    def eval_tail(self) -> nn.Module:
        """The same in eval mode."""
        return self.split_model.eval_tail

    def get_features(self, split: Split, indices: Tensor, *, epoch: int = 0) -> Features | None:
        """The values of some samples, or None where the split is not kept; `epoch` picks the view."""
        kept = self.features.get((id(split), epoch % self.num_augmented_copies if self.num_augmented_copies else 0))
        return None if kept is None else Features(tuple(each.index_select(0, indices.to(each.device)) for each in kept))


def num_megabytes(run: Run, cache: FeatureCache) -> float:
    """Size of all that a prefix keeps."""
    return (
        cache.bytes_per_sample * (len(run.data.train) * max(1, cache.num_augmented_copies) + len(run.data.val)) / 2**20
    )


@attrs.frozen(eq=False)
class _LaterPhase:
    """The prefix of a later phase, and its part of the key."""

    split_model: SplitModel
    model_key: str


class FeatureExtractor:
    """Finds or computes the values of a split, in one fixed geometry."""

    def __init__(self, run: Run, cache: FeatureCache, save_if_due: Callable[[], None], *, use_disk: bool) -> None:
        self._run, self._cache, self._save_if_due = run, cache, save_if_due
        self._batch_size = _choose_batch_size(run.example)
        self._use_mmap = num_megabytes(run, cache) > run.config.cache_mb
        self._disk: DiskCache | None = None
        if run.config.cache == "auto" and use_disk and num_megabytes(run, cache) <= run.config.cache_disk_mb:
            self._disk = DiskCache(run.config.cache_dir or default_cache_dir(), run.config.cache_disk_mb)
        self._model_key = _hash_model(run, cache.split_model.backbone, self._batch_size)
        self._later_phases: list[_LaterPhase] = []

    def add_later_phases(self, caches: list[FeatureCache]) -> None:
        """Keep what these need too, from the same pass."""
        if not self._use_mmap:
            self._later_phases = [
                _LaterPhase(each.split_model, _hash_model(self._run, each.split_model.backbone, self._batch_size))
                for each in caches
            ]

    def load_or_extract(self, name: str, split: Split, copy_index: int | None) -> Values:
        """The values of all samples of a split, from the store where they are in it."""
        key = self._key(split, copy_index, self._model_key)
        later_features = self._run.engine_state.later_features
        if key in later_features:
            values = later_features.pop(key)
            self._verify_features(values, split, copy_index, key)
            self._cache.num_hits += 1
            return values
        if self._use_mmap and key is None:
            raise NotCacheableError(
                f"its values need the disk, and the {name} split has no fingerprint to find them by"
            )
        if self._disk is None or key is None:
            return self._extract_in_memory(split, copy_index)
        stored, trouble = self._disk.get(key, use_mmap=self._use_mmap)
        if self._run.process_group.all_reduce_any(stored is None)[0]:  # all of them fill it, or none
            stored = None
        if trouble:
            self._run.log(f"  {trouble}")
        if stored is not None:
            self._verify_features(stored, split, copy_index, key)
            self._cache.num_hits += 1
            return stored if self._use_mmap else tuple(map(self._run.device.move, stored))
        return self._extract_to_disk(self._disk, key, name, split, copy_index)

    def _extract_to_disk(self, disk: DiskCache, key: str, name: str, split: Split, copy_index: int | None) -> Values:
        if not self._run.process_group.is_main:
            return self._extract_in_memory(split, copy_index)
        metadata = {"model": type(self._run.model.module).__name__, "split": name, "samples": len(split)}
        held = None if self._use_mmap else self._extract_in_memory(split, copy_index)
        if held is not None and split.inputs_changed():
            self._run.log("  feature cache: not written to disk, because the data source changed during the run")
            return held
        try:
            disk.put(
                key,
                [held]
                if held is not None
                else self._extract_batches(self._cache.split_model.backbone, split, copy_index),
                metadata,
            )
        except OSError as error:
            why = f"the cache cannot be written ({error.strerror or error})"
            if held is None:  # going on without it would give other bits
                raise TryAgainError(
                    "there is no room for what the frozen part gives",
                    where=str(disk.directory),
                    why=why,
                    fix="begin another run with another --cache-dir or --cache off; or free some space there, then go "
                    f"on with: tuneforge resume {shlex.quote(str(self._run.run_dir))}",
                ) from None
            self._run.log(f"  feature cache: not written to disk, because {why}")
        if held is not None:
            return held
        values, trouble = disk.get(key, use_mmap=True)
        if values is None:
            raise TryAgainError("the cache lost what was just written", where=str(disk.directory), why=trouble)
        return values

    def _extract_in_memory(self, split: Split, copy_index: int | None) -> Values:
        """The values in memory; those of later phases are put aside on the way."""
        cut = self._cache.split_model.cut
        names = list(dict.fromkeys([*cut, *(name for each in self._later_phases for name in each.split_model.cut)]))
        kept: dict[str, Tensor] = {}
        start = 0
        for block in self._extract_batches(self._cache.split_model.trace.extract_backbone(names), split, copy_index):
            for name, value in zip(names, block, strict=True):
                if name not in kept:
                    kept[name] = torch.empty(len(split), *value.shape[1:], dtype=value.dtype, device=value.device)
                kept[name][start : start + len(value)] = value
            start += len(block[0])
        for each in self._later_phases:
            key = self._key(split, copy_index, each.model_key)
            if key is not None:
                self._run.engine_state.later_features[key] = tuple(kept[name] for name in each.split_model.cut)
        return tuple(kept[name] for name in cut)

    def _extract_batches(self, backbone: nn.Module, split: Split, copy_index: int | None) -> Iterator[Values]:
        ranks, starts = self._run.process_group, range(0, len(split), self._batch_size)
        indices = (self._rows(split, start) for start in starts[ranks.rank :: ranks.world_size])
        local = fetch_batches(split, indices, workers=get_workers(self._run))
        for first in range(0, len(starts), ranks.world_size):
            self._save_if_due()
            group = [self._rows(split, start) for start in starts[first : first + ranks.world_size]]
            if ranks.is_single:
                yield self._compute_features(backbone, split, *next(local), copy_index)
            else:
                yield from self._extract_distributed(backbone, split, group, local, copy_index)
            self._cache.num_computed_batches += len(group)

    def _extract_distributed(
        self,
        backbone: nn.Module,
        split: Split,
        group: list[Tensor],
        local: Iterator[tuple[Tensor, TensorTree]],
        copy_index: int | None,
    ) -> Iterator[Values]:
        """One batch a rank, each computed by one of them and given to all."""
        ranks = self._run.process_group
        batch = next(local, None)  # the last group may have no batch for this rank; it computes one to keep in step
        indices, stored = batch or (group[0], split.fetch(group[0]))
        sizes = [
            len(indices) if rank < len(group) else 0
            for rank, indices in enumerate([*group, *group[:1] * ranks.world_size])
        ]
        values = self._compute_features(backbone, split, indices, stored, copy_index)
        whole = [ranks.all_gather(value, sizes[: ranks.world_size]) for value in values]
        yield from zip(*(torch.split(value, [len(indices) for indices in group]) for value in whole), strict=True)

    def _rows(self, split: Split, start: int) -> Tensor:
        """The rows of one batch, whose place and size follow from the split alone."""
        return torch.arange(start, min(start + self._batch_size, len(split)))

    def _compute_features(
        self, backbone: nn.Module, split: Split, indices: Tensor, samples: TensorTree, copy_index: int | None
    ) -> Values:
        run = self._run
        with torch.no_grad(), run.autocast():
            inputs = run.prepare_inputs(samples)
            if copy_index is not None and self._cache.num_augmented_copies:
                rng = SampleRNG(run.config.seed, copy_index, indices)
                batch = Batch(inputs, run.to_device(split.targets[indices]), indices, None, rng)
                inputs = augment(run, batch).inputs
            values: Values = call_module(backbone, inputs)
        return values

    def _verify_features(self, values: Values, split: Split, copy_index: int | None, key: str) -> None:
        """Compute one batch again and compare: a key cannot hold what it does not know of.

        Raises:
            HaltError: The bits differ.
        """
        place = derive_seed(self._run.config.seed, key) % math.ceil(len(split) / self._batch_size)
        indices = self._rows(split, place * self._batch_size)
        again = self._compute_features(
            self._cache.split_model.backbone, split, indices, split.fetch(indices), copy_index
        )
        kept = [each[indices[0] : indices[-1] + 1] for each in values]
        if not all(bitwise_equal(one.cpu(), other.cpu()) for one, other in zip(kept, again, strict=True)):
            raise HaltError(
                "features in the cache are not what the model gives now",
                where="memory" if self._disk is None else str(self._disk.entry_dir(key)),
                why="one batch was computed again, and its bits differ: something has changed that the key of the "
                "cache does not hold, such as the code of the model or of the preprocessing",
                fix="delete them with: tuneforge cache clear; or run with --cache off",
            )

    def _key(self, split: Split, copy_index: int | None, model_key: str) -> str | None:
        """All that the values depend on, in one hash; None where the inputs cannot be told apart."""
        inputs = split.inputs_fingerprint()
        if inputs is None:
            return None
        run = self._run
        parts: dict[str, Any] = {"model": model_key, "inputs": inputs}
        parts["preprocess"] = [type(run.data.inputs).__qualname__, get_option_values(run.data.inputs)]
        if copy_index is not None and self._cache.num_augmented_copies:
            parts["view"] = [run.config.seed, copy_index, [[spec.name, spec.options] for spec in run.config.augment]]
        return _hash(parts)


def _hash_model(run: Run, backbone: Any, size: int) -> str:
    """The prefix itself, its weights and buffers, and what else the bits depend on."""
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
        "device": [str(run.device.torch), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "torch": torch.__version__,
        "kernels": _describe_kernels(run),
    }
    return _hash(parts)


def _describe_kernels(run: Run) -> list[Any]:
    """What chooses the kernels that compute, beside the device's kind."""
    on_cuda = run.device.torch.type == "cuda"
    return [
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.cuda.get_device_name(run.device.torch) if on_cuda else "",
        torch.version.cuda,
    ]


def _describe_modules(backbone: Any) -> dict[str, Any]:
    """What the modules of a graph were built with, as far as plain values show it."""
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
    """Samples of one pass: the fastest from 16 to 64 measured so, by the size of a sample."""
    numbers = sum(tensor[0].numel() for tensor in named_tensors(example).values())
    return max(16, min(64, 1 << (2**21 // max(1, numbers)).bit_length() >> 1))
