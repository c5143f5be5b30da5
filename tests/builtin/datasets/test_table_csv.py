import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from tuneforge import DataError, FolderError, OptionError, PluginError, UsageError
from tuneforge.builtin.datasets.tables.table_csv import TableCsv
from tuneforge.builtin.datasets.tables.table_inputs import TableInputs
from tuneforge.builtin.models.mlp import MLP
from tuneforge.builtin.targets import ClassTargets, RegressionTargets
from tuneforge.exporting import save_tensors
from tuneforge.plugin.declaration import build_component, get_option_values

CITIES = ("Bonn", "Lyon", "Oslo")


def written(path, rows, header=None, *, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header or list(rows[0]), *(list(row.values()) if header is None else row for row in rows)])
    return path


def houses(count=40, **changes):
    """Rows with a number, a gappy number, a text and a target of each kind."""
    draw = random.Random(0)
    rows = []
    for index in range(count):
        area, city = draw.uniform(30, 200), CITIES[index % 3]
        row = {"area": f"{area:.3f}", "age": "" if index % 4 == 0 else str(index), "city": city}
        row |= {"price": f"{3000 * area + index:.2f}", "kind": "flat" if area < 100 else "house"}
        rows.append(row | {name: make(index) for name, make in changes.items()})
    return rows


def prepared(path, target="price", *, known=None, seed=0, single_split=False, **options):
    run = SimpleNamespace(
        config=SimpleNamespace(seed=seed),
        data_seed=seed,
        restoring=known is not None,
        data=known,
        single_split=single_split,
    )
    return TableCsv(path=path, target=target, **options).data_prepare(run)


@pytest.fixture
def table(tmp_path):
    return written(tmp_path / "houses.csv", houses())


def stored(split):
    return split.fetch(torch.arange(len(split)))


class TestTableCsv:
    def test_numbers_are_standardized_with_the_training_split(self, table):
        data = prepared(table)
        train = stored(data.train)
        assert data.inputs.columns == ("area", "age", "city", "kind")
        assert data.inputs.column_types == ("number", "number-or-none", "text", "text")
        assert train.dtype == torch.float32
        assert train.shape == (28, 1 + 2 + 3 + 2)
        assert train[:, 0].mean().item() == pytest.approx(0, abs=1e-6)
        assert train[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-6)
        assert isinstance(data.targets, RegressionTargets)
        assert data.train.targets.mean().item() == pytest.approx(0, abs=1e-6)

    def test_a_missing_number_is_the_training_mean_with_an_indicator(self, table):
        data = prepared(table)
        gaps = stored(data.train)[:, 2] == 1
        assert 0 < gaps.sum() < 28
        assert not stored(data.train)[gaps, 1].any()
        present = stored(data.train)[~gaps, 1]
        assert present.mean().item() == pytest.approx(0, abs=1e-6)

    def test_text_is_one_of_its_values_in_a_stable_order(self, table):
        data = prepared(table)
        assert data.inputs.categories[2] == CITIES
        rows = houses()
        for row in range(len(data.test)):
            line = int(data.test.id_of(row).partition(":")[2])
            assert stored(data.test)[row, 3:6].tolist() == [float(rows[line - 2]["city"] == city) for city in CITIES]

    def test_decode_of_a_row_is_bit_identical_to_the_stored_features(self, table):
        data, rows = prepared(table), houses()
        for split in data.splits().values():
            for row in range(len(split)):
                line = int(split.id_of(row).partition(":")[2])
                assert torch.equal(data.inputs.decode(rows[line - 2]), stored(split)[row])

    @pytest.mark.parametrize(
        ("make", "task", "names"),
        [
            (lambda index: "yes" if index % 2 else "no", "auto", ("no", "yes")),
            (lambda index: str(index % 3 * 5), "auto", ("0", "5", "10")),
            (lambda index: f"{index % 2}.5", "classification", ("0.5", "1.5")),
            (lambda index: f"0{index % 2}", "classification", ("00", "01")),
        ],
    )
    def test_text_and_a_few_whole_numbers_are_classes(self, tmp_path, make, task, names):
        data = prepared(written(tmp_path / "t.csv", houses(answer=make)), "answer", task=task)
        assert isinstance(data.targets, ClassTargets)
        assert data.targets.names == names
        rows = houses(answer=make)
        line = int(data.val.id_of(0).partition(":")[2])
        assert data.targets.describe_label(data.val.targets[0]) == rows[line - 2]["answer"]

    @pytest.mark.parametrize(
        ("make", "task"),
        [(str, "auto"), (lambda index: f"{index}.5", "auto"), (lambda index: str(index % 3), "regression")],
    )
    def test_other_numbers_are_numbers(self, tmp_path, make, task):
        data = prepared(written(tmp_path / "t.csv", houses(answer=make)), "answer", task=task, unit="EUR")
        assert data.targets.names == ("answer",)
        assert data.targets.units == ("EUR",)
        assert data.train.targets.shape == (28,)

    def test_splits_are_stratified_by_class(self, table):
        data = prepared(table, "city")
        for split, counts in (("train", [28, 28, 28]), ("val", [6, 6, 6]), ("test", [6, 6, 6])):
            assert data.splits()[split].targets.bincount().sum() == counts[0]
            assert data.splits()[split].targets.bincount().min() >= counts[0] // 3 - 1

    def test_the_seed_decides_the_splits(self, table):
        first, again, other = (prepared(table, seed=seed).train.ids for seed in (1, 1, 2))
        assert first == again
        assert first != other

    def test_unusable_columns_are_skipped_and_named(self, tmp_path):
        rows = houses(60, name=lambda index: f"no. {index}", empty=lambda index: "")
        data = prepared(written(tmp_path / "t.csv", rows), val=0.05, test=0.05)
        assert "name" not in data.inputs.columns
        assert any("'name' is skipped: it has" in note for note in data.notes)
        assert any("'empty' is skipped: it is empty" in note for note in data.notes)

    def test_a_constant_column_does_no_harm(self, tmp_path):
        data = prepared(written(tmp_path / "t.csv", houses(one=lambda index: "7.3")))
        assert stored(data.train).isfinite().all()

    def test_other_delimiters_quotes_and_a_byte_order_mark_are_read(self, tmp_path):
        path = written(tmp_path / "t.csv", houses(city=lambda index: f"a;{index % 2}"), delimiter=";")
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert prepared(path, delimiter=";").inputs.categories[2] == ("a;0", "a;1")

    def test_a_tuned_models_columns_and_scales_hold_for_another_file(self, tmp_path, table):
        tuned = prepared(table)
        other = prepared(written(tmp_path / "other.csv", houses(12, price=lambda index: str(index % 3))), known=tuned)
        assert get_option_values(other.inputs) == get_option_values(tuned.inputs)
        assert get_option_values(other.targets) == get_option_values(tuned.targets)

    def test_the_inferred_task_is_noted(self, table):
        assert "read as a number" in prepared(table).notes[-1]
        assert "read as 3 classes" in prepared(table, "city").notes[-1]


