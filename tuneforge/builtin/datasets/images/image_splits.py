"""From images and their classes to train, val and test: stratified splits, caching in memory, normalization.

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
"""Mean and standard deviation, one value for all channels or one each."""

SPLITS = ("train", "val", "test")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NUM_MEASURED = 2048  # training images from which mean and std are computed
_CHUNK_SIZE = 64  # images per chunk


class ImageSource(Protocol):
    """A source of images with a `select` method: `ImageFileSource` or `ImageArraySource`."""

    def __len__(self) -> int:
        """Return the number of images."""

    def fetch(self, indices: Tensor) -> Tensor:
        """Return the stored images of `indices` (b,), uint8 (b, c, h, w)."""

    def select(self, rows: Tensor) -> ImageSource:
        """Return the source of `rows`."""


@attrs.frozen(eq=False)
class ImageSplit:
    """Images of one split, or of all data before it is split.

    Args:
        source: Source of the images.
        class_indices: Class of each, an index into the class names, int64 (n,).
        ids: Stable id of each.
    """

    source: ImageSource
    class_indices: IndexArray
    ids: Sequence[str]

    def select(self, rows: IndexArray) -> ImageSplit:
        """Return the split of `rows`."""
        return ImageSplit(
            self.source.select(torch.from_numpy(rows)), self.class_indices[rows], select_items(self.ids, rows)
        )


@attrs.frozen(eq=False)
class ImageSplits:
    """Images by split.

    Args:
        class_names: Names of the classes, the same for all splits.
        by_split: `train`, and `val` and `test` if the data has them.
    """

    class_names: tuple[str, ...]
    by_split: Mapping[str, ImageSplit]

    def with_splits(self, by_split: Mapping[str, ImageSplit]) -> ImageSplits:
        """Return other images of the same classes."""
        return ImageSplits(self.class_names, by_split)


def make_data(
    options: ImageOptions,
    parts: ImageSplits,
    *,
    seed: int,
    single_split: bool = False,
    notes: Sequence[str] = (),
    restored_inputs: Any = None,
    files_checked: bool = False,
    replacements_path: Path | None = None,
) -> Data:
    """Return the data of a run.

    Args:
        options: Options of the data source: fractions, limits and normalization.
        parts: Images by split; a missing `val` or `test` is split from `train`.
        seed: Seed of the run.
        single_split: Whether images without splits are one split, whatever their classes.
        notes: Sentences about the data.
        restored_inputs: Inputs of a restored run, whose normalization overrides the options.
        files_checked: True if all files have been checked.
        replacements_path: File that records replacements of images that can no longer be read.

    Raises:
        DataError: There are too few classes or images of a class, a class is missing in train, or a file is broken.
    """
    rare_notes: list[str] = []
    if options.rare_classes != "raise" and not single_split:
        shares = {"val": options.val, "test": options.test}
        num_splits = 1 + sum(share > 0 for split, share in shares.items() if split not in parts.by_split)
        parts, rare_notes = _find_rare(parts, num_splits, drop=options.rare_classes == "drop")
    parts = limit_per_class(align_classes(parts, 1 if single_split else 2), options.limit, seed=seed)
    if not single_split:
        shares = {"val": options.val, "test": options.test}
        parts = add_missing_splits(parts, shares, seed=seed, keep_few=options.rare_classes == "train")
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
        val=splits.get("val", splits["train"]),
        test=splits.get("test", splits["train"]),
        inputs=inputs.with_normalization(mean, std),
        targets=ClassTargets(names=parts.class_names),
        notes=(*notes, *rare_notes, *_make_missing_notes(parts), *memory_notes),
    )


def align_classes(parts: ImageSplits, min_classes: int = 2) -> ImageSplits:
    """Restrict the classes to those of train, matched by name in all splits.

    Raises:
        DataError: There are fewer than `min_classes`, or another split has a class that train lacks.
    """
    present = {split: np.unique(part.class_indices) for split, part in parts.by_split.items()}
    known = [parts.class_names[code] for code in present["train"]]
    if len(known) < min_classes:
        raise DataError(
            f"there is only one class, '{known[0]}'" if known else "there are no images",
            where="--data",
            why="a classifier needs at least two classes",
            fix="add images of at least one more class",
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
    """Keep at most `limit` images of each class in each split, drawn by the seed."""
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


def _find_rare(parts: ImageSplits, num_splits: int, *, drop: bool) -> tuple[ImageSplits, list[str]]:
    """Return the images, without those of classes with fewer than `num_splits` in train if `drop`, and a note."""
    counts = np.bincount(parts.by_split["train"].class_indices, minlength=len(parts.class_names))
    few = (counts < num_splits) & (counts > 0)
    if not few.any():
        return parts, []
    names = abbreviate_names([f"{parts.class_names[code]} ({counts[code]})" for code in np.flatnonzero(few)])
    done = "left out" if drop else "in training alone"
    notes = [f"classes with fewer than {num_splits} images are {done}: {names}"]
    if not drop:
        return parts, notes
    rest = {name: part.select(np.flatnonzero(~few[part.class_indices])) for name, part in parts.by_split.items()}
    return parts.with_splits(rest), notes


def add_missing_splits(
    parts: ImageSplits, shares: Mapping[str, float], *, seed: int, keep_few: bool = False
) -> ImageSplits:
    """Return all three splits; a missing one is split from train, stratified by class, and empty if its share is 0.

    With `keep_few`, a class with too few images for every split goes to train.

    Raises:
        UsageError: The fractions leave nothing for train.
        DataError: A class has too few images for every split.
    """
    train = parts.by_split["train"]
    missing = {split: share for split, share in shares.items() if split not in parts.by_split}
    if sum(missing.values()) >= 1:
        asked = " and ".join(f"{split} {share:g}" for split, share in missing.items())
        raise UsageError(f"{asked} leave nothing for training", why="their sum must be less than 1", fix="lower one")
    empty = {split: np.zeros(0, dtype=np.int64) for split, share in missing.items() if not share}
    drawn = {split: share for split, share in missing.items() if share}
    rows = empty
    if drawn:
        rows = empty | split_stratified(train.class_indices, parts.class_names, drawn, seed=seed, keep_few=keep_few)
    taken = {split: train.select(chosen) for split, chosen in rows.items()}
    return parts.with_splits({split: taken.get(split) or parts.by_split[split] for split in SPLITS})


def split_stratified(
    codes: IndexArray, names: Sequence[str], shares: Mapping[str, float], *, seed: int, keep_few: bool = False
) -> dict[str, IndexArray]:
    """Return the rows of `train` and of each split in `shares`, ascending, stratified by class.

    Each split has at least one row per class. The split of a class depends only on the seed, its name and its images.

    Args:
        codes: Class of each sample, an index into the names (n,).
        names: Names of the classes.
        shares: Fraction of each split.
        seed: Seed of the run.
        keep_few: Whether a class with too few images for every split goes to train, rather than being an error.

    Raises:
        DataError: A class has too few images for every split.
    """
    from sklearn.model_selection import train_test_split

    out: dict[str, list[IndexArray]] = {split: [] for split in ("train", *shares)}
    for code, name in enumerate(names):
        rest = np.flatnonzero(codes == code)
        taken_shares = {} if keep_few and len(rest) <= len(shares) else shares
        for split, count in _count_split_samples(len(rest), taken_shares, name=name).items():
            rest, taken = train_test_split(rest, test_size=count, random_state=_derive_random_state(seed, split, name))
            out[split].append(taken)
        out["train"].append(rest)
    return {split: np.sort(np.concatenate([*rows, np.zeros(0, np.int64)])) for split, rows in out.items()}


def compute_normalization(options: ImageOptions, inputs: ImageInputs, source: Any) -> MeanAndStd:
    """Return mean and standard deviation on the scale 0 to 1: the user's, ImageNet's, or those of the training images.

    The last are computed over up to 2048 evenly spaced images, and rounded, so that they are the same on any machine.
    """
    if options.mean and options.std:
        return options.mean, options.std
    mean, std = _get_preset_normalization(options.normalize, inputs.channels) or _measure_normalization(inputs, source)
    return options.mean or mean, options.std or std


def free_memory_mb() -> int:
    """Return the free memory, in MB; half of the total memory if the system does not report it."""
    page_mb = os.sysconf("SC_PAGE_SIZE") / 2**20
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return int(os.sysconf("SC_AVPHYS_PAGES") * page_mb)
    return int(os.sysconf("SC_PHYS_PAGES") * page_mb / 2)


def _get_preset_normalization(name: str, channels: int) -> MeanAndStd | None:
    """Return a fixed normalization, or None; for one channel, the mean over the channels of ImageNet's."""
    if name == "none":
        return (0.0,), (1.0,)
    if name != "imagenet":
        return None
    return average_channels(_IMAGENET, channels)


