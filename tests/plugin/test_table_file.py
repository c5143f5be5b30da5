"""Every dialect of a table is read alike, and a row that cannot be read is named by its line."""

import json

import pytest

from tuneforge import DataError
from tuneforge.plugin import TableFile, parse_json, read_json_rows

TEXT = 'größe,b\n"1,5","x\ny"\n\n-2,"say ""no"""\n'


def cells(source, **options):
    return [list(row.cells.values()) for row in TableFile(source, **options).rows()]


def errors(source, **options):
    return {row.line: str(row.error) for row in TableFile(source, **options).rows() if row.error}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"]
)
def test_every_encoding_and_line_end_gives_the_same_cells(tmp_path, encoding, end):
    path = tmp_path / "t.csv"
    path.write_bytes(TEXT.replace("\n", end).encode(encoding))
    table = TableFile(path)
    assert table.header == ["größe", "b"]
    assert [(row.line, row.cells) for row in table.rows()] == [
        (2, {"größe": "1,5", "b": f"x{end}y"}),
        (5, {"größe": "-2", "b": 'say "no"'}),
    ]
    assert [len(TableFile(path).notes)] == [encoding in ("cp1252", "latin-1")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_detected(delimiter):
    rows = [["name, first; last", "b"], ["1", "x,y;z|w"], ["2", ""]]
    text = "\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    table = TableFile(text.encode())
    assert table.delimiter == delimiter
    assert table.header == rows[0]
    assert [list(row.cells.values()) for row in table.rows()] == rows[1:]


def test_a_delimiter_is_detected_despite_commas_in_numbers_and_names():
    assert cells(b"width;height\n1,5;2,5\n3,5;4,5\n") == [["1,5", "2,5"], ["3,5", "4,5"]]
    assert cells(b"a, b;y\n1,5;p\n", columns=["y"]) == [["1,5", "p"]]


def test_other_delimiters_are_given_or_named_by_the_first_line():
    assert cells(b"a:b\n1:2\n", delimiter=":") == [["1", "2"]]
    assert cells(b"sep=#\na#b\n1#2\n") == [["1", "2"]]
    assert [row.line for row in TableFile(b"sep=#\na#b\n1#2\n").rows()] == [3]


def test_a_cell_may_be_very_long():
    assert cells(f"a,b\n1,{'x' * 200_000}\n".encode()) == [["1", "x" * 200_000]]


def test_blanks_around_names_and_empty_cells_behind_the_last_column_do_not_count():
    table = TableFile(b" a , b ,,\n1, 2,,\n3,4\n")
    assert table.header == ["a", "b"]
    assert [list(row.cells.values()) for row in table.rows()] == [["1", "2"], ["3", "4"]]


def test_an_unusable_row_is_named_and_the_others_are_read():
    text = b'a,b\n1\n1,2,3\n3,4\n"x" y,2\n5,6\n"open,1\n7,8\n'
    found = errors(text)
    assert list(found) == [2, 3, 5, 7]
    assert found[2].startswith("1 cells under a header of 2; at the table, line 2")
    assert found[3].startswith("3 cells under a header of 2")
    assert "line 7" in found[7]
    assert "correct the quotes" in found[7]
    assert [row.cells["a"] for row in TableFile(text).rows() if not row.error] == ["3", "5"]


def test_a_row_in_another_encoding_than_the_rest_is_named():
    text = "a,b\nä,1\n".encode() + b"\xe4,2\n"
    assert list(errors(text)) == [3]
    assert errors(text, keep_bytes=True) == {}
    assert list(errors(b"a,b\n\x81,1\n")) == [2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "'t' has no rows; it is empty"),
        (b"a,b\n", "'t' has no rows; it has only a header"),
        (b"a,a\n1,2\n", "column 'a' occurs twice"),
        (b"PK\x03\x04 and so on", "workbook of a spreadsheet"),
        (b"\x00\x00\x01\x00", "not a text file"),
        (b"\xff\xfea\x00,\x00b\x00\n\x00\xd8", "cannot read 't'"),
    ],
)
def test_an_unusable_table_is_refused(content, message):
    with pytest.raises(DataError, match=message):
        cells(content, name="t")


def test_an_unknown_encoding_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="unknown encoding"):
        TableFile(b"a,b\n1,2\n", encoding="utf-9")
    with pytest.raises(DataError, match="No such file"):
        TableFile(tmp_path / "none.csv")
    assert cells("a,b\nя,1\n".encode("cp1251"), encoding="cp1251") == [["я", "1"]]


def test_a_file_is_found_by_its_bytes_or_with_backslashes(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "k\udce4se.png").touch()
    (tmp_path / "in" / "grün.png").touch()
    table = TableFile("path\nkäse.png\n".encode("latin-1"))
    assert table.find_file_name(tmp_path, "in/käse.png") == "in/k\udce4se.png"
    assert table.find_file_name(tmp_path, "in\\käse.png") == "in/k\udce4se.png"
    assert table.find_file_name(tmp_path, "in\\grün.png") == "in/grün.png"
    assert table.find_file_name(tmp_path, "in\\none.png") == "in\\none.png"


@pytest.mark.parametrize(
    "content",
    [
        '[{"a": 1}, {"a": null}]',
        '{"a": 1}\n\n{"a": null}\n',
        '\ufeff{"a": 1}\r\n{"a": null}',
        '[{"a": 1},\n{"a": null}]',
    ],
)
def test_rows_of_json_are_a_list_or_lines(content):
    assert [row.cells for row in read_json_rows(content.encode())] == [{"a": 1}, {"a": None}]


def test_a_single_object_is_a_row():
    assert [row.cells for row in read_json_rows(b'{\n"a": 1}')] == [{"a": 1}]


def test_an_unusable_line_of_json_is_named_and_the_others_are_read():
    rows = list(read_json_rows(b'{"a": 1}\n{"a":\n3\n{"a": "\xe2\x80\xa8"}', name="t"))
    assert [row.cells for row in rows] == [{"a": 1}, {}, {}, {"a": "\u2028"}]
    assert [row.error and row.error.where for row in rows] == [None, "t, line 2", "t, line 3", None]


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000, json.dumps({"a": 1}).encode()[:-1]])
def test_unusable_json_is_refused(content):
    with pytest.raises(DataError):
        list(read_json_rows(content))


def test_json_that_is_nested_too_deeply_says_so():
    with pytest.raises(DataError, match="nested too deeply"):
        parse_json('{"a":' * 100_000, "the row")