DIALECTS = {
    "plain": (",", ".", "utf-8", "\n"),
    "semicolon-and-decimal-comma": (";", ",", "utf-8-sig", "\r\n"),
    "tab-and-decimal-comma": ("\t", ",", "utf-16", "\r\n"),
    "old": (";", ",", "cp1252", "\n"),
    "old-mac": (";", ",", "latin-1", "\r"),
    "quoted-decimal-comma": (",", ",", "utf-8", "\n"),
}


class TestDialects:
    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_every_dialect_gives_the_same_data(self, tmp_path, dialect):
        delimiter, decimal, encoding, end = DIALECTS[dialect]
        rows = houses(city=lambda index: ("Köln", "Lyon,\nRhône", "Oslo")[index % 3])
        expected = prepared(written(tmp_path / "plain.csv", rows))
        changed = [{name: cell.replace(".", decimal) for name, cell in row.items()} for row in rows]
        path = written(tmp_path / "t.csv", changed, delimiter=delimiter)
        path.write_bytes(path.read_bytes().decode().replace("\r\n", end).encode(encoding))
        data = prepared(path)
        for split in ("train", "val", "test"):
            assert torch.equal(stored(data.splits()[split]), stored(expected.splits()[split]))
            assert torch.equal(data.splits()[split].targets, expected.splits()[split].targets)
        names = expected.inputs.categories[2]
        assert data.inputs.categories[2] == names

    def test_the_marks_of_columns_may_differ(self, tmp_path):
        rows = houses(other=lambda index: f"{index},{index % 10}5")
        data = prepared(written(tmp_path / "t.csv", rows, delimiter=";"))
        assert data.inputs.column_types[-1] == "number"
        assert data.inputs.means[-1] == pytest.approx(20, abs=4)
        assert torch.equal(
            data.inputs.decode({**rows[0], "other": 3.25}), data.inputs.decode({**rows[0], "other": "3.25"})
        )

    def test_the_encoding_is_an_option_for_other_than_western_files(self, tmp_path):
        path = written(tmp_path / "t.csv", houses(city=lambda index: ("Минск", "Орёл")[index % 2]))
        path.write_bytes(path.read_text(encoding="utf-8").encode("cp1251"))
        data = prepared(path, encoding="cp1251")
        assert data.inputs.categories[2] == ("Минск", "Орёл")
        assert next(row for _, row in data.inputs.read_file(path))["city"] == "Минск"
        assert any("Windows-1252" in note for note in prepared(path).notes)


