"""Read texts and labels from a CSV file or from folders of text files, with or without splits."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tuneforge import DataError
from tuneforge.errors import suggest_name
from tuneforge.plugin import TableFile

SPLITS = ("train", "val", "test")
_WHERE = "--data.path"


class TextSplit(NamedTuple):
    """The texts of one split, or all texts if the data has no splits yet.

    Args:
        texts: The texts.
        labels: The label of each text.
        ids: The source of each text: the path of its file, or a file name and a line number.
    """

    texts: list[str]
    labels: list[str]
    ids: list[str]


def read_texts(path: Path, *, text: str, label: str, delimiter: str | None, max_chars: int) -> dict[str, TextSplit]:
    """Read all texts by split; the only split is `train` if the data has no splits yet.

    A file is read as CSV. A folder contains train.csv (and val.csv, test.csv), or folders train (and val, test) with a
    folder of .txt files for each class, or such folders of classes directly.

    Args:
        path: The file or the folder.
        text: Column of the text.
        label: Column of the label.
        delimiter: Character between the cells of a row; None detects it.
        max_chars: Maximum length of a text, in characters.

    Raises:
        DataError: Nothing of these is at the path, or a text cannot be used; the message names file and line.
    """
    if path.is_file():
        return {"train": _read_csv(path, text, label, delimiter, max_chars)}
    if not path.is_dir():
        raise DataError(f"there is no file or folder '{path}'", where=_WHERE, fix="check the path")
    tables = {split: path / f"{split}.csv" for split in SPLITS if (path / f"{split}.csv").is_file()}
    if "train" in tables:
        return {split: _read_csv(each, text, label, delimiter, max_chars) for split, each in tables.items()}
    folders = {split: path / split for split in SPLITS if (path / split).is_dir()}
    if "train" in folders:
        return {split: _read_folder(each, max_chars) for split, each in folders.items()}
    return {"train": _read_folder(path, max_chars)}


def _read_csv(path: Path, text: str, label: str, delimiter: str | None, max_chars: int) -> TextSplit:
    result = TextSplit([], [], [])
    table = TableFile(path, delimiter=delimiter, columns=(text, label), where=_WHERE)
    for column in (text, label):
        if column not in table.header:
            raise DataError(f"there is no column '{column}'", where=str(path), fix=suggest_name(column, table.header))
    for line, cells, error in table.rows():
        if error is not None:
            raise error
        where = f"{path}, line {line}"
        result.texts.append(_check_cell(cells[text], where, max_chars, what="text"))
        result.labels.append(_check_cell(cells[label], where, max_chars, what="label").strip())
        result.ids.append(f"{path.name}:{line}")
    return result


def _read_folder(path: Path, max_chars: int) -> TextSplit:
    result = TextSplit([], [], [])
    classes = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    for folder in classes:
        for file in sorted(folder.rglob("*.txt")):
            result.texts.append(_check_cell(_read_file(file, max_chars), str(file), max_chars, what="text"))
            result.labels.append(folder.name)
            result.ids.append(str(file.relative_to(path)))
    if not result.texts:
        raise DataError(
            f"there is no text in '{path}'",
            where=_WHERE,
            why=f"it has {len(classes)} folder(s), and no .txt file in any",
            fix="give a folder of .txt files for each class, or a CSV file",
        )
    return result


def _read_file(file: Path, max_chars: int) -> str:
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return opened.read(max_chars + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read '{file}'", why=str(error), fix="give text files in UTF-8") from None


def _check_cell(cell: str, where: str, max_chars: int, *, what: str) -> str:
    if not cell.strip():
        raise DataError(
            f"there is no {what}", where=where, why="a sample needs a text and a label", fix="fill or remove it"
        )
    if len(cell) > max_chars:
        raise DataError(f"a {what} is too long", where=where, why=f"at most {max_chars:,} characters are read")
    return cell
