"""Datasets: splits of samples, and the two contracts `Inputs` and `Targets` that tell the engine how to read them.

The engine knows neither images nor classes; only implementations of the contracts do.

Shapes: n samples in a split, b in a batch, k outputs of the model, f features.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.sample_seeds import FIXED_DRAW, SeededFetcher, fetch_seeded, is_batch_dependent
from tuneforge.engine.data.sampler import SampleRNG
from tuneforge.engine.data.tensor_tree import TensorTree as TensorTree
from tuneforge.engine.data.tensor_tree import concatenate_inputs as concatenate_inputs
from tuneforge.engine.data.tensor_tree import map_inputs as map_inputs
from tuneforge.engine.data.tensor_tree import named_tensors as named_tensors
from tuneforge.engine.data.tensor_tree import stack_inputs as stack_inputs
from tuneforge.errors import DataError
from tuneforge.plugin.steps import ComponentSpec


@runtime_checkable
class Source(Protocol):
    """Samples that are decoded when they are fetched, rather than held in memory.

    A source may also have a method `fingerprint() -> str | None`. It returns a string that changes whenever `fetch`
    would return something else, such as a SHA-256 over the paths, sizes and times of files, or None if it cannot tell.
    With it, cached features of the samples are shared between runs.

    A source without that method may draw random numbers: the generators of Python, numpy and torch are seeded for each
    sample and epoch. It may have a method `fetch_seeded(indices, seed_sample)`, which calls `seed_sample(position)`
    before it reads the sample at a position of `indices`; otherwise its samples are fetched one by one.
    """

    def __len__(self) -> int:
        """Return the number of samples."""

    def fetch(self, indices: Tensor) -> TensorTree:
        """Return the stored form of the samples at `indices`, int64 (b,), on the CPU."""


class TrainSampler(Protocol):
    """The order of training samples that data brings along, such as that of a sampler of torch: `Data.train_sampler`.

    Its attribute `seed`, 0 if it has none, is added to the seed of the run.
    """

    @property
    def num_draws(self) -> int:
        """The number of draws of each epoch."""

    @property
    def each_once(self) -> bool:
        """True if an epoch has each training sample once."""

    def draw(self, epoch: int) -> Tensor:
        """Return the training rows of an epoch in order, int64 (num_draws,).

        The generators of Python, numpy and torch, and those that it holds, are seeded for the epoch before.
        """


@attrs.frozen(eq=False)
class Batch:
    """What a training or evaluation step is given.

    Args:
        inputs: What the model takes, on the run's device; where the backbone is cached, its `Features`.
        targets: What the loss takes, on the run's device.
        indices: Rows of the split, int64 (b,), on the CPU.
        weights: Factor of each sample's loss (b,), with mean 1 over the split; None if all are 1.
        rng: Each sample's random numbers in this epoch.
    """

    inputs: Any
    targets: Any
    indices: Tensor
    weights: Tensor | None
    rng: SampleRNG


class Split:
    """Samples with their targets.

    Args:
        inputs: Stored form of all samples: a tensor (n, ...), a mapping of them, or a `Source` that decodes on demand.
        targets: One row per sample, (n, ...).
        ids: A stable name for each sample, such as a path; row numbers by default.

    Raises:
        DataError: The numbers of inputs, targets and ids differ.
    """

    def __init__(self, inputs: TensorTree | Source, targets: Tensor, *, ids: Sequence[str] | None = None) -> None:
        self.targets = targets
        self.source: Source = inputs if isinstance(inputs, Source) else InMemorySource(inputs)
        self._fetcher = SeededFetcher(self.source)
        self.ids = ids
        self._inputs_digest: str | None = None
        counts = {len(self.source), len(targets), *([len(ids)] if ids is not None else [])}
        if len(counts) != 1:
            raise DataError(
                f"inputs, targets and ids differ in number: {sorted(counts)}", fix="give one of each per sample"
            )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def batch_dependent(self) -> bool:
        """True if a stored sample may depend on the others that are fetched with it, such as one that is padded."""
        return is_batch_dependent(self.source)

    @property
    def in_memory(self) -> bool:
        """True if fetching samples decodes nothing."""
        return isinstance(self.source, InMemorySource)

    def id_of(self, row: int) -> str:
        """Return the stable name of the sample at `row`."""
        return self.ids[row] if self.ids is not None else str(row)

    def fetch(self, indices: Tensor, key: int = FIXED_DRAW) -> TensorTree:
        """Return the stored inputs at `indices`, int64 (b,).

        Args:
            indices: Rows of the split.
            key: Which draw of random samples to return; see `tuneforge.engine.data.sample_seeds`.
        """
        return self._fetcher.fetch(indices, key)

    def subset(self, indices: Tensor) -> Split:
        """Return the split of these samples only, in the order of `indices`."""
        ids = [self.id_of(int(row)) for row in indices]
        inputs = self.fetch(indices) if self.in_memory else Subset(self.source, indices)
        return Split(inputs, self.targets[indices], ids=ids)

    def fingerprint(self) -> str:
        """Return a SHA-256 over ids, targets and the fingerprint of the inputs."""
        digest = hashlib.sha256(str(self.inputs_fingerprint()).encode())
        _hash(digest, self.targets)
        for row in range(len(self)):
            digest.update(self.id_of(row).encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()

    def file_paths(self) -> list[Path] | None:
        """Return the file of each sample; None if the samples are not read from one file each."""
        paths = getattr(self.source, "paths", None)
        return None if paths is None else [Path(each) for each in paths]

    def inputs_fingerprint(self) -> str | None:
        """Return the source's fingerprint, computed once; None if the source cannot tell."""
        if self._inputs_digest is None:
            self._inputs_digest = _source_fingerprint(self.source)
        return self._inputs_digest

    def inputs_changed(self) -> bool:
        """Return True if the fingerprint of a source that decodes differs from the one computed first."""
        return not self.in_memory and _source_fingerprint(self.source) != self._inputs_digest