class TestUnusualCells:
    """What is unusual in a column is noted with column, count and first line."""

    def changed(self, tmp_path, column, cells, **options):
        rows = houses(100, other=lambda index: str(index % 7))
        for row, cell in cells.items():
            rows[row] = rows[row] | {column: cell}
        return prepared(written(tmp_path / "t.csv", rows), **options)

    @pytest.mark.parametrize("word", ["unknown", "13.2O", "1e39", "9" * 400, "inf", "1_0"])
    @pytest.mark.parametrize("column", ["area", "other"])
    def test_a_few_words_among_numbers_count_as_missing(self, tmp_path, column, word):
        data = self.changed(tmp_path, column, {17: word, 40: word})
        index = data.inputs.columns.index(column)
        assert data.inputs.column_types[index].startswith("number")
        shown = word if len(word) < 40 else word[:40] + "..."
        assert any(
            f"column '{column}': 2 of 100 cells are not numbers" in note and f"first in line 19: '{shown}'" in note
            for note in data.notes
        )

    def test_they_also_count_as_missing_when_the_data_are_prepared_again(self, tmp_path):
        data = self.changed(tmp_path, "area", {17: "unknown"})
        again = prepared(tmp_path / "t.csv", known=data)
        assert torch.equal(stored(again.train), stored(data.train))

    def test_many_words_among_numbers_make_a_text_column_which_is_said(self, tmp_path):
        data = self.changed(tmp_path, "other", dict.fromkeys(range(5, 45), "low"))
        assert data.inputs.column_types[data.inputs.columns.index("other")] == "text"
        assert any("'other' is read as text: 40 cell(s)" in note and "line 7: 'low'" in note for note in data.notes)

    def test_too_many_words_in_another_file_are_refused(self, tmp_path, table):
        tuned = prepared(table)
        rows = houses(20, area=lambda index: "large" if index > 8 else "50")
        with pytest.raises(DataError, match=r"'area': 11 of 20 cells are not numbers.*line 11: 'large'"):
            prepared(written(tmp_path / "other.csv", rows), known=tuned)

    def test_codes_with_leading_zeros_are_text(self, tmp_path):
        data = self.changed(tmp_path, "other", {3: "007"})
        assert data.inputs.column_types[data.inputs.columns.index("other")] == "text"
        assert any("'other' is read as text: 1 cell(s) have leading zeros" in note for note in data.notes)
        data = self.changed(tmp_path, "area", {3: "007"})
        assert any("'area' is skipped" in note and "leading zeros" in note for note in data.notes)

    @pytest.mark.parametrize("value", ["-99999", "1e30"])
    def test_values_far_outside_the_rest_are_named(self, tmp_path, value):
        data = self.changed(tmp_path, "area", dict.fromkeys(range(10, 14), value))
        (note,) = [note for note in data.notes if "far outside" in note]
        assert note.startswith("column 'area': 4 value(s)")
        assert f"line 12: {float(value):.6g};" in note

    def test_a_frequent_value_far_outside_the_rest_is_named(self, tmp_path):
        data = self.changed(tmp_path, "area", dict.fromkeys(range(0, 100, 2), "99999"))
        assert any("column 'area': 50 value(s)" in note and "line 2: 99999;" in note for note in data.notes)

    def test_a_value_may_be_declared_missing(self, tmp_path):
        cells = dict.fromkeys(range(10, 30), "-99999")
        data = self.changed(tmp_path, "area", cells, missing_values=("-99999",))
        plain = self.changed(tmp_path, "area", dict.fromkeys(cells, ""))
        assert torch.equal(stored(data.train), stored(plain.train))
        assert not any("far outside" in note for note in data.notes)
        row = houses()[0] | {"other": 1}
        assert torch.equal(data.inputs.decode(row | {"area": -99999.0}), data.inputs.decode(row | {"area": None}))

    @pytest.mark.parametrize("make", [lambda index: str(int(index % 10 == 0)), lambda index: str(index * index)])
    def test_rare_and_skewed_values_are_not_outliers(self, tmp_path, make):
        assert not any(
            "far outside" in note for note in prepared(written(tmp_path / "t.csv", houses(100, n=make))).notes
        )

    def test_a_text_that_only_other_splits_have_is_named(self, tmp_path, table):
        tuned = prepared(table)
        other = prepared(
            written(tmp_path / "o.csv", houses(9, city=lambda index: "Rome" if index > 5 else "")), known=tuned
        )
        assert any("column 'city': 3 cell(s) hold a text" in note and "line 8: 'Rome'" in note for note in other.notes)

    def test_rows_without_a_target_are_skipped_on_request(self, tmp_path):
        cells = {4: "", 9: "NA", 11: " "}
        with pytest.raises(DataError, match=r"3 row\(s\) have no 'price'.*line 6.*--data.missing-target skip"):
            self.changed(tmp_path, "price", cells)
        data = self.changed(tmp_path, "price", cells, missing_target="skip")
        assert sum(map(len, data.splits().values())) == 97
        assert "t.csv:6" not in {*data.train.ids, *data.val.ids, *data.test.ids}
        assert any("3 row(s) without 'price' are skipped, the first in line 6" in note for note in data.notes)
        with pytest.raises(DataError, match="no row has a 'price'"):
            self.changed(tmp_path, "price", dict.fromkeys(range(100), ""), missing_target="skip")

    def test_a_word_in_a_numeric_target_is_a_mistake_and_named(self, tmp_path):
        with pytest.raises(DataError, match=r"not a number everywhere.*1 of 100 cells are not.*line 7: 'sold'"):
            self.changed(tmp_path, "price", {5: "sold"})


