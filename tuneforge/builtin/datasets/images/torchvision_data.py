"""Image datasets of torchvision, read by its own code.

Shapes: n images, c channels, h and w pixels.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from tuneforge import DataError, UnknownNameError
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.datasets.images.image_sources import ImageArraySource, ImageFileSource
from tuneforge.builtin.datasets.images.image_splits import ImageSource, ImageSplit, ImageSplits
from tuneforge.errors import suggest_name

_Arguments = Mapping[str, Mapping[str, Any]]

_BY_TRAIN: _Arguments = {"train": {"train": True}, "test": {"train": False}}
_BY_SPLIT: _Arguments = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: _Arguments = {split: {"split": split} for split in ("train", "val", "test")}
_WHOLE: _Arguments = {"train": {}}
DATASETS: Mapping[str, _Arguments] = {
    **dict.fromkeys(("MNIST", "EMNIST", "FashionMNIST", "KMNIST", "QMNIST", "CIFAR10", "CIFAR100", "USPS"), _BY_TRAIN),
    **dict.fromkeys(("SVHN", "STL10", "GTSRB", "Food101"), _BY_SPLIT),
    **dict.fromkeys(("Flowers102", "DTD", "FGVCAircraft"), _THREE),
    **dict.fromkeys(("SEMEION", "EuroSAT"), _WHOLE),
    "Imagenette": {"train": {"split": "train"}, "test": {"split": "val"}},
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
}
"""Arguments of the torchvision dataset for each split, by dataset."""

OTHER = "other"

_DIGIT_DATASETS = ("MNIST", "QMNIST", "SVHN", "USPS", "SEMEION")
_LISTS_OF_FILES = (("_image_files", "_labels"), ("_images", "_labels"))
_LISTS_OF_PAIRS = ("_samples", "samples")


def load_dataset(name: str, root: Path, *, images: ImageInputs, download: bool, subset: str) -> ImageSplits:
    """Return all splits of a dataset.

    Args:
        name: Name of the dataset in torchvision.
        root: Folder of the dataset.
        images: Inputs that decode the images.
        download: Whether torchvision may download missing files.
        subset: Split of EMNIST.

    Raises:
        UnknownNameError: The dataset is not supported.
        DataError: It is missing, broken, or could not be downloaded.
    """
    if name not in DATASETS:
        raise UnknownNameError(
            f"tuneforge does not support the torchvision dataset '{name}'",
            where="--data.dataset",
            fix=suggest_name(name, DATASETS),
        )
    loaded = {
        split: _load_split(
            name, root, {**arguments, "download": download, **({"split": subset} if name == "EMNIST" else {})}
        )
        for split, arguments in DATASETS[name].items()
    }
    names = _get_class_names(name, loaded["train"])
    return ImageSplits(names, {split: _to_image_split(dataset, images, split) for split, dataset in loaded.items()})


def merge_other_classes(parts: ImageSplits, *, fraction: float, seed: int) -> tuple[ImageSplits, tuple[str, ...]]:
    """Merge all classes but the digits into one class `other`.

    Args:
        parts: Splits of a dataset whose classes are characters.
        fraction: Fraction of `other` in each split; all digits are kept, others are drawn by the seed.
        seed: Seed of the run.

    Returns:
        The splits, and a sentence for each split with fewer others than requested.

    Raises:
        DataError: The dataset lacks a digit or has no other class.
    """
    digits = tuple(string.digits)
    if not set(digits) < set(parts.class_names):
        raise DataError(
            "the dataset does not have digits and other characters",
            where="--data.other-share",
            why=f"its classes are {', '.join(parts.class_names[:12])}",
            fix="use --data.dataset EMNIST --data.subset byclass",
        )
    place = np.array([digits.index(name) if name in digits else len(digits) for name in parts.class_names])
    notes, by_split = [], {}
    for split, part in parts.by_split.items():
        codes = place[part.class_indices]
        others = np.flatnonzero(codes == len(digits))
        wanted = round((len(codes) - len(others)) * fraction / (1 - fraction))
        if wanted > len(others):
            notes.append(f"{split} has {len(others):,} others, fewer than the requested {wanted:,}")
        drawn = np.random.RandomState(seed % 2**32).permutation(others)[:wanted]
        rows = np.sort(np.concatenate([np.flatnonzero(codes < len(digits)), drawn]))
        by_split[split] = ImageSplit(part.source, codes, part.ids).select(rows)
    return ImageSplits((*digits, OTHER), by_split), tuple(notes)


def _load_split(name: str, root: Path, arguments: Mapping[str, Any]) -> Any:
    try:
        return getattr(datasets, name)(root, **arguments)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AssertionError) as error:
        raise DataError(
            f"cannot load {name}",
            where=f"--data.root {root}",
            why=str(error).split(".")[0] or type(error).__name__,
            fix="place its files there in torchvision's layout, or pass --data.download true" + _suggest_network(error),
        ) from error


def _suggest_network(error: Exception) -> str:
    return " with a network" if "urlopen" in str(error) or "download" in type(error).__name__.lower() else ""


def _get_class_names(name: str, dataset: Any) -> tuple[str, ...]:
    """Return the names of the classes; a digit is named by its character, so that heads match it."""
    if name in _DIGIT_DATASETS:
        return tuple(string.digits)
    known = getattr(dataset, "classes", None)
    return tuple(map(str, known)) if known else tuple(map(str, range(int(_get_class_indices(dataset).max()) + 1)))


def _to_image_split(dataset: Any, images: ImageInputs, split: str) -> ImageSplit:
    codes = _get_class_indices(dataset)
    return ImageSplit(_to_image_source(dataset, images), codes, [f"{split}/{row}" for row in range(len(codes))])


def _to_image_source(dataset: Any, images: ImageInputs) -> ImageSource:
    if hasattr(dataset, "data"):
        images_nchw = _channels_first(dataset.data)
        if isinstance(dataset, datasets.EMNIST):
            images_nchw = images_nchw.transpose(2, 3)  # its files store images transposed
        return ImageArraySource(images, images_nchw)
    paths, _ = _get_paths_and_labels(dataset)
    return ImageFileSource(images, paths)


def _channels_first(data: Any) -> Tensor:
    """Return uint8 (n, c, h, w) from (n, h, w), (n, h, w, 3) or (n, 3, h, w)."""
    images = torch.as_tensor(data)
    if images.ndim == 3:
        return images[:, None]
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)


def _get_class_indices(dataset: Any) -> NDArray[np.int64]:
    """Return the class of each image (n,)."""
    for attribute in ("targets", "labels"):
        if hasattr(dataset, attribute) and hasattr(dataset, "data"):
            codes = np.asarray(getattr(dataset, attribute), dtype=np.int64)
            return codes if codes.ndim == 1 else codes[:, 0]  # QMNIST has more columns, such as the writer
    return np.asarray(_get_paths_and_labels(dataset)[1], dtype=np.int64)


def _get_paths_and_labels(dataset: Any) -> tuple[list[Path], list[int]]:
    """Return paths and classes of a dataset that is not in memory."""
    for paths, labels in _LISTS_OF_FILES:
        if hasattr(dataset, paths):
            return [Path(path) for path in getattr(dataset, paths)], list(getattr(dataset, labels))
    pairs = next(getattr(dataset, name) for name in _LISTS_OF_PAIRS if hasattr(dataset, name))
    return [Path(path) for path, _ in pairs], [code for _, code in pairs]
