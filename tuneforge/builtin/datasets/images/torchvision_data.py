"""The sets of pictures that torchvision knows by name, as they lie on disk; its own code reads them.

Shapes: n pictures, c channels, h and w pixels.
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
"""The sets by name, with what torchvision is told for each split."""

OTHER = "other"

_DIGIT_DATASETS = ("MNIST", "QMNIST", "SVHN", "USPS", "SEMEION")
_LISTS_OF_FILES = (("_image_files", "_labels"), ("_images", "_labels"))
_LISTS_OF_PAIRS = ("_samples", "samples")


def load_dataset(name: str, root: Path, *, images: ImageInputs, download: bool, subset: str) -> ImageSplits:
    """All splits of a set.

    Args:
        name: As torchvision writes it.
        root: The folder that torchvision is told.
        images: What happens to each picture.
        download: Whether torchvision may download what is missing.
        subset: Of EMNIST.

    Raises:
        UnknownNameError: There is no set of that name.
        DataError: It is not under `root`, is broken, or could not be downloaded.
    """
    if name not in DATASETS:
        raise UnknownNameError(
            f"torchvision's set '{name}' is not one that tuneforge reads",
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
    """Eleven classes: the digits, and all other characters as `other`.

    Args:
        parts: Of a set whose classes are characters.
        fraction: Of `other` in each split; digits are all kept, others are drawn from the seed.
        seed: The run's.

    Returns:
        The parts, and a sentence for each split where there are fewer others than asked for.

    Raises:
        DataError: The set lacks a digit, or has nothing else.
    """
    digits = tuple(string.digits)
    if not set(digits) < set(parts.class_names):
        raise DataError(
            "the set has no digits and other characters",
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
            notes.append(f"{split} has {len(others):,} others, fewer than the {wanted:,} that were asked for")
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
            fix="place its files there as torchvision lays them out, or pass --data.download true"
            + _suggest_network(error),
        ) from error


def _suggest_network(error: Exception) -> str:
    return " with a network" if "urlopen" in str(error) or "download" in type(error).__name__.lower() else ""


def _get_class_names(name: str, dataset: Any) -> tuple[str, ...]:
    """Names of the classes: a digit is called by its sign, so that heads find it again."""
    if name in _DIGIT_DATASETS:
        return tuple(string.digits)
    known = getattr(dataset, "classes", None)
    return tuple(map(str, known)) if known else tuple(map(str, range(int(_get_class_indices(dataset).max()) + 1)))


def _to_image_split(dataset: Any, images: ImageInputs, split: str) -> ImageSplit:
    codes = _get_class_indices(dataset)
    return ImageSplit(_to_image_source(dataset, images), codes, [f"{split}/{row}" for row in range(len(codes))])


def _to_image_source(dataset: Any, images: ImageInputs) -> ImageSource:
    if hasattr(dataset, "data"):
        pictures_nchw = _channels_first(dataset.data)
        if isinstance(dataset, datasets.EMNIST):
            pictures_nchw = pictures_nchw.transpose(2, 3)  # its files hold every picture transposed
        return ImageArraySource(images, pictures_nchw)
    paths, _ = _get_paths_and_labels(dataset)
    return ImageFileSource(images, paths)


def _channels_first(data: Any) -> Tensor:
    """uint8 (n, c, h, w), from (n, h, w), (n, h, w, 3) or (n, 3, h, w)."""
    pictures = torch.as_tensor(data)
    if pictures.ndim == 3:
        return pictures[:, None]
    return pictures if pictures.shape[1] == 3 else pictures.permute(0, 3, 1, 2)


def _get_class_indices(dataset: Any) -> NDArray[np.int64]:
    """The class of each picture (n,)."""
    for attribute in ("targets", "labels"):
        if hasattr(dataset, attribute) and hasattr(dataset, "data"):
            codes = np.asarray(getattr(dataset, attribute), dtype=np.int64)
            return codes if codes.ndim == 1 else codes[:, 0]  # QMNIST adds the writer and more
    return np.asarray(_get_paths_and_labels(dataset)[1], dtype=np.int64)


def _get_paths_and_labels(dataset: Any) -> tuple[list[Path], list[int]]:
    """Paths and classes, of a set that is not in memory."""
    for paths, labels in _LISTS_OF_FILES:
        if hasattr(dataset, paths):
            return [Path(path) for path in getattr(dataset, paths)], list(getattr(dataset, labels))
    pairs = next(getattr(dataset, name) for name in _LISTS_OF_PAIRS if hasattr(dataset, name))
    return [Path(path) for path, _ in pairs], [code for _, code in pairs]