class TestTruthValues:
    @pytest.mark.parametrize(
        ("yes", "no"), [("true", "false"), ("True", "False"), ("WAHR", "FALSCH"), ("yes", "no"), ("Y", "N")]
    )
    def test_any_spelling_of_a_truth_value_is_that_value(self, tmp_path, yes, no):
        data = prepared(written(tmp_path / "t.csv", houses(flag=lambda index: yes if index % 2 else no)))
        row = houses()[0]
        for known, spellings in ((yes, ("true", True, "TRUE", 1)), (no, ("False", False, "no", 0))):
            expected = data.inputs.decode(row | {"flag": known})
            assert expected[-2:].sum() == 1
            for each in spellings:
                assert torch.equal(data.inputs.decode(row | {"flag": each}), expected)
                assert data.inputs.describe_input(row | {"flag": each}) == {}

    def test_spellings_that_differ_only_in_case_are_one_value(self, tmp_path):
        spellings = ("true", "TRUE", "False", "false")
        data = prepared(written(tmp_path / "t.csv", houses(flag=lambda index: spellings[index % 4])))
        assert data.inputs.categories[-1] == ("false", "true")

    def test_words_of_several_pairs_stay_apart(self, tmp_path):
        words = ("t", "y", "n", "Norway")
        data = prepared(written(tmp_path / "t.csv", houses(flag=lambda index: words[index % 4])))
        assert data.inputs.categories[-1] == ("Norway", "n", "t", "y")
        assert data.inputs.describe_input(houses()[0] | {"flag": True}) == {"unseen": {"flag": "True"}}


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has no rows"),
            ("a,b\n", "has no rows"),
            ("a,a\n1,2\n", "column 'a' occurs twice"),
            ("a,pricee\n1,2\n", "did you mean 'pricee'"),
            ("a,price\n1,2\n1,2,3\n", "3 cells under a header of 2; at .*line 3"),
            ("a,price\n1,2\n1,\n2,3\n", r"1 row\(s\) have no 'price'; at .*line 3"),
            ("a,price\n" + "1,2\n" * 9, "only one class, '2'"),
            ("a,price\n1,x\n2,y\n3,x\n4,x\n", r"class 'y' has 1 sample"),
            ("price\n1.5\n2.5\n3.5\n4.5\n5.5\n", "no column can serve"),
            ("a,price\n1,1.5\n2,2.5\n", r"2 sample\(s\) cannot fill"),
        ],
    )
    def test_bad_tables_say_where_and_what_to_do(self, tmp_path, text, message):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            prepared(tmp_path / "t.csv")
        assert caught.value.fix

    def test_a_missing_file_is_named(self):
        with pytest.raises(DataError, match=r"cannot read 'no/such\.csv'.*No such file"):
            prepared(Path("no/such.csv"))

    def test_a_file_that_is_no_text_is_named(self, tmp_path):
        (tmp_path / "t.csv").write_bytes(b"\x89PNG\r\n\x00\x00")
        with pytest.raises(DataError, match="UTF-8"):
            prepared(tmp_path / "t.csv")

    def test_text_among_numbers_names_the_line(self, tmp_path):
        path = written(tmp_path / "t.csv", houses(answer=lambda index: "x" if index == 5 else str(index)))
        with pytest.raises(DataError, match="line 7"):
            prepared(path, "answer", task="regression")

    @pytest.mark.parametrize("options", [{"val": 0.5, "test": 0.5}, {"val": -1}, {"delimiter": ""}, {"task": "ranks"}])
    def test_options_out_of_range_are_refused(self, options):
        with pytest.raises(OptionError):
            TableCsv(path=Path("t.csv"), target="price", **options)


