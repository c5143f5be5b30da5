"""Image data sources: folders, a CSV file, datasets of torchvision.

This module only declares options, so that `--help` needs no torch; `image_files`, `image_splits` and
`torchvision_data` read the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneforge import between, component, ge, gt, hookimpl, option
from tuneforge.builtin.checks import FRACTION, POSITIVE_STDS, RARE_CLASSES_HELP
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
_FRACTION = Check("at least 0 and at most 0.8", lambda share: 0 <= share <= 0.8, {"minimum": 0, "maximum": 0.8})


@component(api=1)
class ImageOptions:
    """Options of all image data sources: size, normalization, splits, limits."""

    size: int | None = option(
        default=None,
        help="Height and width of the model's input, in pixels. Default: that of the pretrained weights, else 32.",
        check=between(1, 4096),
    )
    resize: int | None = option(
        default=None,
        help="Size of the shorter side before the center crop, in pixels. Default: that of the weights, else the size.",
        check=between(1, 8192),
    )
    fit: Literal["auto", "crop", "pad", "stretch"] = option(
        default="auto",
        help="How an image becomes square: center crop, padding with the color of its border, or stretching. Auto: as "
        "the weights expect it, else crop.",
    )
    interpolation: Literal["auto", "nearest", "bilinear", "bicubic"] = option(
        default="auto",
        help="Interpolation of the resize, by Pillow. Auto: as the weights expect it, else bilinear by torchvision.",
    )
    grayscale: bool = option(default=False, help="Convert to grayscale.")
    invert: bool = option(default=False, help="Invert the pixels, as for dark ink on white paper.")
    channels: Literal[1, 3] = option(default=3, help="Channels of the model's input; a grayscale image is repeated.")
    normalize: Literal["auto", "data", "imagenet", "none"] = option(
        default="auto",
        help="Mean and std for normalization: of the training images, ImageNet's, or none. Auto: those of the weights, "
        "else of the training images.",
    )
    mean: tuple[float, ...] | None = option(default=None, help="Mean instead of that, one number or one per channel.")
    std: tuple[float, ...] | None = option(
        default=None, help="Std instead of that, one number or one per channel.", check=POSITIVE_STDS
    )
    val: float = option(
        default=0.15,
        help="Fraction of each class for validation, if the data has no such split; or 0.",
        check=_FRACTION,
    )
    test: float = option(
        default=0.15,
        help="Fraction of each class for the test split, if the data has none; or 0.",
        check=_FRACTION,
    )
    rare_classes: Literal["raise", "train", "drop"] = option(default="raise", help=RARE_CLASSES_HELP)
    jpeg_margin: int | None = option(
        default=None,
        help="A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is at least this many times the model's input "
        "size; 1 is fastest, 0 always decodes the full size. Default: 2; 0 for pretrained weights, like their own "
        "transform.",
        check=between(0, 8),
    )
    max_megapixels: int | None = option(
        default=None,
        help="Maximum size at which an image is decoded, in megapixels; a large JPEG is decoded at 1/2, 1/4 or 1/8. "
        "Default: 89.",
        check=gt(0),
    )
    limit: int | None = option(default=None, help="Maximum number of images per class, for a quick trial.", check=gt(0))
    memory_mb: int | None = option(
        default=None,
        help="Maximum memory for images, in MB; beyond it they are decoded on demand. Default: half of what is free.",
        check=ge(0),
    )

    def build_inputs(self) -> ImageInputs:
        """Return the inputs, without normalization."""
        return self._build_inputs(grayscale=self.grayscale)

    @hookimpl
    def strategy_step_started(self, run: Run) -> None:
        """Compare the images with the running statistics of a pretrained network, before the first step."""
        from tuneforge.builtin.datasets.images.first_norm_check import check_first_norm

        state = run.state(self)
        if not state.get("first_norm_checked", False):
            state["first_norm_checked"] = True
            sentence = check_first_norm(run)
            if sentence is not None:
                run.log(sentence)

    @hookimpl
    def epoch_ended(self, run: Run) -> None:
        """Log the images that could no longer be read, and their replacements."""
        log_new_replacements(run, run.state(self))

    @hookimpl
    def run_ended(self, run: Run) -> None:
        """Log the replacements of the last evaluation."""
        log_new_replacements(run, run.state(self))

    @hookimpl
    def evaluate(self, run: Run) -> ReplacementCount:
        """Return the metric `replacements`."""
        return ReplacementCount(run)

    def _build_inputs(self, *, grayscale: bool) -> ImageInputs:
        from tuneforge.builtin.datasets.images.expected_preprocessing import build_geometry_ops
        from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
        from tuneforge.plugin import MAX_IMAGE_PIXELS

        pixel_ops = (("grayscale",) if grayscale else ()) + (("invert",) if self.invert else ())
        return ImageInputs(
            ops=(*pixel_ops, *build_geometry_ops(self)),
            channels=self.channels,
            jpeg_margin=2 if self.jpeg_margin is None else self.jpeg_margin,
            max_pixels=MAX_IMAGE_PIXELS if self.max_megapixels is None else self.max_megapixels * 1_000_000,
        )


@component(api=1)
class ImageFileOptions(ImageOptions):
    """Options of data sources that read the user's image files: what to do about unusable ones."""

    on_error: Literal["raise", "skip", "quarantine"] = option(
        default="raise",
        help="What to do about unusable files: raise an error, skip them, or skip them and move them to .quarantine.",
    )
    scan_mb: int = option(default=300, help="Maximum memory for checking a file before training, in MB.", check=ge(64))
    checked: Path | None = option(
        default=None,
        help="The issues.json of tuneforge data check: its duplicates are marked in the report.",
    )


