"""Splits of data, and the two contracts that keep images and classes out of everything else.

Shapes: n samples in a split, b in a batch, k outputs of the model, f features.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.sampler import SampleRNG
from tuneforge.errors import DataError

TensorTree = Tensor | Mapping[str, Tensor]
"""A batch of inputs: one tensor, or a mapping of tensors; the first axis is the sample."""


def map_inputs(inputs: TensorTree, fn: Callable[[Tensor], Tensor]) -> TensorTree:
    """Apply `fn` to the tensor, or to each tensor of the mapping."""
    if isinstance(inputs, Tensor):
        return fn(inputs)
    return {name: fn(tensor) for name, tensor in inputs.items()}


def named_tensors(inputs: TensorTree) -> dict[str, Tensor]:
    """The tensors by name; a single one has the name `""`."""
    return {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)


@runtime_checkable
class Source(Protocol):
    """Samples that are not held in memory: decoded when asked for.

    A source may have `fingerprint() -> str | None` too: what stays the same as long as `fetch` gives the same, such as
    a SHA-256 over the files' paths, sizes and times; None where it cannot say. With it, features of the samples are
    shared between runs.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def fetch(self, indices: Tensor) -> TensorTree:
        """The stored form of the samples at `indices`, int64 (b,), on the CPU."""


@attrs.frozen(eq=False)
class Batch:
    """What a step is given.

    Args:
        inputs: What the model takes, on the run's device; in a frozen phase the engine may put features here.
        targets: What the loss takes, on the run's device.
        indices: Rows of the split, int64 (b,), on the CPU.
        weights: Factor on each sample's loss (b,), mean 1 over the split; None where all are 1.
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
        targets: One row a sample, (n, ...).
        ids: A stable name a sample, such as a path; row numbers by default.

    Raises:
        DataError: Numbers of inputs, targets and ids differ, or there are none.
    """

    def __init__(self, inputs: TensorTree | Source, targets: Tensor, *, ids: Sequence[str] | None = None) -> None:
        self.targets = targets
        self.source: Source = inputs if isinstance(inputs, Source) else InMemorySource(inputs)
        self.ids = ids
        self._inputs_digest: str | None = None
        if not len(targets):
            raise DataError("a split is empty", fix="give each of train, val and test at least one sample")
        counts = {len(self.source), len(targets), *([len(ids)] if ids is not None else [])}
        if len(counts) != 1:
            raise DataError(
                f"inputs, targets and ids differ in number: {sorted(counts)}", fix="give one of each a sample"
            )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def in_memory(self) -> bool:
        """True where fetching costs no decoding."""
        return isinstance(self.source, InMemorySource)

    def id_of(self, row: int) -> str:
        """The sample's stable name."""
        return self.ids[row] if self.ids is not None else str(row)

    def fetch(self, indices: Tensor) -> TensorTree:
        """Stored inputs of `indices`, int64 (b,)."""
        return self.source.fetch(indices)

    def subset(self, indices: Tensor) -> Split:
        """The split of `indices` only, in that order."""
        ids = [self.id_of(int(row)) for row in indices]
        taken = self.fetch(indices) if self.in_memory else Subset(self.source, indices)
        return Split(taken, self.targets[indices], ids=ids)

    def fingerprint(self) -> str:
        """SHA-256 over ids, targets and what is known of the inputs."""
        digest = hashlib.sha256(str(self.inputs_fingerprint()).encode())
        _hash(digest, self.targets)
        for row in range(len(self)):
            digest.update(self.id_of(row).encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()

    def inputs_fingerprint(self) -> str | None:
        """SHA-256 that changes when the stored inputs do, computed once; None where the source cannot say."""
        if self._inputs_digest is None:
            self._inputs_digest = _source_fingerprint(self.source)
        return self._inputs_digest

    def inputs_changed(self) -> bool:
        """True where a source that decodes no longer gives what it gave when its fingerprint was taken."""
        return not self.in_memory and _source_fingerprint(self.source) != self._inputs_digest


@attrs.frozen(eq=False)
class InMemorySource:
    """A source that is in memory already."""

    inputs: TensorTree

    def __len__(self) -> int:
        return len(next(iter(named_tensors(self.inputs).values())))

    def fetch(self, indices: Tensor) -> TensorTree:
        """Gather `indices` (b,)."""
        return map_inputs(self.inputs, lambda tensor: tensor.index_select(0, indices))

    def fingerprint(self) -> str:
        """SHA-256 over the names, types, shapes and bytes of all inputs."""
        digest = hashlib.sha256()
        for name, tensor in sorted(named_tensors(self.inputs).items()):
            digest.update(name.encode() + b"\0")
            _hash(digest, tensor)
        return digest.hexdigest()


@attrs.frozen(eq=False)
class Subset:
    """Some rows of another source."""

    source: Source
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Tensor) -> TensorTree:
        """Gather `indices` (b,) of those taken."""
        return self.source.fetch(self.indices[indices])

    def fingerprint(self) -> str | None:
        """SHA-256 over the other source's and the rows; None where the other cannot say."""
        whole = _source_fingerprint(self.source)
        if whole is None:
            return None
        digest = hashlib.sha256(whole.encode())
        _hash(digest, self.indices)
        return digest.hexdigest()


