"""Pictures as data: from folders, from a CSV file, from the sets that torchvision knows by name.

Only options are declared here, so that `--help` needs no torch; the work is in `image_files`, `image_splits` and
`torchvision_data`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneforge import between, component, ge, gt, hookimpl, option
from tuneforge.builtin.checks import FRACTION, POSITIVE_STDS
from tuneforge.builtin.datasets.images.replacements import (
    REPLACEMENTS_FILE,
    ReplacementCount,
    log_new_replacements,
    replacements_path,
)
from tuneforge.plugin import Check

if TYPE_CHECKING:
    from tuneforge import Data, Run
    from tuneforge.builtin.datasets.images.image_files import ImageIndex
    from tuneforge.builtin.datasets.images.image_inputs import ImageInputs

_GRAYSCALE_DATASETS = ("MNIST", "EMNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS", "SEMEION")
_FRACTION = Check(
    "greater than 0 and at most 0.8", lambda share: 0 < share <= 0.8, {"exclusiveMinimum": 0, "maximum": 0.8}
)


@component(api=1)
class ImageOptions:
    """What all picture data lets the user say: size and looks, shares of the splits, bounds."""

    size: int = option(default=32, help="Height and width that the model sees, in pixels.", check=between(1, 4096))
    fit: Literal["crop", "pad", "stretch"] = option(
        default="crop",
        help="How a picture becomes square: cut at the middle, filled up with its border's colour, or stretched.",
    )
    grayscale: bool = option(default=False, help="Drop the colours.")
    invert: bool = option(default=False, help="Swap dark and light, as for ink on white paper.")
    channels: Literal[1, 3] = option(default=3, help="Channels that the model sees; grey is repeated.")
    normalize: Literal["data", "imagenet", "none"] = option(
        default="data", help="Whose mean and deviation is taken out: the training pictures', ImageNet's, or none."
    )
    mean: tuple[float, ...] | None = option(default=None, help="Mean to take out instead, one number or one a channel.")
    std: tuple[float, ...] | None = option(
        default=None, help="Deviation to divide by instead, like mean.", check=POSITIVE_STDS
    )
    val: float = option(
        default=0.15, help="Share of each class for validation, where the data has no such split.", check=_FRACTION
    )
    test: float = option(
        default=0.15, help="Share of each class for the test, where the data has no such split.", check=_FRACTION
    )
    jpeg_margin: int = option(
        default=2,
        help="A JPEG is decoded at a half, a quarter or an eighth of its size where that is still so many times what "
        "the model sees; 1 is fastest, 0 decodes all of it.",
        check=between(0, 8),
    )
    limit: int | None = option(
        default=None, help="At most so many pictures of each class, for a quick trial.", check=gt(0)
    )
    memory_mb: int | None = option(
        default=None,
        help="Most memory for pictures, in MB; more are decoded on demand. None: half of what is free.",
        check=ge(0),
    )

    def build_inputs(self) -> ImageInputs:
        """The inputs, without a mean yet."""
        return self._build_inputs(grayscale=self.grayscale)

    @hookimpl
    def epoch_ended(self, run: Run) -> None:
        """Say which pictures could no longer be read, and what stood in for them."""
        log_new_replacements(run, run.state(self))

    @hookimpl
    def run_ended(self, run: Run) -> None:
        """The same for what the last evaluation met."""
        log_new_replacements(run, run.state(self))

    @hookimpl
    def evaluate(self, run: Run) -> ReplacementCount:
        """Give the figure `replacements` of a split in which there are some."""
        return ReplacementCount(run)

    def _build_inputs(self, *, grayscale: bool) -> ImageInputs:
        from tuneforge.builtin.datasets.images.image_inputs import ImageInputs

        shapes = {
            "crop": (f"resize {self.size}", f"center-crop {self.size}"),
            "pad": ("square", f"resize {self.size}"),
            "stretch": (f"resize {self.size}x{self.size}",),
        }
        looks = (("grayscale",) if grayscale else ()) + (("invert",) if self.invert else ())
        return ImageInputs(ops=(*looks, *shapes[self.fit]), channels=self.channels, jpeg_margin=self.jpeg_margin)


@component(api=1)
class ImageFileOptions(ImageOptions):
    """What all pictures in files of the user's own let the user say: what is done about those that cannot be used."""

    on_error: Literal["raise", "skip", "quarantine"] = option(
        default="raise",
        help="About files that cannot be used: end before training, leave them out, or move them to .quarantine too.",
    )
    scan_mb: int = option(default=300, help="Most memory for looking at a file before training, in MB.", check=ge(64))
    checked: Path | None = option(
        default=None,
        help="The issues.json of tuneforge data check: copies that it found are marked in the report.",
    )


