"""List every file of an image folder or a CSV file with its split and its label, including files that a run ignores."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import attrs

from tuneforge import DataError
from tuneforge.errors import escape_name, suggest_name
from tuneforge.plugin import IMAGE_EXTENSIONS, SPLIT_NAMES, SYSTEM_FOLDERS, TableFile, TableRow


@attrs.frozen
class DataFile:
    """One file of the data.

    Args:
        name: Path relative to the root, as the file system has it.
        split: `train`, `val` or `test`; empty if the data has no splits yet.
        label: Name of its class; empty if it is in no class folder.
        unused_reason: Why a run would ignore the file; empty if a run would use it.
    """

    name: str
    split: str
    label: str
    unused_reason: str = ""

    @property
    def id(self) -> str:
        """The name with unprintable characters escaped."""
        return escape_name(self.name)


@attrs.frozen
class CsvColumns:
    """Names of the columns of a CSV file.

    Args:
        image: Column of image paths.
        label: Column of class names.
        split: Column of splits.
        root: Directory that relative paths start from; None for the directory of the CSV file.
    """

    image: str = "path"
    label: str = "label"
    split: str = "split"
    root: Path | None = None


def list_files(path: Path, columns: CsvColumns | None = None) -> tuple[Path, list[DataFile]]:
    """List every file, without opening any.

    Args:
        path: A folder of class folders, a folder with folders train, val and test of class folders, or a CSV file.
        columns: Names of the columns of the CSV file.

    Returns:
        The directory that names are relative to, and the files sorted by name (of a CSV file: in the order of rows,
        grouped by split).

    Raises:
        DataError: Nothing exists at the path, or it cannot be read.
    """
    if path.is_dir():
        files = list(_list_directory(path))
        if not files:
            raise DataError(f"'{escape_name(path)}' is empty", where="DIR", fix="name a folder that contains images")
        return path, files
    columns = columns or CsvColumns()
    return columns.root or path.parent, _list_csv(path, columns)


def find_empty_classes(path: Path, files: list[DataFile]) -> list[tuple[str, str]]:
    """Return split and label of each class folder that contains no file that a run would use."""
    if not path.is_dir():
        return []
    used = {(file.split, file.label) for file in files if not file.unused_reason}
    splits = find_split_folders(path)
    has_splits = splits != {"train": ""}
    known = [
        (split if has_splits else "", escape_name(entry.name))
        for split, folder in splits.items()
        for entry in sorted(os.scandir(path / folder), key=lambda entry: os.fsencode(entry.name))
        if entry.is_dir() and not _is_hidden(entry.name)
    ]
    return [each for each in known if each not in used]


def find_split_folders(root: Path) -> dict[str, str]:
    """Map each split to the name of its folder; `{"train": ""}` if the images are not divided into splits.

    A folder named train is a split if it contains folders and no image; otherwise it is the class of that name.

    Raises:
        DataError: Two folders name the same split, or the root cannot be read.
    """
    folders = [entry.name for entry in _scan_directory(root) if _is_folder(entry)]
    by_split: dict[str, list[str]] = {}
    for name in folders:
        if split := SPLIT_NAMES.get(name.lower()):
            by_split.setdefault(split, []).append(name)
    trains = by_split.get("train", [])
    if len(trains) != 1 or not _contains_only_class_folders(root / trains[0]):
        return {"train": ""}
    for split, names in by_split.items():
        if len(names) > 1:
            both = " and ".join(f"'{escape_name(name)}'" for name in names)
            raise DataError(f"{both} both name the split {split}", where="DIR", fix="keep one of the folders")
    return {split: names[0] for split, names in by_split.items()}


def _contains_only_class_folders(folder: Path) -> bool:
    entries = list(_scan_directory(folder))
    return any(map(_is_folder, entries)) and not any(_is_image(entry) for entry in entries)


def _scan_directory(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries that are not hidden, sorted by the bytes of their names."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if not _is_hidden(entry.name)),
                key=lambda entry: os.fsencode(entry.name),
            )
    except OSError as error:
        raise DataError(
            f"cannot read the folder '{escape_name(folder)}'", why=error.strerror or "", fix="check its permissions"
        ) from None


def _list_csv(path: Path, columns: CsvColumns) -> list[DataFile]:
    expected = (columns.image, columns.label, columns.split)
    table = TableFile(path, columns=expected, keep_bytes=True, where="DIR|CSV")
    for column in (columns.image, columns.label):
        _require_column(column, table.header, path)
    files = [_parse_row(row, table, path, columns) for row in table.rows()]
    order = {split: number for number, split in enumerate(dict.fromkeys(file.split for file in files))}
    files.sort(key=lambda file: order[file.split])
    return files if set(order) != {"train"} else [attrs.evolve(file, split="") for file in files]


def _parse_row(row: TableRow, table: TableFile, path: Path, columns: CsvColumns) -> DataFile:
    line, cells, error = row
    image, label, text = (cells.get(column, "") for column in (columns.image, columns.label, columns.split))
    if error is not None and (not cells or (image and label)):
        raise error
    if not image.strip() or not label.strip():
        raise DataError(
            f"row at line {line} has no {'label' if image.strip() else 'path'}",
            where=escape_name(path),
            fix="give every row a path and a label, or remove it",
        )
    split = SPLIT_NAMES.get(text.strip().lower()) if columns.split in table.header else "train"
    if split is None:
        raise DataError(
            f"row at line {line} has the split '{escape_name(text)}'",
            where=escape_name(path),
            fix="write train, val or test",
        )
    return DataFile(table.find_file_name(columns.root or path.parent, image), split, escape_name(label.strip()))


def _require_column(name: str, columns: list[str], path: Path) -> None:
    if name not in columns:
        raise DataError(
            f"'{escape_name(path)}' has no column '{name}'",
            where="DIR|CSV",
            why=f"its first row names {', '.join(map(escape_name, columns)) or 'nothing'}",
            fix=f"{suggest_name(name, columns)}; --image and --label name the columns",
        )


def _list_directory(root: Path) -> Iterator[DataFile]:
    split_of_folder = {folder: split for split, folder in find_split_folders(root).items()}
    has_splits = "" not in split_of_folder
    for name, why in _walk(root):
        parts = name.split(os.sep)
        split = split_of_folder.get(parts[0], "") if has_splits else ""
        if has_splits and not split:
            yield DataFile(name, "", "", why or "it is outside the folders train, val and test")
            continue
        inside = parts[1:] if has_splits else parts
        label = escape_name(inside[0]) if len(inside) > 1 else ""
        yield DataFile(name, split, label, why or _unused_reason(name, label))


def _unused_reason(name: str, label: str) -> str:
    if os.path.splitext(name)[1].lower() not in IMAGE_EXTENSIONS:
        return "it has no image file extension"
    return "" if label else "it is not in a class folder"


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of every visible entry that is not a folder, and why it cannot be used if its type says so.

    Links to folders are followed; each folder is entered once.
    """
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(root / folder)
            entries = sorted(os.scandir(root / folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            yield folder or ".", f"it cannot be read: {error.strerror}"
            continue
        if (status.st_dev, status.st_ino) in seen:
            yield folder, "it is a link to a folder that was listed already"
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if _is_hidden(entry.name):
                continue
            if entry.is_symlink() and _is_listed_elsewhere(root, entry.path):
                yield name, "it is a link to another place in the same data"
            elif _is_folder(entry):
                folders.append(name)
            else:
                yield name, _special_file_reason(root / name)
        pending += folders[::-1]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _is_listed_elsewhere(root: Path, link: str) -> bool:
    """Return True if a link leads to the data's folder itself, or to an entry of it that is not hidden."""
    top, target = os.path.realpath(root), os.path.realpath(link)
    inside = os.path.relpath(target, top)
    if not os.path.exists(target) or (inside.startswith(os.pardir) and os.path.commonpath([top, target]) != target):
        return False
    return not any(map(_is_hidden, Path(inside).parts)) or inside.startswith(os.pardir)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file() and os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS
    except OSError:  # a loop of links
        return False


def _special_file_reason(path: Path) -> str:
    """Return why an entry that is not a regular file cannot be used; empty for a regular file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        link = "it is a broken link" if path.is_symlink() else "it cannot be read"
        return f"{link}: {error.strerror}"
    if stat.S_ISREG(mode):
        return ""
    return "it is a FIFO, not a file" if stat.S_ISFIFO(mode) else "it is a device or a socket, not a file"
