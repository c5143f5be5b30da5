"""Merge old and new samples into one data set, and load the weights of a run into a model with more classes.

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
    """Newly labeled samples in stored form.

    Args:
        inputs: The stored inputs (n, ...), or a mapping of such tensors.
        labels: The label of each sample.
        ids: A stable name of each sample.
        held_out: Whether each sample is held out for the gate.
        path: The file of the samples.
    """

    inputs: TensorTree
    labels: tuple[str, ...]
    ids: tuple[str, ...]
    held_out: tuple[bool, ...]
    path: Path

    def select_rows(self, *, held_out: bool, classes: Sequence[str]) -> Tensor:
        """Return the rows of the held-out or the other samples with a label in `classes`, int64."""
        both = zip(self.labels, self.held_out, strict=True)
        return torch.tensor(
            [row for row, (label, side) in enumerate(both) if side == held_out and label in classes], dtype=torch.int64
        )


def read_new_samples(path: Path) -> NewSamples:
    """Read newly labeled samples.

    Raises:
        DataError: The file contains none.
    """
    tensors, about = load_tensors(path)
    stored = {
        name.removeprefix(_INPUTS_PREFIX): each for name, each in tensors.items() if name.startswith(_INPUTS_PREFIX)
    }
    columns = [about.get(name) for name in ("labels", "ids", "held_out")]
    if not stored or any(not isinstance(each, list) for each in columns):
        raise DataError(
            f"'{path.name}' contains no labeled samples", where="--data.new", fix="pass a file of tuneforge retrain"
        )
    labels, ids, held_out = (tuple(each or ()) for each in columns)
    return NewSamples(stored[""] if set(stored) == {""} else stored, labels, ids, held_out, path)


def merge_new_samples(run: Path, new: NewSamples, *, val: float, min_samples_per_class: int, seed: int) -> Data:
    """Return the data of a run with the new samples.

    Args:
        run: The run.
        new: The new samples.
        val: The fraction of the new samples for validation.
        min_samples_per_class: The minimum number of training samples of a new class.
        seed: The seed of the split into training and validation.

    Raises:
        DataError: The data of the run have no classes, or there is no new sample to train on.
    """
    old = load(run).with_data().data
    if not isinstance(old.targets, load_component(find_component("targets", "classes"))):
        raise DataError(
            "new samples can only be added to data with one class per sample",
            where="--data.run",
            why=f"the run's targets are {type(old.targets).__name__}",
            fix="merge the data yourself and train on them",
        )
    names, notes = _merge_class_names(old.targets.labels, new, min_samples_per_class)
    codes = torch.tensor([names.index(each) if each in names else -1 for each in new.labels], dtype=torch.int64)
    train, val_rows = _split_train_val(new.select_rows(held_out=False, classes=names), codes, val=val, seed=seed)
    merged = _append_samples(old.train, new, train, codes)
    test = new.select_rows(held_out=True, classes=names)
    size = len(old.train)
    return attrs.evolve(
        old,
        train=merged,
        val=_append_samples(old.val, new, val_rows, codes),
        targets=attrs.evolve(old.targets, names=names),  # type: ignore[misc]  # a component is an attrs class
        extra_test_splits={**old.extra_test_splits, **({"new": _to_split(new, test, codes)} if len(test) else {})},
        sample_groups={"old": torch.arange(size), "new": torch.arange(size, len(merged))},
        notes=(*old.notes, f"new samples: {len(train)} train, {len(val_rows)} val, {len(test)} held out", *notes),
    )


def load_warm_start(model: Model, run: Path) -> Model:
    """Load the weights of a finished run into a model; the head's rows of new classes stay randomly initialized.

    Raises:
        DataError: A tensor outside the head has no counterpart of its shape in the run.
    """
    trained = load(run).model
    state, trained_state = model.module.state_dict(), trained.module.state_dict()
    shared = [name for name in model.labels if name in trained.labels]
    rows = [model.labels.index(name) for name in shared]
    trained_rows = [trained.labels.index(name) for name in shared]
    with torch.no_grad():
        for name, tensor in state.items():
            source = trained_state.get(name)
            if name.startswith(f"{model.head}.") and source is not None and source.shape[1:] == tensor.shape[1:]:
                tensor[rows] = source[trained_rows]
            elif source is not None and source.shape == tensor.shape:
                tensor.copy_(source)
            else:
                raise DataError(
                    f"the run has no weights for '{name}' of shape {tuple(tensor.shape)}",
                    where="--warm-start.run",
                    why=f"its '{name}' is {'missing' if source is None else tuple(source.shape)}",
                    fix="build the model as in that run",
                )
    added = [name for name in model.labels if name not in shared]
    note = f", randomly initialized head for {', '.join(added)}" if added else ""
    return model.with_change(f"warm start: weights of a run{note}", pretrained_labels=tuple(shared), pretrained=True)


@attrs.frozen(eq=False)
class ConcatSource:
    """Two sources as one; the samples of the second follow those of the first."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def fetch(self, indices: Tensor) -> TensorTree:
        """Return the stored inputs of `indices` (b,)."""
        size = len(self.first)
        in_first = indices < size
        parts = [
            source.fetch(own)
            for source, own in ((self.first, indices[in_first]), (self.second, indices[~in_first] - size))
            if len(own)
        ]
        order = torch.cat([in_first.nonzero().flatten(), (~in_first).nonzero().flatten()]).argsort()
        return map_inputs(concatenate_inputs(parts), lambda tensor: tensor.index_select(0, order))

    def fingerprint(self) -> str | None:
        """Return a SHA-256 over both fingerprints; None if one source cannot tell."""
        fingerprints = [getattr(source, "fingerprint", lambda: None)() for source in (self.first, self.second)]
        return None if None in fingerprints else hashlib.sha256(" ".join(map(str, fingerprints)).encode()).hexdigest()


def _merge_class_names(old: tuple[str, ...], new: NewSamples, min_samples: int) -> tuple[tuple[str, ...], list[str]]:
    """Return the old class names followed by new classes with enough training samples, and notes for the user."""
    counts = Counter(label for label, side in zip(new.labels, new.held_out, strict=True) if not side)
    added = sorted(name for name, count in counts.items() if name not in old and count >= min_samples)
    unknown = sorted(set(new.labels) - set(old) - set(added))
    skipped = [f"skipped, fewer than {min_samples} training samples: {', '.join(unknown)}"] if unknown else []
    return (*old, *added), ([f"new classes: {', '.join(added)}"] if added else []) + skipped


def _split_train_val(rows: Tensor, codes: Tensor, *, val: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split rows into training and validation, stratified by class; the only row of a class is for training."""
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
    """Return a split followed by the new samples of `rows`."""
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
