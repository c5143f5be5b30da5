"""What a cell of a table holds: a number, a truth value, a code, text or nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

MISSING_VALUES = frozenset(
    {"", "na", "n/a", "nan", "null", "none", "?", "<na>", "nat", "#n/a", "#na", "#null!", "#div/0!", "#num!", "#value!"}
)
"""Cells of a numeric column that stand for a missing value, in any case."""

_MAX_NUMBER = float(np.finfo(np.float32).max)
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_CODE = re.compile(r"[+-]?0\d+", re.ASCII)
_SEPARATORS = {",": "[.\xa0\u202f'\u2019]", ".": "[,\xa0\u202f'\u2019]"}  # of thousands, by decimal mark
_COMMA_NUMBER = re.compile(rf"(?:[+-]?\d{{1,3}}(?:{_SEPARATORS[',']}\d{{3}})+|[+-]?\d+)(?:,\d+)?", re.ASCII)
_POINT_NUMBER = re.compile(rf"[+-]?\d{{1,3}}(?:{_SEPARATORS['.']}\d{{3}})+(?:\.\d+)?", re.ASCII)
_COMMA_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+", re.ASCII)
_POINT_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+", re.ASCII)
_TRUTH_VALUES = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1", "1.0", "wahr", "vrai", "verdadero", "vero"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0", "0.0", "falsch", "faux", "falso"), False),
}  # what spreadsheets write in several languages


def is_missing(cell: Any, further: Collection[str] = ()) -> bool:
    """Return True if a cell stands for a missing number.

    Args:
        cell: Text, a number, or what numpy and pandas write for a missing value.
        further: Further cells that stand for a missing value, as text.
    """
    if is_nothing(cell):
        return True
    text = to_text(cell)
    return text.lower() in MISSING_VALUES or _is_listed(text, further)


def is_nothing(cell: Any) -> bool:
    """Return True for None, an empty text, NaN, and the missing values of pandas."""
    if cell is None or isinstance(cell, str):
        return not (cell or "").strip()
    return type(cell).__name__ in ("NAType", "NaTType") or (
        isinstance(cell, (float, np.floating)) and bool(cell != cell)
    )


def to_text(cell: Any, missing_values: Collection[str] = ()) -> str:
    """Return a cell as text without blanks around it; an empty text if it is missing."""
    try:
        text = "" if is_nothing(cell) else str(cell).strip()
    except ValueError:  # an integer of more digits than Python writes
        text = "a number of thousands of digits"
    return "" if _is_listed(text, missing_values) else text


def parse_number(cell: Any, decimal: str = "") -> float | None:
    """Return the number in a cell, or None if it has none that float32 can hold.

    Text is a number if it is written as one: `1_000` is not, and `00012` is a code.

    Args:
        cell: Text or a number of Python, numpy or another library.
        decimal: Decimal mark of numbers in text, `.` or `,`, where thousands may be grouped by the other one; without
            it, the mark is a point and nothing is grouped.
    """
    if isinstance(cell, str):
        text = cell.strip()
        grouped = {",": _COMMA_NUMBER, ".": _POINT_NUMBER}.get(decimal)
        is_plain = _NUMBER.fullmatch(text) is not None
        if grouped and not (is_plain and decimal == ".") and grouped.fullmatch(text) and not _CODE.fullmatch(text):
            text = re.sub(_SEPARATORS[decimal], "", text).replace(",", ".")
            is_plain = _NUMBER.fullmatch(text) is not None
        if not is_plain:
            return None
        number = float(text)
    elif isinstance(cell, (bool, np.bool_)) or not hasattr(cell, "__float__"):
        return None
    else:
        try:
            number = float(cell)
        except (TypeError, ValueError, OverflowError):
            return None
    return number if abs(number) <= _MAX_NUMBER else None


def is_code(cell: Any) -> bool:
    """Return True for digits with leading zeros, such as a postal code."""
    return isinstance(cell, str) and _CODE.fullmatch(cell.strip()) is not None


def parse_truth_value(cell: Any) -> bool | None:
    """Return the truth value that a cell spells, or None."""
    return _TRUTH_VALUES.get(to_text(cell).lower())


def detect_decimal(cells: Iterable[Any], delimiter: str) -> str:
    """Return the decimal mark that most numbers in text need, `,` or `.`; empty if they leave it open.

    Args:
        cells: Cells of a column, or of a table.
        delimiter: Delimiter of the file. Spreadsheets write `;` where the comma is the decimal mark, so there a number
            such as `1,234` counts as well, which elsewhere may be 1234.
    """
    balance = 0
    for cell in cells:
        text = cell.strip() if isinstance(cell, str) else ""
        if "," in text and _COMMA_NUMBER.fullmatch(text):
            balance += delimiter == ";" or not _COMMA_THOUSANDS.fullmatch(text)
        elif "." in text and not _POINT_THOUSANDS.fullmatch(text):
            balance -= _NUMBER.fullmatch(text) is not None
    return "," if balance > 0 else "." if balance < 0 else ""


def _is_listed(text: str, values: Collection[str]) -> bool:
    """Return True if a text is one of the values, or the same number as one of them."""
    if not values:
        return False
    number = parse_number(text)
    return text in values or (number is not None and number in map(parse_number, values))