@attrs.frozen(eq=False)
class InMemorySource:
    """A source whose samples are all in memory."""

    inputs: TensorTree

    def __len__(self) -> int:
        return len(next(iter(named_tensors(self.inputs).values())))

    def fetch(self, indices: Tensor) -> TensorTree:
        """Return the samples at `indices` (b,)."""
        return map_inputs(self.inputs, lambda tensor: tensor.index_select(0, indices))

    def fingerprint(self) -> str:
        """Return a SHA-256 over the names, types, shapes and values of all inputs."""
        digest = hashlib.sha256()
        for name, tensor in sorted(named_tensors(self.inputs).items()):
            digest.update(name.encode() + b"\0")
            _hash(digest, tensor)
        return digest.hexdigest()


@attrs.frozen(eq=False)
class Subset:
    """Some samples of another source."""

    source: Source
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Tensor) -> TensorTree:
        """Return the samples at `indices` (b,) of the subset."""
        return self.source.fetch(self.indices[indices])

    def fetch_seeded(self, indices: Tensor, seed_sample: Callable[[int], None]) -> TensorTree:
        """Return the samples at `indices` (b,) of the subset, each read after its seed was set."""
        return fetch_seeded(self.source, self.indices[indices], seed_sample)

    @property
    def underlying(self) -> Source:
        """The source that decides whether samples are random."""
        return self.source

    @property
    def paths(self) -> list[str | Path] | None:
        """The file of each row; None if the other source reads no files."""
        paths = getattr(self.source, "paths", None)
        return None if paths is None else [paths[row] for row in self.indices.tolist()]

    def fingerprint(self) -> str | None:
        """Return a SHA-256 over the other source's fingerprint and the rows; None if the other source cannot tell."""
        source_fingerprint = _source_fingerprint(self.source)
        if source_fingerprint is None:
            return None
        digest = hashlib.sha256(source_fingerprint.encode())
        _hash(digest, self.indices)
        return digest.hexdigest()


