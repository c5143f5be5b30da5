"""Which pictures there are and what class each is of: from folders, or from a CSV file. Opens no picture."""

from __future__ import annotations

import csv
import difflib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from tuneforge import DataError
from tuneforge.builtin.names import shown

EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Names of folders and values of a column, and the split that each means."""

_HIDDEN, _FOREIGN, _BROKEN, _SEEN = "hidden", "no picture by name", "a broken link or no file", "a folder linked twice"


@attrs.frozen
class Listing:
    """Pictures of one split, or of all of them where they are not divided yet.

    Args:
        paths: One a picture.
        labels: The class of each, by name.
        ids: A stable name of each, as text.
    """

    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


@attrs.frozen
class Found:
    """What a folder or a file lists.

    Args:
        parts: By split; the one split `train` where they are not divided yet.
        notes: Sentences on what was left out.
    """

    parts: dict[str, Listing]
    notes: tuple[str, ...] = ()


def find_folder(root: Path, *, where: str) -> Found:
    """Pictures under a folder: one folder a class, or folders train, val and test of them.

    Args:
        root: The folder.
        where: The option that named it, for messages.

    Raises:
        DataError: It is missing, holds no class, or a class holds no picture.
    """
    if not root.is_dir():
        raise DataError(
            f"there is no folder '{shown(root)}'",
            where=where,
            why="it is a file" if root.exists() else "nothing exists at that path",
            fix="name a folder that holds one folder of pictures a class",
        )
    skipped: Counter[str] = Counter()
    notes: list[str] = []
    parts: dict[str, Listing] = {}
    for split, folder in _split_folders(root, skipped, notes, where=where).items():
        listing = _listed(folder, root, split, skipped, notes, where=where)
        if listing is not None:
            parts[split] = listing
    return Found(parts, (*notes, *_skip_notes(skipped)))


def find_csv(path: Path, *, image: str, label: str, split: str, root: Path, where: str) -> Found:
    """Pictures that a CSV file names, a row each.

    Args:
        path: The file; its first row names the columns.
        image: Column of paths.
        label: Column of class names.
        split: Column of splits; where the file has none, they are not divided yet.
        root: What relative paths start from.
        where: The option that named the file, for messages.

    Raises:
        DataError: The file is missing or broken, a column is missing, a value is empty, or a picture does not exist.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=first.count))
            columns = list(reader.fieldnames or ())
            for needed in (image, label):
                _require_column(needed, columns, path, where)
            rows = [(reader.line_num, row[image], row[label], row.get(split)) for row in reader]
    except (OSError, csv.Error) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read '{shown(path)}'", where=where, why=why, fix="name a CSV file") from None
    if not rows:
        raise DataError(f"'{shown(path)}' has no rows", where=where, fix="add a row a picture below the first")
    return Found(_by_split(rows, root, path, divided=split in columns, where=where))


def _split_folders(root: Path, skipped: Counter[str], notes: list[str], *, where: str) -> dict[str, Path]:
    """The folder of each split; the root alone where pictures are not divided.

    A folder called train is a split where it holds folders and no picture; else it is the class of that name.
    """
    folders = {entry.name.lower(): Path(entry.path) for entry in _entries(root, Counter()) if entry.is_dir()}
    trains = [folder for name, folder in folders.items() if SPLITS.get(name) == "train"]
    if len(trains) != 1 or not _holds_only_folders(trains[0]):
        return {"train": root}
    for entry in _entries(root, skipped):
        if not entry.is_dir():
            skipped[_FOREIGN] += 1
    strange = [shown(folder.name) for name, folder in folders.items() if name not in SPLITS]
    if strange:
        notes.append(f"left out beside train, val and test: {', '.join(strange)}")
    splits = [(SPLITS[name], folder) for name, folder in folders.items() if name in SPLITS]
    twice = [split for split, count in Counter(split for split, _ in splits).items() if count > 1]
    if twice:
        names = " and ".join(f"'{folder.name}'" for split, folder in splits if split == twice[0])
        raise DataError(f"{names} both mean the split {twice[0]}", where=where, fix="keep one of the folders")
    return dict(splits)


def _holds_only_folders(folder: Path) -> bool:
    entries = list(_entries(folder, Counter()))
    return any(entry.is_dir() for entry in entries) and not any(_is_picture(entry) for entry in entries)