def _source_fingerprint(source: Source) -> str | None:
    ask: Callable[[], str | None] = getattr(source, "fingerprint", lambda: None)
    return ask()


def _hash(digest: Any, tensor: Tensor) -> None:
    """Add type, shape and content of a tensor to a digest."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class Inputs(ABC):
    """How raw things become tensors: the first contract of `Data`. A part of group `tuneforge.inputs`.

    Its options are all it holds, so that a run folder alone can decode what production sends.
    """

    tabular = False
    """True where a raw thing is a row of named values, so that a CSV is a list of them."""

    @abstractmethod
    def decode(self, raw: Any) -> TensorTree:
        """The stored form of one raw thing: bytes of a file, a path, or a row of JSON values; no sample axis.

        Raises:
            DataError: It is broken, too large, or not of this kind.
        """

    @abstractmethod
    def preprocess(self, samples: TensorTree) -> Any:
        """What the model takes, from stored inputs of a batch, on whatever device they are on. Deterministic."""

    def render_image(self, sample: TensorTree) -> bytes | None:
        """A PNG that shows one stored sample to a person, or None where it is no picture."""
        del sample
        return None

    def render_text(self, sample: TensorTree) -> str:
        """One line that shows a stored sample to a person."""
        return ", ".join(f"{name} {tensor.tolist()}".strip() for name, tensor in named_tensors(sample).items())[:200]


class Targets(ABC):
    """How answers are read: the second contract of `Data`. A part of group `tuneforge.targets`."""

    loss: str
    """Name of the step that fits these targets."""
    metrics: tuple[str, ...]
    """Names of the metrics that fit these targets."""
    monitor: str
    """The validation figure that decides which epoch is best."""
    monitor_mode: str
    """`"max"` where more of `monitor` is better, else `"min"`."""
    primary_metrics: tuple[str, ...]
    """Figures worth a column on the terminal, most important first."""

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Number of outputs a model needs, k."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs; empty where they have none."""
        return ()

    @abstractmethod
    def encode(self, raw: Any) -> Any:
        """The target of one raw answer, such as a class name.

        Raises:
            DataError: It is no answer of this kind.
        """

    @abstractmethod
    def describe(self, output: Tensor) -> dict[str, Any]:
        """One output (k,) as plain JSON data for a person: class and probability, or a number and its unit."""

    @abstractmethod
    def describe_label(self, target: Tensor) -> str:
        """One target, as text."""

    @abstractmethod
    def per_sample_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How wrong each answer is (b,): 0 where it is right, more the worse. Outputs are (b, k)."""

    def group_by_class(self, targets: Tensor) -> dict[str, Tensor]:
        """Rows by class name, for weights and sampling; empty where targets have no classes."""
        del targets
        return {}

    def fit_head(self, features: Tensor, targets: Tensor, *, l2: float) -> tuple[Tensor, Tensor]:
        """The best linear head on features (n, f): weight (k, f) and bias (k,).

        Raises:
            DataError: These targets have no closed recipe.
        """
        del features, targets, l2
        raise DataError(f"{type(self).__name__} cannot solve a head", fix="use a strategy without HeadFit")


@attrs.frozen(eq=False)
class Data:
    """What `data_prepare` gives.

    Args:
        train: What is learnt from.
        val: What decides: early stop, best weights, a strategy's next step.
        test: Looked at once, at the end.
        inputs: How raw things become tensors.
        targets: How answers are read.
        extra_test_splits: Further test splits, each with its own row in the report.
        notes: Sentences about the data that the run prints and stores.
        sample_groups: Named parts of the training split, the rows of each, int64 (m,): what
            `Phase(mixture_weights=...)` draws from.

    Raises:
        DataError: A part of the training split is empty, or names rows that it does not have.
    """

    train: Split
    val: Split
    test: Split
    inputs: Inputs
    targets: Targets
    extra_test_splits: Mapping[str, Split] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()
    sample_groups: Mapping[str, Tensor] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        for name, rows in self.sample_groups.items():
            if not name or not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1:
                raise DataError(
                    f"the part '{name}' of the training split is no list of rows with a name",
                    where="Data.sample_groups",
                    why="it must be an int64 tensor (m,)",
                    fix="of a mask take mask.nonzero().flatten()",
                )
            if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= len(self.train):
                raise DataError(
                    f"the part '{name}' of the training split has no rows, or rows that do not exist",
                    where="Data.sample_groups",
                    why=f"{len(rows)} rows are named, and the split has {len(self.train)}",
                    fix="name rows from 0 to the number of training samples less one",
                )

    def splits(self) -> dict[str, Split]:
        """All splits by name, the tests last."""
        return {"train": self.train, "val": self.val, "test": self.test, **self.extra_test_splits}

    def example(self) -> Any:
        """Ready inputs of two training samples (the first one twice, where there is one)."""
        return self.inputs.preprocess(self.train.fetch(torch.tensor([0, min(1, len(self.train) - 1)])))
