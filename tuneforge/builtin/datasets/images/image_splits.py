"""From pictures and their classes to the three splits: who goes where, what is held in memory, how it is normalised.

Shapes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import Data, DataError, Split, UsageError
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.datasets.images.image_sources import ImageFileSource, ReplacingImageSource
from tuneforge.builtin.datasets.images.sample_names import select_items
from tuneforge.builtin.name_lists import abbreviate_names
from tuneforge.builtin.targets import ClassTargets

if TYPE_CHECKING:
    from tuneforge.builtin.datasets.images.image_datasets import ImageOptions

IndexArray = NDArray[np.int64]
MeanAndStd = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, one number for all channels or one each."""

SPLITS = ("train", "val", "test")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NUM_MEASURED = 2048  # pictures of training that mean and std are taken from
_CHUNK_SIZE = 64  # pictures that are prepared at once


class ImageSource(Protocol):
    """A source of pictures that can be narrowed to some of them: `PictureFiles` or `PictureArrays`."""

    def __len__(self) -> int:
        """Number of pictures."""

    def fetch(self, indices: Tensor) -> Tensor:
        """Stored pictures of `indices` (b,), uint8 (b, c, h, w)."""

    def select(self, rows: Tensor) -> ImageSource:
        """The source of `rows` only."""


@attrs.frozen(eq=False)
class ImageSplit:
    """Pictures as they were found, of one split or not divided yet.

    Args:
        source: Where they come from.
        class_indices: The class of each, its place among the names, int64 (n,).
        ids: A stable name of each.
    """

    source: ImageSource
    class_indices: IndexArray
    ids: Sequence[str]

    def select(self, rows: IndexArray) -> ImageSplit:
        """The part of `rows` only."""
        return ImageSplit(
            self.source.select(torch.from_numpy(rows)), self.class_indices[rows], select_items(self.ids, rows)
        )


@attrs.frozen(eq=False)
class ImageSplits:
    """All that was found.

    Args:
        class_names: Of the classes, one list for all splits.
        by_split: `train`, and `val` and `test` where they are given.
    """

    class_names: tuple[str, ...]
    by_split: Mapping[str, ImageSplit]

    def with_splits(self, by_split: Mapping[str, ImageSplit]) -> ImageSplits:
        """Other pictures of the same classes."""
        return ImageSplits(self.class_names, by_split)


def make_data(
    options: ImageOptions,
    parts: ImageSplits,
    *,
    seed: int,
    notes: Sequence[str] = (),
    restored_inputs: Any = None,
    files_checked: bool = False,
    replacements_path: Path | None = None,
) -> Data:
    """The data of a run.

    Args:
        options: Shares, bounds and normalisation, as the user gave them.
        parts: What `val` or `test` lacks is taken from `train`.
        seed: The run's.
        notes: Sentences on what was found.
        restored_inputs: The inputs of a tuned model that this data is for; their normalisation beats the options.
        files_checked: Files have been looked at, all of them.
        replacements_path: Where it is written down which picture stands in for one that can no longer be read.

    Raises:
        DataError: Too few classes, too few pictures of one, a class that training lacks, or a broken picture.
    """
    parts = limit_per_class(align_classes(parts), options.limit, seed=seed)
    parts = add_missing_splits(parts, {"val": options.val, "test": options.test}, seed=seed)
    inputs = options.build_inputs()
    held, memory_notes = _check_memory(parts, inputs, options.memory_mb)
    if not held and not files_checked:
        _check_files(parts)
    sources = {
        split: _load_all(part.source) if held else _make_lazy_source(split, part, replacements_path)
        for split, part in parts.by_split.items()
    }
    mean, std = (
        (restored_inputs.mean, restored_inputs.std)
        if isinstance(restored_inputs, ImageInputs)
        else compute_normalization(options, inputs, sources["train"])
    )
    splits = {
        split: Split(sources[split], torch.from_numpy(part.class_indices), ids=part.ids)
        for split, part in parts.by_split.items()
    }
    return Data(
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        inputs=inputs.with_normalization(mean, std),
        targets=ClassTargets(names=parts.class_names),
        notes=(*notes, *_make_missing_notes(parts), *memory_notes),
    )