def _source_fingerprint(source: Source) -> str | None:
    fingerprint: Callable[[], str | None] = getattr(source, "fingerprint", lambda: None)
    return fingerprint()


def _hash(digest: Any, tensor: Tensor) -> None:
    """Add the type, shape and values of a tensor to a digest."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class Inputs(ABC):
    """How raw inputs become tensors: the first contract of `Data`. A component of group `tuneforge.inputs`.

    An instance holds nothing but its options, so that a run directory alone can decode the inputs of requests.
    """

    tabular = False
    """True if a raw input is a row of named values, so that a CSV file is a list of them."""

    takes_paths = False
    """True if text is the path of a file, so that the path of a directory stands for the files below it."""

    @abstractmethod
    def decode(self, raw: Any) -> TensorTree:
        """Return the stored form of one raw input, without a batch axis: bytes, a path, or a row of JSON values.

        Raises:
            DataError: It is damaged, too large, or not of this kind.
        """

    def describe_input(self, raw: Any) -> dict[str, Any]:
        """Return what a prediction says about its raw input, such as values unlike the training data; often nothing."""
        del raw
        return {}

    def read_file(self, source: Path | bytes, *, name: str = "") -> Iterator[tuple[str, Any]]:
        """Yield each raw input of a file with its name, a `DataError` in place of one that cannot be read.

        By default a file is one raw input.

        Args:
            source: The file, or its content.
            name: Its name, whose extension may tell its format; by default its path.

        Raises:
            DataError: The file cannot be read at all.
        """
        yield name or str(source), source

    def expand_directories(self, raw_inputs: Iterable[Any]) -> Iterator[Any]:
        """Yield raw inputs with those of the files below in place of each directory, in the order of their names.

        Raises:
            DataError: A file cannot be read.
        """
        for raw in raw_inputs:
            is_path = isinstance(raw, Path) or (self.takes_paths and isinstance(raw, str))
            if not (is_path and Path(raw).is_dir()):
                yield raw
                continue
            for path in sorted(each for each in Path(raw).rglob("*") if each.is_file()):
                for _, found in self.read_file(path):
                    if isinstance(found, DataError):
                        raise found
                    yield found

    @abstractmethod
    def preprocess(self, samples: TensorTree) -> Any:
        """Return what the model takes, from the stored inputs of a batch, on their device; it must be deterministic."""

    def render_image(self, sample: TensorTree) -> bytes | None:
        """Return a PNG that shows one stored sample, or None if it is not an image."""
        del sample
        return None

    def render_text(self, sample: TensorTree) -> str:
        """Return one line of text that shows a stored sample."""
        return ", ".join(f"{name} {tensor.tolist()}".strip() for name, tensor in named_tensors(sample).items())[:200]


def iterate_raw_inputs(raw_inputs: Iterable[Any], *, tabular: bool) -> Iterator[Any]:
    """Yield raw inputs one by one: the rows of a DataFrame of pandas or polars, the elements of any other iterable.

    Args:
        raw_inputs: The raw inputs.
        tabular: Whether a row of a DataFrame is a mapping from column name to cell; else it is an array.
    """
    if not (hasattr(raw_inputs, "columns") and hasattr(raw_inputs, "to_numpy")):
        return iter(raw_inputs)
    if not tabular:
        return iter(raw_inputs.to_numpy())
    return iter(raw_inputs.to_dicts() if hasattr(raw_inputs, "to_dicts") else raw_inputs.to_dict("records"))  # type: ignore[attr-defined]  # of pandas


class Targets(ABC):
    """How outputs and labels are read: the second contract of `Data`. A component of group `tuneforge.targets`."""

    loss: str
    """Name of the default loss for these targets."""
    metrics: tuple[str, ...]
    """Names of the default metrics for these targets."""
    monitor: str
    """The validation metric by which the best epoch is chosen."""
    monitor_mode: str
    """`"max"` if a higher value of `monitor` is better, else `"min"`."""
    primary_metrics: tuple[str, ...]
    """Metrics that are shown on the terminal, the most important one first."""

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Number of outputs that a model needs, k."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs; empty if they have none."""
        return ()

    @abstractmethod
    def encode(self, raw: Any) -> Any:
        """Return the target of one raw label, such as a class name.

        Raises:
            DataError: It is not a label of this kind.
        """

    @abstractmethod
    def describe(self, output: Tensor) -> dict[str, Any]:
        """Return one output (k,) as plain JSON data for people: class and probability, or a number and its unit."""

    @abstractmethod
    def describe_label(self, target: Tensor) -> str:
        """Return one target as text."""

    @abstractmethod
    def per_sample_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return how wrong each prediction is (b,): 0 if it is right, larger the worse it is. Outputs are (b, k)."""

    def group_by_class(self, targets: Tensor) -> dict[str, Tensor]:
        """Return the rows of each class by name, for class weights and sampling; empty if targets have no classes."""
        del targets
        return {}

    def fit_head(self, features: Tensor, targets: Tensor, *, l2: float | None) -> tuple[Tensor, Tensor]:
        """Return the best linear head on features (n, f): weight (k, f) and bias (k,).

        Args:
            features: (n, f).
            targets: (n, ...).
            l2: L2 penalty, relative to the mean loss; None: a good one is chosen.

        Raises:
            DataError: These targets have no solver.
        """
        del features, targets, l2
        raise DataError(f"{type(self).__name__} cannot solve a head", fix="use a strategy without HeadFit")


@attrs.frozen(eq=False)
class Data:
    """What `data_prepare` returns.

    Args:
        train: The training split.
        val: The validation split, by which epochs and strategies are chosen; it may be empty.
        test: The test split, evaluated once at the end; it may be empty.
        inputs: How raw inputs become tensors.
        targets: How outputs and labels are read.
        extra_test_splits: Further test splits, each with its own row in the report.
        notes: Sentences about the data that the run logs and stores.
        sample_groups: Named groups of training samples, the rows of each, int64 (m,): what
            `Phase(mixture_weights=...)` draws from.
        train_sampler: The order of the training samples; None for a new permutation in each epoch.
        augment: The augmentations that suit this data, by name or with options; used unless the user names others.

    Raises:
        DataError: The training split is empty, or a sample group is empty or names rows that it does not have.
    """

    train: Split
    val: Split
    test: Split
    inputs: Inputs
    targets: Targets
    extra_test_splits: Mapping[str, Split] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()
    sample_groups: Mapping[str, Tensor] = attrs.field(factory=dict)
    train_sampler: TrainSampler | None = None
    augment: tuple[str | ComponentSpec, ...] = ()

    def __attrs_post_init__(self) -> None:
        if not len(self.train):
            raise DataError("the training split is empty", fix="give it at least one sample")
        for name, rows in self.sample_groups.items():
            if not name or not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1:
                raise DataError(
                    f"sample group '{name}' is not a named tensor of rows",
                    where="Data.sample_groups",
                    why="it must be an int64 tensor (m,)",
                    fix="convert a mask with mask.nonzero().flatten()",
                )
            if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= len(self.train):
                raise DataError(
                    f"sample group '{name}' is empty, or has rows that the training split does not have",
                    where="Data.sample_groups",
                    why=f"it has {len(rows)} rows, and the training split {len(self.train)} samples",
                    fix="give rows from 0 to the number of training samples minus one",
                )

    def splits(self) -> dict[str, Split]:
        """Return all splits by name, the test splits last."""
        return {"train": self.train, "val": self.val, "test": self.test, **self.extra_test_splits}

    def example(self) -> Any:
        """Return prepared inputs of two training samples, which are the same one if there is only one."""
        return self.inputs.preprocess(self.train.fetch(torch.tensor([0, min(1, len(self.train) - 1)])))
