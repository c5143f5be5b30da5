"""Every entry of a data folder or a CSV file, each with what it is: a check passes nothing over."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs

from tuneforge.builtin.datasets.images.image_files import EXTENSIONS, find_images_in_csv, find_split_folders
from tuneforge.errors import DataError, escape_name


@attrs.frozen
class DataFile:
    """One entry.

    Args:
        name: Its path below the root, as it is.
        split: `train`, `val` or `test`; empty where the data is not divided.
        label: Name of its class; empty where it is in none.
        unused_reason: Why a run would not use it; empty where it would.
    """

    name: str
    split: str
    label: str
    unused_reason: str = ""

    @property
    def id(self) -> str:
        """The name as text that can be printed anywhere."""
        return escape_name(self.name)


@attrs.frozen
class CsvColumns:
    """Which columns of a CSV file mean what.

    Args:
        image: Of paths.
        label: Of class names.
        split: Of splits.
        root: What relative paths start from; None: the file's own folder.
    """

    image: str = "path"
    label: str = "label"
    split: str = "split"
    root: Path | None = None


def list_files(path: Path, columns: CsvColumns | None = None) -> tuple[Path, list[DataFile]]:
    """What names start from, and every entry in the order of names.

    Args:
        path: A folder of class folders, one of folders train, val and test of them, or a CSV file.
        columns: Of the CSV file.

    Raises:
        DataError: There is nothing at the path, or it cannot be read.
    """
    if path.is_dir():
        found = list(_list_directory(path))
        if not found:
            raise DataError(f"'{escape_name(path)}' is empty", where="DIR", fix="name a folder that holds pictures")
        return path, found
    columns = columns or CsvColumns()
    root = columns.root or path.parent
    listed = find_images_in_csv(
        path,
        image=columns.image,
        label=columns.label,
        split=columns.split,
        root=root,
        where="DIR|CSV",
        keep_missing=True,
    )
    divided = set(listed.by_split) != {"train"}
    return root, [
        DataFile(name, split if divided else "", label)
        for split, listing in listed.by_split.items()
        for name, label in zip(listing.names, _class_names(listing.classes, list(listing.class_indices)), strict=True)
    ]


def find_empty_classes(path: Path, files: list[DataFile]) -> list[tuple[str, str]]:
    """Split and label of each class folder in which no file is one that a run would use."""
    if not path.is_dir():
        return []
    used = {(file.split, file.label) for file in files if not file.unused_reason}
    splits = find_split_folders(path, Counter(), [], where="DIR")
    divided = splits != {"train": ""}
    known = [
        (split if divided else "", escape_name(entry.name))
        for split, below in splits.items()
        for entry in sorted(os.scandir(path / below), key=lambda entry: os.fsencode(entry.name))
        if entry.is_dir() and not entry.name.startswith(".")
    ]
    return [each for each in known if each not in used]


def _class_names(classes: dict[str, int], codes: list[int]) -> Iterator[str]:
    names = list(classes)
    return (names[code] for code in codes)


def _list_directory(root: Path) -> Iterator[DataFile]:
    splits = {below: split for split, below in find_split_folders(root, Counter(), [], where="DIR").items()}
    divided = "" not in splits
    for name, why in _walk(root):
        parts = name.split(os.sep)
        split = splits.get(parts[0], "") if divided else ""
        if divided and not split:
            yield DataFile(name, "", "", why or "it is beside the folders train, val and test")
            continue
        inside = parts[1:] if divided else parts
        label = escape_name(inside[0]) if len(inside) > 1 else ""
        yield DataFile(name, split, label, why or _unused_reason(name, label))


def _unused_reason(name: str, label: str) -> str:
    if os.path.splitext(name)[1].lower() not in EXTENSIONS:
        return "it is no picture by its name"
    return "" if label else "it is in no class's folder"


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """The name of every entry that is no folder, hidden ones apart, and why it cannot be used, if that is plain.

    Links to folders are followed, each folder entered once.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            status = os.stat(root / below)
            entries = sorted(os.scandir(root / below), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            yield below or ".", f"it cannot be read: {error.strerror}"
            continue
        if (status.st_dev, status.st_ino) in seen:
            yield below, "it is a link to a folder that was looked at already"
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        for entry in entries:
            name = os.path.join(below, entry.name)
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                folders.append(name)
            else:
                yield name, _special_file_reason(root / name)
        waiting += folders[::-1]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _special_file_reason(path: Path) -> str:
    """Why an entry cannot be used, where its kind says so."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        link = "it is a link that leads nowhere" if path.is_symlink() else "it cannot be read"
        return f"{link}: {error.strerror}"
    if stat.S_ISREG(mode):
        return ""
    return "it is a FIFO, not a file" if stat.S_ISFIFO(mode) else "it is a device or a socket, not a file"