def average_channels(normalization: MeanAndStd, channels: int) -> MeanAndStd:
    """Return mean and std for this number of channels; for one channel, the mean over those of three."""
    mean, std = (each if channels == len(each) else (round(sum(each) / len(each), 4),) for each in normalization)
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
    """Return the histogram of pixel values (c, 256), or (1, 255 * c + 1) of their sum over channels."""
    if together:
        sums = stored_bchw.sum(dim=1, dtype=torch.int64)
        return torch.bincount(sums.flatten(), minlength=255 * stored_bchw.shape[1] + 1)[None]
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in stored_bchw.unbind(1)])


def _mean_and_std(counts: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of a histogram of values from 0 to 1, independent of chunks."""
    levels, weights = torch.linspace(0, 1, len(counts), dtype=torch.float64), counts.double()
    mean = (levels * weights).sum() / weights.sum()
    variance = ((levels - mean).square() * weights).sum() / (weights.sum() - 1)
    return round(mean.item(), 4), round(variance.sqrt().item(), 4) or 1.0


def _count_split_samples(count: int, shares: Mapping[str, float], *, name: str) -> dict[str, int]:
    """Return the number of images that each split gets from a class of `count`."""
    if count <= len(shares):
        raise DataError(
            f"class '{name}' has {count} image{'s' if count > 1 else ''}, too few to split",
            where="--data",
            why=f"it needs at least {len(shares) + 1}: one for train and one for each of {', '.join(shares)}",
            fix="add images, train on all of such classes (--data.rare-classes train), or leave them out "
            "(--data.rare-classes drop), or provide folders train, val and test",
        )
    counts = {split: max(1, round(share * count)) for split, share in shares.items()}
    while sum(counts.values()) >= count:
        counts[max(counts, key=lambda split: counts[split])] -= 1
    return counts


def _derive_random_state(seed: int, *words: str) -> int:
    return zlib.crc32("/".join((str(seed), *words)).encode())


def _check_memory(parts: ImageSplits, inputs: ImageInputs, memory_mb: int | None) -> tuple[bool, list[str]]:
    """Return whether all images are held in memory, and a sentence if they are not."""
    needed_mb = sum(len(part.class_indices) for part in parts.by_split.values()) * math.prod(inputs.shape or ()) / 2**20
    budget_mb = free_memory_mb() / 2 if memory_mb is None else memory_mb
    if needed_mb <= budget_mb:
        return True, []
    why = "half of the free memory" if memory_mb is None else "--data.memory-mb"
    return False, [
        f"images are decoded on demand: they would take {needed_mb:,.1f} MB, more than {budget_mb:,.1f} MB ({why})"
    ]


def _load_all(images: ImageSource) -> Tensor:
    """Return all images, uint8 (n, c, h, w)."""
    if isinstance(images, ImageFileSource):
        return images.fetch(torch.arange(len(images)))
    first = images.fetch(torch.tensor([0]))
    out = first.new_empty(len(images), *first.shape[1:])
    for rows in torch.split(torch.arange(len(images)), _CHUNK_SIZE):
        out[rows] = images.fetch(rows)
    return out


def _check_files(parts: ImageSplits) -> None:
    for part in parts.by_split.values():
        if isinstance(part.source, ImageFileSource):
            part.source.check_files()


def _make_lazy_source(split: str, part: ImageSplit, record: Path | None) -> ImageSource | ReplacingImageSource:
    """Return a source that decodes on demand; with a record, unreadable images are replaced."""
    if not isinstance(part.source, ImageFileSource) or record is None:
        return part.source
    return ReplacingImageSource(part.source, part.class_indices, part.ids, split, record)


def _make_missing_notes(parts: ImageSplits) -> list[str]:
    absent = {
        split: [parts.class_names[code] for code in np.setdiff1d(np.arange(len(parts.class_names)), part.class_indices)]
        for split, part in parts.by_split.items()
    }
    return [
        f"{split} has no images of {abbreviate_names(lacking)}"
        for split, lacking in absent.items()
        if lacking and len(parts.by_split[split].class_indices)
    ]