class TestTableRow:
    def test_decode_takes_values_text_and_json(self, table):
        inputs = prepared(table).inputs
        row = {"area": 50.5, "age": None, "city": "Lyon", "kind": "flat"}
        text = {"area": "50.5", "age": "", "city": " Lyon", "kind": "flat", "price": "never looked at"}
        assert torch.equal(inputs.decode(row), inputs.decode(text))
        assert torch.equal(inputs.decode(row), inputs.decode(json.dumps(row).encode()))

    def test_decode_reads_a_file_of_json(self, table, tmp_path):
        inputs, row = prepared(table).inputs, houses()[0]
        (tmp_path / "row.json").write_text(json.dumps(row))
        assert torch.equal(inputs.decode(tmp_path / "row.json"), inputs.decode(row))

    def test_an_unknown_text_is_none_of_the_values(self, table):
        features = prepared(table).inputs.decode(houses()[0] | {"city": "Rome"})
        assert not features[3:6].any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"area": "large"}, "'large' is not a number; at column 'area'"),
            ({"area": float("inf")}, "inf is not a number"),
            ({"area": True}, "True is not a number"),
        ],
    )
    def test_decode_rejects_what_is_not_a_number(self, table, change, message):
        with pytest.raises(DataError, match=message):
            prepared(table).inputs.decode(houses()[0] | change)

    @pytest.mark.parametrize(
        "value", [1e39, "1e308", 10**400, pytest.param(10**5000, id="5001 digits"), 1e30, "9" * 400]
    )
    def test_decode_rejects_numbers_that_the_model_cannot_compute_with(self, table, value):
        with pytest.raises(DataError, match="(is too large for the model|is not a number); at column 'area'.*float32"):
            prepared(table).inputs.decode(houses()[0] | {"area": value})

    def test_a_whole_float_is_the_category_of_its_integer(self, tmp_path):
        inputs = prepared(
            written(tmp_path / "t.csv", houses(lot=lambda index: ("12", "1_2", "x", "y")[index % 4]))
        ).inputs
        row = houses()[0]
        assert torch.equal(inputs.decode(row | {"lot": 12.0}), inputs.decode(row | {"lot": "12"}))
        assert inputs.describe_input(row | {"lot": "12.0"}) == {"unseen": {"lot": "12.0"}}

    def test_rows_of_numpy_and_pandas_are_rows(self, table):
        inputs, row = prepared(table).inputs, {"area": 50.5, "age": 4, "city": "Lyon", "kind": "flat"}
        for given in (pd.Series(row), row | {"area": np.float32(50.5), "age": np.int64(4)}):
            assert torch.equal(inputs.decode(given), inputs.decode(row))
        gaps = row | {"age": None, "city": None}
        for age, city in ((float("nan"), pd.NA), (pd.NA, np.nan), (pd.NaT, pd.NaT)):
            assert torch.equal(inputs.decode(row | {"age": age, "city": city}), inputs.decode(gaps))
            assert inputs.describe_input(row | {"age": age, "city": city}) == {}

    def test_a_missing_column_offers_the_nearest(self, table):
        with pytest.raises(DataError, match=r"'area' is missing.*did you mean 'Area'"):
            prepared(table).inputs.decode({"Area": 1, "age": 2, "city": "Bonn", "kind": "flat"})

    @pytest.mark.parametrize("raw", [[1, 2], b"[1", b"[1]", 3])
    def test_decode_refuses_what_is_no_row(self, table, raw):
        with pytest.raises(DataError):
            prepared(table).inputs.decode(raw)

    def test_text_shows_the_cells_to_a_person(self, table):
        inputs = prepared(table).inputs
        row = {"area": 50.5, "age": "", "city": "Rome", "kind": "flat"}
        assert inputs.render_text(inputs.decode(row)) == "area 50.5, age ?, city ?, kind flat"

    def test_options_survive_json(self, table):
        inputs = prepared(table).inputs
        again = build_component(TableInputs, json.loads(json.dumps(get_option_values(inputs))), where="-")
        assert get_option_values(again) == get_option_values(inputs)


