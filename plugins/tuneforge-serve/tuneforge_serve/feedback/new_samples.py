"""How old and new samples become one data set, and how weights find their place in a model with more classes.

Shapes: n samples, b in a batch, k classes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from tuneforge import Data, DataError, Model, SampleRNG, Source, Split, TensorTree, load, map_inputs
from tuneforge.exporting import concatenate_inputs, load_tensors
from tuneforge.plugin import find_component, load_component

_INPUTS_PREFIX = "stored/"


@attrs.frozen(eq=False)
class NewSamples:
    """Newly labelled samples, as the inputs contract stores them.

    Args:
        inputs: (n, ...), or a mapping of such tensors.
        labels: The class of each.
        ids: A name of each that stays the same.
        held_out: Whether each is for the gate alone.
        path: The file that they were read from.
    """

    inputs: TensorTree
    labels: tuple[str, ...]
    ids: tuple[str, ...]
    held_out: tuple[bool, ...]
    path: Path

    def select_rows(self, *, held_out: bool, classes: Sequence[str]) -> Tensor:
        """Those of one side whose class is among `classes`, int64."""
        both = zip(self.labels, self.held_out, strict=True)
        return torch.tensor(
            [row for row, (label, side) in enumerate(both) if side == held_out and label in classes], dtype=torch.int64
        )


def read_new_samples(path: Path) -> NewSamples:
    """Read newly labelled samples.

    Raises:
        DataError: The file does not hold them.
    """
    tensors, about = load_tensors(path)
    stored = {
        name.removeprefix(_INPUTS_PREFIX): each for name, each in tensors.items() if name.startswith(_INPUTS_PREFIX)
    }
    columns = [about.get(name) for name in ("labels", "ids", "held_out")]
    if not stored or any(not isinstance(each, list) for each in columns):
        raise DataError(
            f"'{path.name}' holds no labelled samples", where="--data.new", fix="give a file of tuneforge retune"
        )
    labels, ids, held_out = (tuple(each or ()) for each in columns)
    return NewSamples(stored[""] if set(stored) == {""} else stored, labels, ids, held_out, path)


def merge_new_samples(run: Path, new: NewSamples, *, val: float, min_samples_per_class: int, seed: int) -> Data:
    """The old data with the new samples.

    Args:
        run: Whose data are continued.
        new: The new samples.
        val: Share of the new samples for validation.
        min_samples_per_class: Training samples that a new class must have.
        seed: Draws the new samples for validation.

    Raises:
        DataError: The old data have no classes, or no new sample is left to train on.
    """
    old = load(run).with_data().data
    if not isinstance(old.targets, load_component(find_component("targets", "classes"))):
        raise DataError(
            "only data with one class a sample can be continued",
            where="--data.run",
            why=f"the run's targets are {type(old.targets).__name__}",
            fix="join the data yourself and tune on them",
        )
    names, notes = _merge_class_names(old.targets.labels, new, min_samples_per_class)
    codes = torch.tensor([names.index(each) if each in names else -1 for each in new.labels], dtype=torch.int64)
    train, held = _split_train_val(new.select_rows(held_out=False, classes=names), codes, val=val, seed=seed)
    longer = _append_samples(old.train, new, train, codes)
    test = new.select_rows(held_out=True, classes=names)
    size = len(old.train)
    return attrs.evolve(
        old,
        train=longer,
        val=_append_samples(old.val, new, held, codes),
        targets=attrs.evolve(old.targets, names=names),  # type: ignore[misc]  # a component is an attrs class
        extra_test_splits={**old.extra_test_splits, **({"new": _to_split(new, test, codes)} if len(test) else {})},
        sample_groups={"old": torch.arange(size), "new": torch.arange(size, len(longer))},
        notes=(*old.notes, f"new samples: {len(train)} train, {len(held)} val, {len(test)} held out", *notes),
    )


def load_warm_start(model: Model, run: Path) -> Model:
    """The model with the weights of a finished run; rows of classes that the run did not know stay as they are.

    Raises:
        DataError: Another tensor than the head's has no counterpart of its shape.
    """
    before = load(run).model
    own, known = model.module.state_dict(), before.module.state_dict()
    kept = [name for name in model.labels if name in before.labels]
    here = [model.labels.index(name) for name in kept]
    there = [before.labels.index(name) for name in kept]
    with torch.no_grad():
        for name, tensor in own.items():
            source = known.get(name)
            if name.startswith(f"{model.head}.") and source is not None and source.shape[1:] == tensor.shape[1:]:
                tensor[here] = source[there]
            elif source is not None and source.shape == tensor.shape:
                tensor.copy_(source)
            else:
                raise DataError(
                    f"the run has no weights for '{name}' of shape {tuple(tensor.shape)}",
                    where="--warm-start.run",
                    why=f"its '{name}' is {'missing' if source is None else tuple(source.shape)}",
                    fix="build the model as that run did",
                )
    fresh = [name for name in model.labels if name not in kept]
    added = f", and fresh rows for {', '.join(fresh)}" if fresh else ""
    return model.with_change(f"warm start: weights of a run{added}", pretrained_labels=tuple(kept), pretrained=True)


@attrs.frozen(eq=False)
class ConcatSource:
    """Two sources as one, the second after the first."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def fetch(self, indices: Tensor) -> TensorTree:
        """The stored form of `indices` (b,), each from where it lies."""
        size = len(self.first)
        early = indices < size
        found = [
            source.fetch(own)
            for source, own in ((self.first, indices[early]), (self.second, indices[~early] - size))
            if len(own)
        ]
        places = torch.cat([early.nonzero().flatten(), (~early).nonzero().flatten()]).argsort()
        return map_inputs(concatenate_inputs(found), lambda tensor: tensor.index_select(0, places))

    def fingerprint(self) -> str | None:
        """SHA-256 over both; None where one cannot say."""
        asked = [getattr(source, "fingerprint", lambda: None)() for source in (self.first, self.second)]
        return None if None in asked else hashlib.sha256(" ".join(map(str, asked)).encode()).hexdigest()