def align_classes(parts: ImageSplits) -> ImageSplits:
    """The classes of training alone, matched by name for all splits.

    Raises:
        DataError: There are fewer than two, or another split has one that training lacks.
    """
    present = {split: np.unique(part.class_indices) for split, part in parts.by_split.items()}
    known = [parts.class_names[code] for code in present["train"]]
    if len(known) < 2:
        raise DataError(
            f"there is only one class, '{known[0]}'" if known else "there is no picture",
            where="--data",
            why="with fewer than two classes there is nothing to tell apart",
            fix="add pictures of at least one more class",
        )
    for split, codes in present.items():
        strange = [parts.class_names[code] for code in codes if parts.class_names[code] not in known]
        if strange:
            raise DataError(
                f"{split} has a class that train lacks: {abbreviate_names(strange)}",
                why=f"train has {abbreviate_names(known)}",
                fix=f"add it to train, remove it from {split}, or correct its name",
            )
    place = np.full(len(parts.class_names), -1)
    place[present["train"]] = np.arange(len(known))
    return ImageSplits(
        tuple(known),
        {split: attrs.evolve(part, class_indices=place[part.class_indices]) for split, part in parts.by_split.items()},
    )


def limit_per_class(parts: ImageSplits, limit: int | None, *, seed: int) -> ImageSplits:
    """At most `limit` pictures of each class in each part, drawn from the seed."""
    if limit is None:
        return parts
    from sklearn.utils import shuffle

    def rows(part: ImageSplit) -> IndexArray:
        kept = [
            shuffle(np.flatnonzero(part.class_indices == code), random_state=_derive_random_state(seed, "limit", name))[
                :limit
            ]
            for code, name in enumerate(parts.class_names)
        ]
        return np.sort(np.concatenate(kept))

    return parts.with_splits({split: part.select(rows(part)) for split, part in parts.by_split.items()})


def add_missing_splits(parts: ImageSplits, shares: Mapping[str, float], *, seed: int) -> ImageSplits:
    """All three splits: what is missing is taken from training, stratified by class.

    Raises:
        UsageError: The shares of what is missing leave no training.
        DataError: A class has too few pictures to be in every split.
    """
    train = parts.by_split["train"]
    missing = {split: share for split, share in shares.items() if split not in parts.by_split}
    if sum(missing.values()) >= 1:
        asked = " and ".join(f"{split} {share:g}" for split, share in missing.items())
        raise UsageError(
            f"{asked} leave nothing to learn from", why="together they must be less than 1", fix="lower one"
        )
    rows = split_stratified(train.class_indices, parts.class_names, missing, seed=seed) if missing else {}
    taken = {split: train.select(chosen) for split, chosen in rows.items()}
    return parts.with_splits({split: taken.get(split) or parts.by_split[split] for split in SPLITS})


def split_stratified(
    codes: IndexArray, names: Sequence[str], shares: Mapping[str, float], *, seed: int
) -> dict[str, IndexArray]:
    """Rows of `train` and of each split in `shares`, ascending: of each class its share, and at least one.

    A class's division depends on the seed, its name and its own pictures only.

    Args:
        codes: Each sample's place among the names (n,).
        names: Of the classes.
        shares: By split.
        seed: The run's.

    Raises:
        DataError: A class has too few pictures to be in every split.
    """
    from sklearn.model_selection import train_test_split

    out: dict[str, list[IndexArray]] = {split: [] for split in ("train", *shares)}
    for code, name in enumerate(names):
        rest = np.flatnonzero(codes == code)
        for split, count in _count_split_samples(len(rest), shares, name=name).items():
            rest, taken = train_test_split(rest, test_size=count, random_state=_derive_random_state(seed, split, name))
            out[split].append(taken)
        out["train"].append(rest)
    return {split: np.sort(np.concatenate(rows)) for split, rows in out.items()}


def compute_normalization(options: ImageOptions, inputs: ImageInputs, source: Any) -> MeanAndStd:
    """Mean and standard deviation on the scale 0 to 1: as the user says, ImageNet's, or those of training.

    The last are taken over up to 2048 pictures at even distances, and rounded, so that they are the same everywhere.
    """
    if options.mean and options.std:
        return options.mean, options.std
    mean, std = _get_preset_normalization(options.normalize, inputs.channels) or _measure_normalization(inputs, source)
    return options.mean or mean, options.std or std


def free_memory_mb() -> int:
    """Memory that is free now, in MB; where the system does not say, half of what it has."""
    page_mb = os.sysconf("SC_PAGE_SIZE") / 2**20
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return int(os.sysconf("SC_AVPHYS_PAGES") * page_mb)
    return int(os.sysconf("SC_PHYS_PAGES") * page_mb / 2)


def _get_preset_normalization(name: str, channels: int) -> MeanAndStd | None:
    """A normalisation that needs no pictures; for grey ones the mean over the channels."""
    if name == "none":
        return (0.0,), (1.0,)
    if name != "imagenet":
        return None
    if channels == 3:
        return _IMAGENET
    mean, std = ((round(sum(each) / 3, 4),) for each in _IMAGENET)
    return mean, std


