"""Pictures as data: from folders, from a CSV file, from the sets that torchvision knows by name.

Only options are declared here, so that `--help` needs no torch; the work is in `image_files`, `image_splits` and
`torchvision_data`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneforge import Check, between, component, ge, gt, hookimpl, option

if TYPE_CHECKING:
    from tuneforge import Data, Run
    from tuneforge.builtin.datasets.images.image_files import Found
    from tuneforge.builtin.datasets.images.image_inputs import Images

_GREY_SETS = ("MNIST", "EMNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS", "SEMEION")
_SHARE = Check(
    "greater than 0 and at most 0.8", lambda share: 0 < share <= 0.8, {"exclusiveMinimum": 0, "maximum": 0.8}
)
STAND_INS = "stand_ins.jsonl"
"""In a run's folder: which picture stood in for one that could no longer be read."""

_STDS = Check("numbers greater than 0", lambda std: bool(std) and min(std) > 0)


class StandInCount:
    """How many pictures of a split others stood in for, as a figure of the report; no figure where none did."""

    def __init__(self, run: Run) -> None:
        self._run, self._split = run, run.evaluating

    def update(self, outputs: Any, targets: Any) -> None:
        """Count nothing here: the pictures were read before."""

    def compute(self) -> dict[str, int]:
        """The figure."""
        count = sum(line["split"] == self._split for line in _stand_ins(self._run))
        return {"stand_ins": count} if count else {}