def run_of(example, targets=None, *, seed=0, restoring=False):
    data = SimpleNamespace(targets=targets or ClassTargets(names=("a", "b", "c")))
    return SimpleNamespace(
        example=example, data=data, config=SimpleNamespace(seed=seed), data_seed=seed, restoring=restoring
    )


class TestMLP:
    def test_a_layer_group_a_hidden_layer_and_the_head_last(self):
        model = MLP(hidden=(8, 4), dropout=0.5).model_adapt(run_of(torch.zeros(2, 5)), None)
        assert [group.name for group in model.groups] == ["layer1", "layer2", "head"]
        assert model.labels == ("a", "b", "c")
        assert model.module(torch.zeros(2, 5)).shape == (2, 3)
        assert [type(part) for part in model.module.layer1] == [nn.Linear, nn.ReLU, nn.Dropout]

    def test_without_hidden_layers_it_is_linear(self):
        model = MLP(hidden=()).model_adapt(run_of(torch.zeros(2, 5), RegressionTargets()), None)
        assert list(model.parameters()) == ["head.weight", "head.bias"]
        assert model.module(torch.zeros(2, 5)).shape == (2, 1)

    def test_the_seed_decides_the_weights_whatever_was_drawn_before(self):
        built = []
        for seed in (1, 1, 2):
            torch.rand(3)
            built.append(MLP().model_adapt(run_of(torch.zeros(2, 5), seed=seed), None).parameters()["head.weight"])
        assert torch.equal(built[0], built[1])
        assert not torch.equal(built[0], built[2])

    def test_weights_come_with_their_labels(self, tmp_path):
        tuned = MLP(hidden=(8,)).model_adapt(run_of(torch.zeros(2, 5), seed=3), None)
        save_tensors(tuned.module.state_dict(), tmp_path / "w.safetensors", metadata={"labels": ("a", "b", "c")})
        run = run_of(torch.zeros(2, 5), ClassTargets(names=("b", "z")))
        loaded = MLP(hidden=(8,), dropout=0.1, weights=tmp_path / "w.safetensors").model_adapt(run, None)
        assert loaded.labels == loaded.pretrained_labels == ("a", "b", "c")
        for name, tensor in tuned.parameters().items():
            assert torch.equal(loaded.parameters()[name], tensor)

    def test_a_restored_run_builds_the_shape_and_loads_nothing(self):
        run = run_of(torch.zeros(2, 5), restoring=True)
        model = MLP(weights=Path("gone.safetensors")).model_adapt(run, None)
        assert model.module(torch.zeros(1, 5)).shape == (1, 3)

    def test_weights_of_another_shape_are_refused(self, tmp_path):
        tuned = MLP(hidden=(8,)).model_adapt(run_of(torch.zeros(2, 5)), None)
        save_tensors(tuned.module.state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(UsageError, match=r"layer1\.0\.weight"):
            MLP(hidden=(9,), weights=tmp_path / "w.safetensors").model_adapt(run_of(torch.zeros(2, 5)), None)
        with pytest.raises(FolderError):
            MLP(weights=tmp_path / "none.safetensors").model_adapt(run_of(torch.zeros(2, 5)), None)

    @pytest.mark.parametrize(
        "example", [torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), {"ids": torch.zeros(2, 3)}]
    )
    def test_inputs_that_are_no_rows_of_numbers_are_refused(self, example):
        with pytest.raises(DataError, match="one row of floats"):
            MLP().model_adapt(run_of(example), None)

    def test_it_adapts_no_other_model(self):
        run = run_of(torch.zeros(2, 5))
        with pytest.raises(PluginError, match="cannot adapt one"):
            MLP().model_adapt(run, MLP().model_adapt(run, None))