def _merge_class_names(old: tuple[str, ...], new: NewSamples, fewest: int) -> tuple[tuple[str, ...], list[str]]:
    """The old names, then those of new classes with enough samples to learn from; and a sentence on the others."""
    counts = Counter(label for label, side in zip(new.labels, new.held_out, strict=True) if not side)
    grown = sorted(name for name, count in counts.items() if name not in old and count >= fewest)
    unknown = sorted(set(new.labels) - set(old) - set(grown))
    left = [f"left out, fewer than {fewest} training samples: {', '.join(unknown)}"] if unknown else []
    return (*old, *grown), ([f"new classes: {', '.join(grown)}"] if grown else []) + left


def _split_train_val(rows: Tensor, codes: Tensor, *, val: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split rows into training and validation, each class in the same proportion; a single row is for training."""
    groups = [rows[codes[rows] == code] for code in sorted(set(codes[rows].tolist()))]
    if not groups:
        raise DataError(
            "there is no new sample to train on",
            where="--data.new",
            fix="label some requests (POST /feedback, /review)",
        )
    parts = []
    for group in groups:
        shuffled = group[SampleRNG(seed, 0, group).uniform("split").argsort(stable=True)]
        num_val = min(max(round(val * len(group)), 1), len(group) - 1) if val > 0 else 0
        parts.append(torch.split(shuffled, [len(group) - num_val, num_val]))
    train, held_out = (torch.cat(part).sort().values for part in zip(*parts, strict=True))
    return train, held_out


def _append_samples(old: Split, new: NewSamples, rows: Tensor, codes: Tensor) -> Split:
    """A split with the new samples of `rows` behind its own."""
    added = _to_split(new, rows, codes) if len(rows) else None
    if added is None:
        return old
    ids = [*(old.id_of(row) for row in range(len(old))), *(added.id_of(row) for row in range(len(added)))]
    targets = torch.cat([old.targets, added.targets])
    if not old.in_memory:
        return Split(ConcatSource(old.source, added.source), targets, ids=ids)
    parts = [split.fetch(torch.arange(len(split))) for split in (old, added)]
    return Split(concatenate_inputs(parts), targets, ids=ids)


def _to_split(new: NewSamples, rows: Tensor, codes: Tensor) -> Split:
    stored = map_inputs(new.inputs, lambda tensor: tensor.index_select(0, rows))
    return Split(stored, codes[rows], ids=[f"new/{new.ids[row]}" for row in rows.tolist()])