def _listed(
    folder: Path, root: Path, split: str, skipped: Counter[str], notes: list[str], *, where: str
) -> Listing | None:
    """Pictures of one folder of class folders; None where a folder other than that of training has none."""
    classes: dict[str, list[Path]] = {}
    loose: list[Path] = []
    for entry in _entries(folder, skipped):
        if entry.is_dir():
            classes[shown(entry.name)] = list(_below(Path(entry.path), skipped, set()))
        elif _is_picture(entry):
            loose.append(Path(entry.path))
        else:
            skipped[_FOREIGN] += 1
    if not any(classes.values()):
        if split != "train":
            notes.append(f"left out '{shown(folder)}', because it holds no class of pictures")
            return None
        raise _no_classes(folder, loose, classes, where=where)
    if loose:
        notes.append(f"left out, because in no class's folder: {_counted(len(loose), 'picture')} in '{shown(folder)}'")
    empty = [name for name, paths in classes.items() if not paths]
    if empty and split == "train":
        raise DataError(
            f"class '{empty[0]}' has no pictures" + (f", nor have {len(empty) - 1} more" if len(empty) > 1 else ""),
            where=shown(folder / empty[0]),
            why=f"no file in it ends in {', '.join(sorted(EXTENSIONS))}",
            fix="add pictures to the folder or remove it",
        )
    pairs = [(path, name) for name, paths in classes.items() for path in paths]
    return Listing(
        paths=tuple(path for path, _ in pairs),
        labels=tuple(name for _, name in pairs),
        ids=tuple(shown(path.relative_to(root)) for path, _ in pairs),
    )


def _no_classes(folder: Path, loose: list[Path], classes: Iterable[str], *, where: str) -> DataError:
    if loose:
        why = f"pictures lie directly in it ({len(loose):,}), so their class is unknown"
    elif classes:
        why = "its folders hold no file that ends as a picture does"
    else:
        why = "the folder is empty"
    return DataError(
        f"'{shown(folder)}' holds no class of pictures", where=where, why=why, fix="make one folder of pictures a class"
    )


def _entries(folder: Path, skipped: Counter[str]) -> Iterator[os.DirEntry[str]]:
    """What a folder holds, hidden things left out, in the order of the names' bytes on every file system."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise DataError(
            f"cannot read the folder '{shown(folder)}'", why=error.strerror or "", fix="check its permissions"
        ) from None
    for entry in entries:
        if entry.name.startswith("."):
            skipped[_HIDDEN] += 1
        else:
            yield entry


def _below(folder: Path, skipped: Counter[str], seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Pictures under a folder at any depth; links are followed, each folder is entered once."""
    status = folder.stat()
    key = (status.st_dev, status.st_ino)
    if key in seen:
        skipped[_SEEN] += 1
        return
    seen.add(key)
    for entry in _entries(folder, skipped):
        if entry.is_dir():
            yield from _below(Path(entry.path), skipped, seen)
        elif not entry.is_file():
            skipped[_BROKEN] += 1
        elif _is_picture(entry):
            yield Path(entry.path)
        else:
            skipped[_FOREIGN] += 1


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() and os.path.splitext(entry.name)[1].lower() in EXTENSIONS


def _skip_notes(skipped: Counter[str]) -> list[str]:
    return [f"left out, because {reason}: {_counted(count, 'entry')}" for reason, count in sorted(skipped.items())]


def _counted(count: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count:,} {noun if count == 1 else plural}"


def _require_column(name: str, columns: list[str], path: Path, where: str) -> None:
    if name in columns:
        return
    near = difflib.get_close_matches(name, columns, n=1)
    raise DataError(
        f"'{shown(path)}' has no column '{name}'",
        where=where,
        why=f"its first row names {', '.join(map(shown, columns)) or 'nothing'}",
        fix=f"did you mean '{near[0]}'?" if near else "name the column with --data.image or --data.label",
    )


def _by_split(
    rows: list[tuple[int, str | None, str | None, str | None]], root: Path, path: Path, *, divided: bool, where: str
) -> dict[str, Listing]:
    """The rows as listings."""
    grouped: dict[str, list[tuple[Path, str, str]]] = {}
    missing: list[tuple[int, str]] = []
    for line, image, label, split in rows:
        if not image or not label or not image.strip() or not label.strip():
            raise DataError(
                f"row at line {line} has no {'path' if not image else 'label'}",
                where=shown(path),
                fix="give every row a path and a label, or remove it",
            )
        if divided and SPLITS.get((split or "").strip().lower()) is None:
            raise DataError(
                f"row at line {line} has the split '{shown(split or '')}'",
                where=shown(path),
                fix="write train, val or test",
            )
        if not (root / image).is_file():
            missing.append((line, image))
        name = SPLITS[(split or "").strip().lower()] if divided else "train"
        grouped.setdefault(name, []).append((root / image, shown(label.strip()), shown(image)))
    if missing:
        raise DataError(
            f"{_counted(len(missing), 'picture')} of {len(rows):,} do not exist, the first: '{shown(missing[0][1])}'",
            where=f"{shown(path)}, line {missing[0][0]}",
            why=f"relative paths start from '{shown(root)}'",
            fix="correct the paths, or name another start with --data.root",
        )
    return {name: Listing(*map(tuple, zip(*found, strict=True))) for name, found in grouped.items()}
