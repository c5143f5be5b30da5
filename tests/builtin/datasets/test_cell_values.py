"""What a cell holds: numbers are what tables write, and nothing that only Python reads as one."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from tuneforge.builtin.datasets.tables.cell_values import (
    detect_decimal,
    is_code,
    is_missing,
    parse_number,
    parse_truth_value,
    to_text,
)


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        *[("1", 1), (" -1.5 ", -1.5), ("+2", 2), ("1e3", 1000), (".5", 0.5), ("5.", 5), ("0", 0), ("0.50", 0.5)],
        *[("1_000", None), ("007", None), ("-012", None), ("1,5", None), ("1,234", None), ("12%", None), ("inf", None)],
        *[("nan", None), ("", None), ("0x1f", None), ("\u0661", None), ("1e39", None), ("9" * 400, None)],
        *[(1, 1), (10**400, None), (np.int64(3), 3), (np.float32(0.5), 0.5), (Decimal("1.5"), 1.5)],
        *[(np.array(3.0), 3), (True, None), (np.bool_(1), None), (1j, None), (None, None), (pd.NA, None)],
    ],
)
def test_a_number_is_what_tables_write_and_float32_holds(cell, number):
    assert parse_number(cell) == number


@pytest.mark.parametrize(
    ("cell", "with_point", "with_comma"),
    [
        ("1,234", 1234, 1.234),
        ("1.234", 1.234, 1234),
        ("1,234.5", 1234.5, None),
        ("1.234,5", None, 1234.5),
        ("1,5", None, 1.5),
        ("1.5", 1.5, 1.5),
        ("1\xa0234", 1234, 1234),
        ("1'234'567", 1234567, 1234567),
        ("1 234", None, None),
        ("0,123,456", None, None),
    ],
)
def test_the_decimal_mark_decides_what_groups_thousands(cell, with_point, with_comma):
    assert (parse_number(cell, "."), parse_number(cell, ",")) == (with_point, with_comma)


@pytest.mark.parametrize(
    ("cells", "delimiter", "mark"),
    [
        (["1,5", "2", "x"], ",", ","),
        (["1.5", "1,234"], ";", ""),
        (["1.5", "2.5", "1,5"], ";", "."),
        (["1,234"], ";", ","),
        (["1,234"], "\t", ""),
        (["1.234", "7", 1.5, None], ";", ""),
    ],
)
def test_the_decimal_mark_is_detected_where_cells_decide_it(cells, delimiter, mark):
    assert detect_decimal(cells, delimiter) == mark


@pytest.mark.parametrize(
    "cell", [None, "", " NA ", "NaN", "#N/A", "#DIV/0!", float("nan"), np.float32("nan"), pd.NA, pd.NaT]
)
def test_missing_values_of_spreadsheets_numpy_and_pandas(cell):
    assert is_missing(cell)
    assert cell is None or isinstance(cell, str) or to_text(cell) == ""


def test_further_missing_values_are_texts_or_numbers():
    assert all(is_missing(cell, ("-99999", "unknown")) for cell in ("-99999", -99999, "-99999.0", " unknown"))
    assert not any(is_missing(cell, ("-99999", "unknown")) for cell in ("99999", 0, "x", False))


def test_codes_and_truth_values():
    assert [is_code(cell) for cell in ("00012", "0", "012.5", 12)] == [True, False, False, False]
    assert {parse_truth_value(cell) for cell in ("true", "TRUE", True, np.bool_(True), "yes", 1, "Wahr")} == {True}
    assert {parse_truth_value(cell) for cell in ("False", False, "n", 0, "faux")} == {False}
    assert parse_truth_value("maybe") is None