@component(api=1)
class PictureOptions:
    """What all picture data lets the user say: size and looks, shares of the splits, bounds."""

    size: int = option(default=32, help="Height and width that the model sees, in pixels.", check=between(1, 4096))
    fit: Literal["crop", "pad", "stretch"] = option(
        default="crop",
        help="How a picture becomes square: cut at the middle, filled up with its border's colour, or stretched.",
    )
    grey: bool = option(default=False, help="Drop the colours.")
    invert: bool = option(default=False, help="Swap dark and light, as for ink on white paper.")
    channels: Literal[1, 3] = option(default=3, help="Channels that the model sees; grey is repeated.")
    normalise: Literal["data", "imagenet", "none"] = option(
        default="data", help="Whose mean and deviation is taken out: the training pictures', ImageNet's, or none."
    )
    mean: tuple[float, ...] | None = option(default=None, help="Mean to take out instead, one number or one a channel.")
    std: tuple[float, ...] | None = option(default=None, help="Deviation to divide by instead, like mean.", check=_STDS)
    val: float = option(
        default=0.15, help="Share of each class for validation, where the data has no such split.", check=_SHARE
    )
    test: float = option(
        default=0.15, help="Share of each class for the test, where the data has no such split.", check=_SHARE
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

    def images(self) -> Images:
        """The inputs, without a mean yet."""
        return self._images(grey=self.grey)

    @hookimpl
    def epoch_ended(self, run: Run) -> None:
        """Say which pictures could no longer be read, and what stood in for them."""
        self._tell(run)

    @hookimpl
    def run_ended(self, run: Run) -> None:
        """The same for what the last evaluation met."""
        self._tell(run)

    @hookimpl
    def evaluate(self, run: Run) -> StandInCount:
        """Give the figure `stand_ins` of a split in which there are some."""
        return StandInCount(run)

    def _tell(self, run: Run) -> None:
        state = run.state(self)
        lines = _stand_ins(run)
        for line in lines[state.get("told", 0) :]:
            run.note(
                f"note: {line['split']}: '{line['id']}' can no longer be read ({line['why']}); "
                f"{line['stand_in']} stands in for it"
            )
        state["told"] = len(lines)

    def _images(self, *, grey: bool) -> Images:
        from tuneforge.builtin.datasets.images.image_inputs import Images

        shapes = {
            "crop": (f"resize {self.size}", f"centre-crop {self.size}"),
            "pad": ("square", f"resize {self.size}"),
            "stretch": (f"resize {self.size}x{self.size}",),
        }
        looks = (("grey",) if grey else ()) + (("invert",) if self.invert else ())
        return Images(ops=(*looks, *shapes[self.fit]), channels=self.channels, jpeg_margin=self.jpeg_margin)


@component(api=1)
class FileOptions(PictureOptions):
    """What all pictures in files of the user's own let the user say: what is done about those that cannot be used."""

    broken: Literal["stop", "skip", "quarantine"] = option(
        default="stop",
        help="About files that cannot be used: end before training, leave them out, or move them to .quarantine too.",
    )
    scan_mb: int = option(default=300, help="Most memory for looking at a file before training, in MB.", check=ge(64))
    checked: Path | None = option(
        default=None,
        help="The issues.json of tuneforge data check: copies that it found are marked in the report.",
    )


@component(api=1)
class ImageFolder(FileOptions):
    """Pictures in folders: one folder a class, or folders train, val and test of them."""

    path: Path = option(help="The folder.")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Find, look at, divide and decode the pictures."""
        from tuneforge.builtin.datasets.images.image_files import find_folder

        return _data_of(self, find_folder(self.path, where="--data.path"), run)


@component(api=1)
class ImageCsv(FileOptions):
    """Pictures that a CSV file names, with a path and a label a row."""

    path: Path = option(help="The CSV file; its first row names the columns.")
    image: str = option(default="path", help="Column of the pictures' paths.")
    label: str = option(default="label", help="Column of the class names.")
    split: str = option(default="split", help="Column that says train, val or test, where the file has it.")
    root: Path | None = option(default=None, help="Folder that relative paths start from; by default the file's own.")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read the file, look at the pictures, divide and decode them."""
        from tuneforge.builtin.datasets.images.image_files import find_csv

        found = find_csv(
            self.path,
            image=self.image,
            label=self.label,
            split=self.split,
            root=self.root or self.path.parent,
            where="--data.path",
            keep_missing=self.broken != "stop",
        )
        return _data_of(self, found, run)


@component(api=1)
class Torchvision(PictureOptions):
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
        check=Check("greater than 0 and less than 1", lambda share: 0 < share < 1),
    )

    def images(self) -> Images:
        """The inputs, without a mean yet; a set without colours makes the pictures of others grey too."""
        return self._images(grey=self.grey or self.dataset in _GREY_SETS)

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Load the set, take validation from its training part, and resize it."""
        from tuneforge.builtin.datasets.images.image_splits import make_data
        from tuneforge.builtin.datasets.images.torchvision_data import load_set, with_others

        parts = load_set(self.dataset, self.root, images=self.images(), download=self.download, subset=self.subset)
        notes: tuple[str, ...] = ()
        if self.other_share is not None:
            parts, notes = with_others(parts, share=self.other_share, seed=run.data_seed)
        return make_data(self, parts, seed=run.data_seed, notes=notes, known=_known(run), stand_ins=_record(run))


def _data_of(options: FileOptions, found: Found, run: Run) -> Data:
    """The data of the files that were found."""
    import numpy as np

    from tuneforge.builtin.datasets.images.file_check import copies_in, vetted, with_copies_marked
    from tuneforge.builtin.datasets.images.image_sources import PictureFiles
    from tuneforge.builtin.datasets.images.image_splits import Part, Parts, make_data

    images = options.images()
    found, scanned = vetted(found, images, run, policy=options.broken, memory_mb=options.scan_mb)
    names = tuple(sorted({label for listing in found.parts.values() for label in listing.classes}))
    codes = {name: code for code, name in enumerate(names)}
    parts = {}
    for split, listing in found.parts.items():
        place = np.array([codes[label] for label in listing.classes], dtype=np.int64)
        parts[split] = Part(
            pictures=PictureFiles(images, listing.paths),
            codes=place[np.frombuffer(listing.codes, dtype=np.int64)],
            ids=listing.ids,
        )
    data = make_data(
        options,
        Parts(names, parts),
        seed=run.data_seed,
        notes=found.notes,
        known=_known(run),
        vetted=True,
        stand_ins=None if scanned.folder is None else scanned.folder / STAND_INS,
    )
    if options.checked is not None:
        return with_copies_marked(data, copies_in(options.checked, data), by="as data check found")
    return with_copies_marked(data, scanned.same, by="the same bytes")


def _record(run: Run) -> Path | None:
    """Where a run writes down what stands in for what; None for one that only looks."""
    return None if run.folder is None else run.folder / STAND_INS


def _stand_ins(run: Run) -> list[dict[str, str]]:
    from tuneforge.builtin.datasets.images.image_sources import stand_ins

    record = _record(run)
    return [] if record is None else stand_ins(record)


def _known(run: Run) -> Any:
    """The inputs of the run that is restored, whose normalisation holds for other data too."""
    return run.data.inputs if run.restoring else None