@component(api=1)
class ImageFolder(ImageFileOptions):
    """Images in folders: one folder per class, or folders train, val and test of these."""

    path: Path = option(help="The folder.")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Find, check, split and decode the images."""
        from tuneforge.builtin.datasets.images.image_files import find_images_in_folder

        return _build_data(self, find_images_in_folder(self.path, where="--data.path"), run)


@component(api=1)
class ImageCsv(ImageFileOptions):
    """Images listed in a CSV file, one path and label per row."""

    path: Path = option(help="The CSV file, with a header.")
    image: str = option(default="path", help="Column of the image paths.")
    label: str = option(default="label", help="Column of the class names.")
    split: str = option(default="split", help="Column with train, val or test, if the file has it.")
    root: Path | None = option(default=None, help="Folder that paths are relative to; default: that of the file.")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read the file, and check, split and decode the images."""
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
    """A dataset of torchvision, such as MNIST, EMNIST or CIFAR10; downloaded only on request."""

    dataset: str = option(default="MNIST", help="Name of the dataset in torchvision.")
    root: Path = option(default=Path("data"), help="Folder of the dataset, or for the download.")
    download: bool = option(default=False, help="Download the dataset if it is missing.")
    subset: str = option(
        default="byclass", help="Split of EMNIST: byclass, bymerge, balanced, letters, digits or mnist."
    )
    other_share: float | None = option(
        default=None,
        help="Fraction of a class `other` of all non-digits (EMNIST); default: all classes.",
        check=FRACTION,
    )

    def build_inputs(self) -> ImageInputs:
        """Return the inputs, without normalization; for a grayscale dataset they convert to grayscale."""
        return self._build_inputs(grayscale=self.grayscale or self.dataset in _GRAYSCALE_DATASETS)

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Load the dataset, split validation from its training split, and resize the images."""
        from tuneforge.builtin.datasets.images.expected_preprocessing import resolve_options
        from tuneforge.builtin.datasets.images.image_splits import make_data
        from tuneforge.builtin.datasets.images.torchvision_data import load_dataset, merge_other_classes

        options, notes = resolve_options(self, run)
        parts = load_dataset(
            self.dataset, self.root, images=options.build_inputs(), download=self.download, subset=self.subset
        )
        if self.other_share is not None:
            parts, merge_notes = merge_other_classes(parts, fraction=self.other_share, seed=run.data_seed)
            notes = (*notes, *merge_notes)
        return make_data(
            options,
            parts,
            seed=run.data_seed,
            single_split=run.single_split,
            notes=notes,
            restored_inputs=_get_restored_inputs(run),
            replacements_path=replacements_path(run),
        )


def _build_data(options: ImageFileOptions, found: ImageIndex, run: Run) -> Data:
    """Return the data of the files that were found."""
    import numpy as np

    from tuneforge.builtin.datasets.images.expected_preprocessing import resolve_options
    from tuneforge.builtin.datasets.images.file_check import check_files, mark_duplicates, read_duplicate_sets
    from tuneforge.builtin.datasets.images.image_sources import ImageFileSource
    from tuneforge.builtin.datasets.images.image_splits import ImageSplit, ImageSplits, make_data

    options, preprocessing_notes = resolve_options(options, run)
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
        single_split=run.single_split,
        notes=(*found.notes, *preprocessing_notes),
        restored_inputs=_get_restored_inputs(run),
        files_checked=True,
        replacements_path=None if scanned.run_dir is None else scanned.run_dir / REPLACEMENTS_FILE,
    )
    if options.checked is not None:
        return mark_duplicates(data, read_duplicate_sets(options.checked, data), by="found by data check")
    return mark_duplicates(data, scanned.duplicate_sets, by="identical files")


def _get_restored_inputs(run: Run) -> Any:
    """Return the inputs of the restored run, whose normalization applies to this data too."""
    return run.data.inputs if run.restoring else None
