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

from tuneforge.engine.context.batches import augment, get_workers
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch, Split, TensorTree, named_tensors
from tuneforge.engine.data.loader import fetch_batches
from tuneforge.engine.data.sample_seeds import FIXED_DRAW, epoch_key
from tuneforge.engine.data.sampler import SampleRNG, derive_seed
from tuneforge.engine.feature_cache.cache import FeatureCache, Values, num_megabytes
from tuneforge.engine.feature_cache.disk import DiskCache, default_cache_dir
from tuneforge.engine.feature_cache.graph_split import NotCacheableError, SplitModel
from tuneforge.engine.model.model import call_module
from tuneforge.engine.model.module_state import bitwise_equal
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
        self._batch_size = _choose_batch_size(run.example)
        self._use_mmap = num_megabytes(run, cache) > run.config.cache_mb
        self._disk: DiskCache | None = None
        if run.config.cache == "auto" and use_disk and num_megabytes(run, cache) <= run.config.cache_disk_mb:
            self._disk = DiskCache(run.config.cache_dir or default_cache_dir(), run.config.cache_disk_mb)
        self._model_key = _hash_model(run, cache.split_model.backbone, self._batch_size)
        self._later_phases: list[_LaterPhase] = []

    def add_later_phases(self, caches: list[FeatureCache]) -> None:
        """Extract the features of these caches in the same pass."""
        if not self._use_mmap:
            self._later_phases = [
                _LaterPhase(each.split_model, _hash_model(self._run, each.split_model.backbone, self._batch_size))
                for each in caches
            ]

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
                [in_memory]
                if in_memory is not None
                else self._extract_batches(self._cache.split_model.backbone, split, copy_index),
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
        cut = self._cache.split_model.cut
        names = list(dict.fromkeys([*cut, *(name for each in self._later_phases for name in each.split_model.cut)]))
        features: dict[str, Tensor] = {}
        start = 0
        for block in self._extract_batches(self._cache.split_model.trace.extract_backbone(names), split, copy_index):
            for name, value in zip(names, block, strict=True):
                if name not in features:
                    shape = (len(split), *value.shape[1:])
                    features[name] = torch.empty(shape, dtype=value.dtype, device=value.device)
                features[name][start : start + len(value)] = value
            start += len(block[0])
        for each in self._later_phases:
            key = self._key(split, copy_index, each.model_key)
            if key is not None:
                self._run.engine_state.later_features[key] = tuple(features[name] for name in each.split_model.cut)
        return tuple(features[name] for name in cut)

    def _extract_batches(self, backbone: nn.Module, split: Split, copy_index: int | None) -> Iterator[Values]:
        ranks, starts = self._run.process_group, range(0, len(split), self._batch_size)
        indices = (self._rows(split, start) for start in starts[ranks.rank :: ranks.world_size])
        key = FIXED_DRAW if copy_index is None else epoch_key(self._run.config.seed, copy_index)
        local = fetch_batches(split, indices, workers=get_workers(self._run), key=key)
        for first in range(0, len(starts), ranks.world_size):
            self._save_if_due()
            group = [self._rows(split, start) for start in starts[first : first + ranks.world_size]]
            if ranks.world_size == 1:
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
        """Yield one batch per rank, each computed by one rank and sent to all."""
        ranks = self._run.process_group
        batch = next(local, None)  # the last group may have no batch for this rank, which then computes the first
        indices, stored = batch or (group[0], split.fetch(group[0]))  # these values are dropped
        sizes = [
            len(indices) if rank < len(group) else 0
            for rank, indices in enumerate([*group, *group[:1] * ranks.world_size])
        ]
        values = self._compute_features(backbone, split, indices, stored, copy_index)
        gathered = [ranks.all_gather(value, sizes[: ranks.world_size]) for value in values]
        yield from zip(*(torch.split(value, [len(indices) for indices in group]) for value in gathered), strict=True)

    def _rows(self, split: Split, start: int) -> Tensor:
        """Return the rows of one batch, whose position and size follow from the split alone."""
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
        """Compute one batch again and compare it: a key cannot cover what it does not know of, such as changed code.

        Raises:
            HaltError: The bits differ.
        """
        batch = derive_seed(self._run.config.seed, key) % math.ceil(len(split) / self._batch_size)
        indices = self._rows(split, batch * self._batch_size)
        again = self._compute_features(
            self._cache.split_model.backbone, split, indices, split.fetch(indices), copy_index
        )
        cached = [each[indices[0] : indices[-1] + 1] for each in values]
        if not all(bitwise_equal(one.cpu(), other.cpu()) for one, other in zip(cached, again, strict=True)):
            raise HaltError(
                "cached features are not what the model computes now",
                where="memory" if self._disk is None else str(self._disk.entry_dir(key)),
                why="one batch was computed again, and its bits differ: something has changed that the key of the "
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
            parts["view"] = [run.config.seed, copy_index, [[spec.name, spec.options] for spec in run.config.augment]]
        return _hash(parts)


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
        "device": [str(run.device.torch), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "torch": torch.__version__,
        "kernels": _describe_kernels(run),
    }
    return _hash(parts)


def _describe_kernels(run: Run) -> list[Any]:
    """Return what the choice of kernels depends on, beside the type of the device."""
    on_cuda = run.device.torch.type == "cuda"
    return [
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.cuda.get_device_name(run.device.torch) if on_cuda else "",
        torch.version.cuda,
    ]


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