def _measure_normalization(inputs: ImageInputs, source: Any) -> MeanAndStd:
    rows = np.unique(np.linspace(0, len(source) - 1, min(len(source), _NUM_MEASURED)).round().astype(np.int64))
    fetch = functools.partial(source.index_select, 0) if isinstance(source, Tensor) else source.fetch
    chunks = map(fetch, torch.split(torch.from_numpy(rows), _CHUNK_SIZE))
    counts = functools.reduce(torch.add, (_count_levels(stored, together=inputs.channels == 1) for stored in chunks))
    means, stds = zip(*map(_mean_and_std, counts), strict=True)
    if len(set(means)) == 1 and len(set(stds)) == 1:
        return means[:1], stds[:1]
    return means, stds


def _count_levels(stored_bchw: Tensor, *, together: bool) -> Tensor:
    """How often each level occurs, from 0 to 1 in equal steps: (c, 256), or (1, 255 * c + 1) of the channels' sum."""
    if together:
        sums = stored_bchw.sum(dim=1, dtype=torch.int64)
        return torch.bincount(sums.flatten(), minlength=255 * stored_bchw.shape[1] + 1)[None]
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in stored_bchw.unbind(1)])


def _mean_and_std(counts: Tensor) -> tuple[float, float]:
    """Of levels from 0 to 1 that occur so often (levels,); exact, so that they are the same in any chunks."""
    levels, weights = torch.linspace(0, 1, len(counts), dtype=torch.float64), counts.double()
    mean = (levels * weights).sum() / weights.sum()
    variance = ((levels - mean).square() * weights).sum() / (weights.sum() - 1)
    return round(mean.item(), 4), round(variance.sqrt().item(), 4) or 1.0


def _count_split_samples(count: int, shares: Mapping[str, float], *, name: str) -> dict[str, int]:
    """Pictures of a class of `count` that each split gets."""
    if count <= len(shares):
        raise DataError(
            f"class '{name}' has {count} picture{'s' if count > 1 else ''}, too few to divide",
            where="--data",
            why=f"it needs at least {len(shares) + 1}: one for train and one for each of {', '.join(shares)}",
            fix="add pictures of it, remove the class, or bring your own folders train, val and test",
        )
    counts = {split: max(1, round(share * count)) for split, share in shares.items()}
    while sum(counts.values()) >= count:
        counts[max(counts, key=lambda split: counts[split])] -= 1
    return counts


def _derive_random_state(seed: int, *words: str) -> int:
    return zlib.crc32("/".join((str(seed), *words)).encode())


def _check_memory(parts: ImageSplits, inputs: ImageInputs, memory_mb: int | None) -> tuple[bool, list[str]]:
    """Whether all pictures are held in memory, and a sentence where they are not."""
    needed_mb = sum(len(part.class_indices) for part in parts.by_split.values()) * math.prod(inputs.shape or ()) / 2**20
    budget_mb = free_memory_mb() / 2 if memory_mb is None else memory_mb
    if needed_mb <= budget_mb:
        return True, []
    why = "half of what is free" if memory_mb is None else "--data.memory-mb"
    return False, [
        f"pictures are decoded when they are needed: they would take {needed_mb:,.1f} MB, "
        f"more than {budget_mb:,.1f} MB ({why})"
    ]


def _load_all(pictures: ImageSource) -> Tensor:
    """All pictures in memory, uint8 (n, c, h, w)."""
    if isinstance(pictures, ImageFileSource):
        return pictures.fetch(torch.arange(len(pictures)))
    first = pictures.fetch(torch.tensor([0]))
    out = first.new_empty(len(pictures), *first.shape[1:])
    for rows in torch.split(torch.arange(len(pictures)), _CHUNK_SIZE):
        out[rows] = pictures.fetch(rows)
    return out


def _check_files(parts: ImageSplits) -> None:
    for part in parts.by_split.values():
        if isinstance(part.source, ImageFileSource):
            part.source.check_files()


def _make_lazy_source(split: str, part: ImageSplit, record: Path | None) -> ImageSource | ReplacingImageSource:
    """The source of a split that is decoded in each epoch; without a record, nothing stands in for anything."""
    if not isinstance(part.source, ImageFileSource) or record is None:
        return part.source
    return ReplacingImageSource(part.source, part.class_indices, part.ids, split, record)


def _make_missing_notes(parts: ImageSplits) -> list[str]:
    absent = {
        split: [parts.class_names[code] for code in np.setdiff1d(np.arange(len(parts.class_names)), part.class_indices)]
        for split, part in parts.by_split.items()
    }
    return [f"{split} has no picture of {abbreviate_names(lacking)}" for split, lacking in absent.items() if lacking]