@component(api=1)
class ImageFolder(ImageFileOptions):
    """Pictures in folders: one folder a class, or folders train, val and test of them."""

    path: Path = option(help="The folder.")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Find, look at, divide and decode the pictures."""
        from tuneforge.builtin.datasets.images.image_files import find_images_in_folder

        return _build_data(self, find_images_in_folder(self.path, where="--data.path"), run)


@component(api=1)
class ImageCsv(ImageFileOptions):
    """Pictures that a CSV file names, with a path and a label a row."""

    path: Path = option(help="The CSV file; its first row names the columns.")
    image: str = option(default="path", help="Column of the pictures' paths.")
    label: str = option(default="label", help="Column of the class names.")
    split: str = option(default="split", help="Column that says train, val or test, where the file has it.")
    root: Path | None = option(default=None, help="Folder that relative paths start from; by default the file's own.")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read the file, look at the pictures, divide and decode them."""
        from tuneforge.builtin.datasets.images.image_files import find_images_in_csv

        found = find_images_in_csv(
            self.path,
            image=self.image,
            label=self.label,
            split=self.split,
            root=self.root or self.path.parent,
            where="--data.path",
            keep_missing=self.on_error != "raise",
        )
        return _build_data(self, found, run)


@component(api=1)
class TorchvisionDataset(ImageOptions):
    """A set that torchvision knows by name, such as MNIST, EMNIST or CIFAR10; downloaded only when asked."""

    dataset: str = option(default="MNIST", help="The set, as torchvision writes it.")
    root: Path = option(default=Path("data"), help="Folder that holds the set, or where it is downloaded to.")
    download: bool = option(default=False, help="Download the set where the folder lacks it.")
    subset: str = option(
        default="byclass", help="Part of EMNIST: byclass, bymerge, balanced, letters, digits or mnist."
    )
    other_share: float | None = option(
        default=None,
        help="Share of one class `other`, made of all that is no digit (EMNIST); none keeps every class.",
        check=FRACTION,
    )

    def build_inputs(self) -> ImageInputs:
        """The inputs, without a mean yet; a set without colours makes the pictures of others grey too."""
        return self._build_inputs(grayscale=self.grayscale or self.dataset in _GRAYSCALE_DATASETS)

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Load the set, take validation from its training part, and resize it."""
        from tuneforge.builtin.datasets.images.image_splits import make_data
        from tuneforge.builtin.datasets.images.torchvision_data import load_dataset, merge_other_classes

        parts = load_dataset(
            self.dataset, self.root, images=self.build_inputs(), download=self.download, subset=self.subset
        )
        notes: tuple[str, ...] = ()
        if self.other_share is not None:
            parts, notes = merge_other_classes(parts, fraction=self.other_share, seed=run.data_seed)
        return make_data(
            self,
            parts,
            seed=run.data_seed,
            notes=notes,
            restored_inputs=_get_restored_inputs(run),
            replacements_path=replacements_path(run),
        )


def _build_data(options: ImageFileOptions, found: ImageIndex, run: Run) -> Data:
    """The data of the files that were found."""
    import numpy as np

    from tuneforge.builtin.datasets.images.file_check import check_files, mark_duplicates, read_duplicate_sets
    from tuneforge.builtin.datasets.images.image_sources import ImageFileSource
    from tuneforge.builtin.datasets.images.image_splits import ImageSplit, ImageSplits, make_data

    images = options.build_inputs()
    found, scanned = check_files(found, images, run, on_error=options.on_error, memory_mb=options.scan_mb)
    names = tuple(sorted({label for listing in found.by_split.values() for label in listing.classes}))
    codes = {name: code for code, name in enumerate(names)}
    parts = {}
    for split, listing in found.by_split.items():
        place = np.array([codes[label] for label in listing.classes], dtype=np.int64)
        parts[split] = ImageSplit(
            source=ImageFileSource(images, listing.paths),
            class_indices=place[np.frombuffer(listing.class_indices, dtype=np.int64)],
            ids=listing.ids,
        )
    data = make_data(
        options,
        ImageSplits(names, parts),
        seed=run.data_seed,
        notes=found.notes,
        restored_inputs=_get_restored_inputs(run),
        files_checked=True,
        replacements_path=None if scanned.run_dir is None else scanned.run_dir / REPLACEMENTS_FILE,
    )
    if options.checked is not None:
        return mark_duplicates(data, read_duplicate_sets(options.checked, data), by="as data check found")
    return mark_duplicates(data, scanned.duplicate_sets, by="the same bytes")


def _get_restored_inputs(run: Run) -> Any:
    """The inputs of the run that is restored, whose normalisation holds for other data too."""
    return run.data.inputs if run.restoring else None
