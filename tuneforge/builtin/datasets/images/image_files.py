"""Paths and classes of images, from folders or from a CSV file. Opens no image."""

from __future__ import annotations

import heapq
import itertools
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from tuneforge import DataError
from tuneforge.builtin.datasets.images.sample_names import EscapedNames, LazyPaths, PackedStrings
from tuneforge.errors import escape_name, suggest_name
from tuneforge.plugin import IMAGE_EXTENSIONS, SPLIT_NAMES, SYSTEM_FOLDERS, TableFile

_FOLDER, _IMAGE = "folder", "image"
_HIDDEN, _NOT_AN_IMAGE, _BROKEN, _ALREADY_SEEN, _LINKED = (
    "hidden",
    "not an image file by its extension",
    "a broken link or not a file",
    "a folder linked twice",
    "a link to another place in the same data, whose images are listed there",
)


@attrs.frozen(eq=False)
class ImageList:
    """Images of one split, or of all data before it is split; millions of entries fit in memory.

    Args:
        root: Folder that the names are relative to.
        names: Path of each image, relative to `root`.
        class_indices: Class of each image, an index into `classes`.
        classes: Index of each class name, in order of first occurrence.
    """

    root: Path
    names: PackedStrings = attrs.field(factory=PackedStrings)
    class_indices: array[int] = attrs.field(factory=lambda: array("q"))
    classes: dict[str, int] = attrs.field(factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def append(self, name: str, label: str) -> None:
        """Add a image."""
        self.names.append(name)
        self.class_indices.append(self.classes.setdefault(label, len(self.classes)))

    @property
    def paths(self) -> LazyPaths:
        """Return the path of each image."""
        return LazyPaths(self.root, self.names)

    @property
    def ids(self) -> EscapedNames:
        """Return a stable id of each image."""
        return EscapedNames(self.names)


@attrs.frozen
class ImageIndex:
    """Images listed by a folder or a CSV file.

    Args:
        by_split: Images by split; only `train` where the data is not split.
        notes: Sentences about skipped files.
    """

    by_split: dict[str, ImageList]
    notes: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """Return the folder that names are relative to."""
        return next(iter(self.by_split.values())).root


def find_images_in_folder(root: Path, *, where: str) -> ImageIndex:
    """Return the images of a folder: one folder per class, or folders train, val and test of these.

    Args:
        root: The folder.
        where: Option that names the folder, for messages.

    Raises:
        DataError: The folder is missing or has no class, or a class has no image.
    """
    if not root.is_dir():
        raise DataError(
            f"there is no folder '{escape_name(root)}'",
            where=where,
            why="it is a file" if root.exists() else "nothing exists at that path",
            fix="name a folder with one folder of images per class",
        )
    skipped: Counter[str] = Counter()
    notes: list[str] = []
    parts: dict[str, ImageList] = {}
    seen: dict[tuple[int, int], str] = {}
    for split, name in find_split_folders(root, skipped, notes, where=where).items():
        listing = _list_class_folders(root, name, split, skipped, notes, seen, where=where)
        if listing is not None:
            parts[split] = listing
    found = ImageIndex(parts, (*notes, *_make_skip_notes(skipped)))
    _check_not_parent(root, found, where=where)
    return found


def find_images_in_csv(
    path: Path, *, image: str, label: str, split: str, root: Path, where: str, keep_missing: bool = False
) -> ImageIndex:
    """Return the images that a CSV file lists, one per row.

    Args:
        path: The file, with a header.
        image: Column of paths.
        label: Column of class names.
        split: Column of splits; optional in the file.
        root: Folder that paths are relative to.
        where: Option that names the file, for messages.
        keep_missing: Also list files that do not exist.

    Raises:
        DataError: The file is missing or broken, a column is missing, a value is empty, or a image does not exist.
    """
    table = TableFile(path, columns=(image, label, split), keep_bytes=True, where=where)
    for needed in (image, label):
        _require_column(needed, table.header, path, where)
    return ImageIndex(_group_by_split(table, (image, label, split), root, path, keep_missing=keep_missing), table.notes)


def find_split_folders(root: Path, skipped: Counter[str], notes: list[str], *, where: str) -> dict[str, str]:
    """Return the folder name of each split; an empty name for `train` where the data is not split.

    A folder named train is a split if it holds folders and no image; otherwise it is a class of that name.

    Args:
        root: Folder of the data.
        skipped: Counts of skipped entries by reason, updated in place.
        notes: Sentences about skipped entries, extended in place.
        where: Option that names the folder, for messages.

    Raises:
        DataError: Two folders name the same split, or the root cannot be read.
    """
    found: Counter[str] = Counter()
    names = [name for name, kind in _scan_directory(root, root, found) if kind == _FOLDER]
    trains = [name for name in names if _parse_split_name(name) == "train"]
    if len(trains) != 1 or not _holds_only_folders(root, root / trains[0]):
        return {"train": ""}
    skipped[_HIDDEN] += found[_HIDDEN]
    skipped[_NOT_AN_IMAGE] += sum(kind != _FOLDER for _, kind in _scan_directory(root, root, Counter()))
    strange = [escape_name(name) for name in names if _parse_split_name(name) is None]
    if strange:
        notes.append(f"skipped folders beside train, val and test: {', '.join(strange)}")
    splits = [(split, name) for name in names if (split := _parse_split_name(name)) is not None]
    twice = [split for split, count in Counter(split for split, _ in splits).items() if count > 1]
    if twice:
        both = " and ".join(f"'{escape_name(name)}'" for split, name in splits if split == twice[0])
        raise DataError(f"{both} both name the split {twice[0]}", where=where, fix="keep one of the folders")
    return dict(splits)


def _parse_split_name(name: str) -> str | None:
    return SPLIT_NAMES.get(name.lower())


def _holds_only_folders(root: Path, folder: Path) -> bool:
    kinds = {kind for _, kind in _scan_directory(root, folder, Counter())}
    return _FOLDER in kinds and _IMAGE not in kinds


def _list_class_folders(
    root: Path,
    below: str,
    split: str,
    skipped: Counter[str],
    notes: list[str],
    seen: dict[tuple[int, int], str],
    *,
    where: str,
) -> ImageList | None:
    """Return the images of the class folders in `below`; None if a split other than train has none."""
    listing, folder = ImageList(root), root / below
    counts: dict[str, int] = {}
    loose, num_links = 0, skipped[_LINKED]
    for name, kind in _scan_directory(root, folder, skipped):
        if kind == _FOLDER:
            before, label = len(listing), escape_name(name)
            for image in _find_images_below(root, place := os.path.join(below, name), skipped, seen, place):
                listing.append(image, label)
            counts[label] = len(listing) - before
        elif kind == _IMAGE:
            loose += 1
        else:
            skipped[_NOT_AN_IMAGE] += 1
    if not len(listing):
        if split != "train":
            notes.append(f"skipped '{escape_name(folder)}', which has no class folder with images")
            return None
        raise _no_classes_error(folder, loose, counts, where=where)
    if loose:
        notes.append(f"skipped {_pluralize(loose, 'image')} outside of class folders in '{escape_name(folder)}'")
    empty = [name for name, count in counts.items() if not count]
    if empty and split == "train":
        only_links = skipped[_LINKED] > num_links
        raise DataError(
            f"class '{empty[0]}' has no images" + (f", nor have {len(empty) - 1} more" if len(empty) > 1 else ""),
            where=escape_name(folder / empty[0]),
            why=f"{_LINKED}: {skipped[_LINKED] - num_links}"
            if only_links
            else f"no file in it ends in {', '.join(sorted(IMAGE_EXTENSIONS))}",
            fix=_suggest_inner_folder(root, below, [name for name, count in counts.items() if count])
            or "add images to the folder or remove it",
        )
    return listing


def _check_not_parent(root: Path, found: ImageIndex, *, where: str) -> None:
    """Check that a folder with one class is not the folder that holds the data.

    Raises:
        DataError: The only class folder holds class folders, or splits of these.
    """
    classes = list(found.by_split["train"].classes)
    if len(found.by_split) == 1 and (fix := _suggest_inner_folder(root, "", classes)):
        raise DataError(
            f"there is only one class, '{classes[0]}'",
            where=where,
            why=f"'{escape_name(root)}' holds one folder with images, and the folders in that look like the classes",
            fix=fix,
        )


def _suggest_inner_folder(root: Path, below: str, names: list[str]) -> str:
    """Return advice to name the only folder that has images, if it holds two folders or more and no image."""
    inner = root / below / names[0] if len(names) == 1 else root
    if inner == root or not inner.is_dir() or not _holds_only_folders(root, inner):
        return ""
    folders = [name for name, kind in _scan_directory(root, inner, Counter()) if kind == _FOLDER]
    listed = ", ".join(map(escape_name, folders[:5])) + (", ..." if len(folders) > 5 else "")
    return f"name the folder '{escape_name(inner)}', which holds {listed}" if len(folders) > 1 else ""


def _no_classes_error(folder: Path, loose: int, classes: Iterable[str], *, where: str) -> DataError:
    if loose:
        why = f"{_pluralize(loose, 'image')} directly in it, so their class is unknown"
    elif classes:
        why = f"its folders hold no file that ends in {', '.join(sorted(IMAGE_EXTENSIONS))}"
    else:
        why = "the folder is empty"
    return DataError(
        f"'{escape_name(folder)}' has no class folder with images",
        where=where,
        why=why,
        fix="create one folder of images per class",
    )


def _scan_directory(root: Path, folder: Path, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield name and kind of the entries of a folder, without hidden ones, sorted by the bytes of their names.

    A link to what the data lists at another place is left out: an image has the label of the folder it lies in.
    """
    names: dict[str, list[bytes]] = {}
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if _is_hidden(entry.name):
                    skipped[_HIDDEN] += 1
                elif entry.is_symlink() and _is_listed_elsewhere(root, entry.path):
                    skipped[_LINKED] += 1
                else:  # only bytes, because a million DirEntry objects would fill memory
                    names.setdefault(_classify_entry(entry), []).append(os.fsencode(entry.name))
    except OSError as error:
        raise DataError(
            f"cannot read the folder '{escape_name(folder)}'", why=error.strerror or "", fix="check its permissions"
        ) from None
    in_order = [zip(sorted(each), itertools.repeat(kind), strict=False) for kind, each in names.items()]
    return ((os.fsdecode(name), kind) for name, kind in heapq.merge(*in_order))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _is_listed_elsewhere(root: Path, link: str) -> bool:
    """Return True if a link leads to the data's folder itself, or to an entry of it that is not hidden."""
    top, target = os.path.realpath(root), os.path.realpath(link)
    inside = os.path.relpath(target, top)
    if not os.path.exists(target) or (inside.startswith(os.pardir) and os.path.commonpath([top, target]) != target):
        return False
    return not any(map(_is_hidden, Path(inside).parts)) or inside.startswith(os.pardir)


def _classify_entry(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return _FOLDER
        if not entry.is_file():
            return _BROKEN
    except OSError:  # a loop of links
        return _BROKEN
    return _IMAGE if os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS else _NOT_AN_IMAGE


def _find_images_below(
    root: Path, below: str, skipped: Counter[str], seen: dict[tuple[int, int], str], class_folder: str
) -> Iterator[str]:
    """Yield names of the images below a folder, recursively; links are followed, each folder is entered once.

    Raises:
        DataError: Two class folders link to the same folder, so that its images would have two labels.
    """
    status = (root / below).stat()
    key = (status.st_dev, status.st_ino)
    if key in seen:
        if seen[key] != class_folder:
            raise DataError(
                f"'{escape_name(seen[key])}' and '{escape_name(class_folder)}' hold the same images",
                where=escape_name(root / below),
                why="it is, or leads to, a folder that both link to",
                fix="remove one of the links",
            )
        skipped[_ALREADY_SEEN] += 1
        return
    seen[key] = class_folder
    for name, kind in _scan_directory(root, root / below, skipped):
        if kind == _FOLDER:
            yield from _find_images_below(root, os.path.join(below, name), skipped, seen, class_folder)
        elif kind == _IMAGE:
            yield os.path.join(below, name)
        else:
            skipped[kind] += 1


def _make_skip_notes(skipped: Counter[str]) -> list[str]:
    return [
        f"skipped because {reason}: {_pluralize(count, 'entry')}" for reason, count in sorted(skipped.items()) if count
    ]


def _pluralize(count: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count:,} {noun if count == 1 else plural}"


def _require_column(name: str, columns: list[str], path: Path, where: str) -> None:
    if name in columns:
        return
    raise DataError(
        f"'{escape_name(path)}' has no column '{name}'",
        where=where,
        why=f"its header has {', '.join(map(escape_name, columns)) or 'no columns'}",
        fix=f"{suggest_name(name, columns)} --data.image and --data.label name the columns",
    )


def _group_by_split(
    table: TableFile, columns: tuple[str, str, str], root: Path, path: Path, *, keep_missing: bool
) -> dict[str, ImageList]:
    """Return the rows by split."""
    grouped: dict[str, ImageList] = {}
    first_missing: tuple[int, str] | None = None
    missing = count = 0
    for line, cells, error in table.rows():
        count += 1
        image, label, split = (cells.get(column, "") for column in columns)
        if error is not None and (not cells or (image and label)):
            raise error
        if not image.strip() or not label.strip():
            raise DataError(
                f"row at line {line} has no {'label' if image.strip() else 'path'}",
                where=escape_name(path),
                fix="give every row a path and a label, or remove it",
            )
        name = _parse_split_name(split.strip()) if columns[2] in table.header else "train"
        if name is None:
            raise DataError(
                f"row at line {line} has the split '{escape_name(split)}'",
                where=escape_name(path),
                fix="write train, val or test",
            )
        image = table.find_file_name(root, image)
        if not keep_missing and not (root / image).is_file():
            missing += 1
            first_missing = first_missing or (line, image)
        grouped.setdefault(name, ImageList(root)).append(image, escape_name(label.strip()))
    if first_missing is not None:
        raise DataError(
            f"{_pluralize(missing, 'image')} of {count:,} do not exist, the first: '{escape_name(first_missing[1])}'",
            where=f"{escape_name(path)}, line {first_missing[0]}",
            why=f"paths are relative to '{escape_name(root)}'",
            fix="correct the paths, or name another folder with --data.root",
        )
    return grouped
