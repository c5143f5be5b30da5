"""Splits by group and by time, and copies across splits."""

import csv

import numpy as np
import pytest
import torch
from tiny import StubRun

import tuneforge as tf
from tuneforge.builtin.datasets.group_splits import split_by_time, split_groups
from tuneforge.builtin.datasets.tables.table_csv import TableCsv
from tuneforge.engine.data.copied_rows import describe_copies
from tuneforge.sklearn import data_from_arrays

PATIENTS = np.repeat([f"p{number}" for number in range(20)], 5)
X = np.random.default_rng(0).normal(size=(100, 3))
Y = np.arange(100) % 2


def written(path, **columns):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*columns], *zip(*columns.values(), strict=True)])
    return path


def test_groups_stay_together_and_splits_have_their_fractions():
    train, val, test = split_groups(PATIENTS, val=0.2, test=0.3, seed=0, where="-")
    assert [len(rows) for rows in (train, val, test)] == [50, 20, 30]
    owners = [set(PATIENTS[rows.numpy()]) for rows in (train, val, test)]
    assert not owners[0] & owners[1] and not owners[1] & owners[2] and not owners[0] & owners[2]  # noqa: PT018
    assert torch.equal(split_groups(PATIENTS, val=0.2, test=0.3, seed=0, where="-")[2], test)
    assert not torch.equal(split_groups(PATIENTS, val=0.2, test=0.3, seed=1, where="-")[2], test)


@pytest.mark.parametrize(("val", "test"), [(0.3, 0.3), (0.0, 0.4), (0.4, 0.0)])
@pytest.mark.parametrize("sizes", [[97, 1, 1, 1], [1, 1, 98, 5]])
def test_each_split_has_a_group_even_if_one_is_large(sizes, val, test):
    parts = split_groups(np.repeat(np.arange(4), sizes), val=val, test=test, seed=3, where="-")
    assert [len(rows) > 0 for rows in parts] == [True, val > 0, test > 0]
    with pytest.raises(tf.DataError, match="cannot fill every split"):
        split_groups(["a"] * 9, val=val, test=test, seed=0, where="-")


def test_time_decides_and_equal_times_stay_together():
    times = ["2024-01-09", "2024-01-01", "2024-01-02", "2024-01-08", *["2024-01-03"] * 4, "2024-01-10", "2024-01-10"]
    train, val, test = split_by_time(times, val=0.2, test=0.2, where="-")
    assert (train.tolist(), val.tolist(), test.tolist()) == ([1, 2, 4, 5, 6, 7], [0, 3], [8, 9])
    assert split_by_time(["10", "9", "8", "7"], val=0.0, test=0.25, where="-")[2].tolist() == [0]
    with pytest.raises(tf.DataError, match="neither a number nor a date"):
        split_by_time(["yesterday", "1", "2"], val=0.2, test=0.2, where="-")
    with pytest.raises(tf.DataError, match="distinct times"):
        split_by_time(["1", "1", "2"], val=0.2, test=0.2, where="-")


@pytest.mark.parametrize("option", ["group", "time"])
def test_a_table_is_split_by_a_column_that_is_no_input(tmp_path, option):
    keys = PATIENTS if option == "group" else [f"2024-{1 + row // 10:02d}-01" for row in range(100)]
    path = written(tmp_path / "t.csv", a=X[:, 0], key=keys, y=np.where(Y, "yes", "no"))
    data = TableCsv(path=path, target="y", val=0.2, test=0.2, **{option: "key"}).data_prepare(StubRun)
    rows = {name: [int(each.partition(":")[2]) - 2 for each in split.ids] for name, split in data.splits().items()}
    owners = {name: {keys[row] for row in here} for name, here in rows.items()}
    assert not owners["train"] & owners["test"]
    assert [len(here) for here in rows.values()] == [60, 20, 20]
    assert data.train.fetch(torch.tensor([0])).shape == (1, 1)
    if option == "time":
        assert max(owners["train"]) < min(owners["val"]) < max(owners["val"]) < min(owners["test"])
    with pytest.raises(tf.DataError, match="did you mean 'key'"):
        TableCsv(path=path, target="y", **{option: "keys"}).data_prepare(StubRun)


def test_arrays_are_split_by_groups():
    data = data_from_arrays(X, Y, groups=PATIENTS).data_prepare(StubRun)
    owners = [{PATIENTS[int(each)] for each in split.ids} for split in data.splits().values()]
    assert sum(map(len, owners)) == 20
    with pytest.raises(tf.DataError, match="groups of shape"):
        data_from_arrays(X, Y, groups=PATIENTS[:-1]).data_prepare(StubRun)


def test_group_and_time_together_are_refused(tmp_path):
    with pytest.raises(tf.OptionError, match="by group and by time"):
        TableCsv(path=tmp_path / "t.csv", target="y", group="a", time="b")


def test_copies_across_splits_are_counted():
    copied = np.concatenate([X, X[:30]])
    source = data_from_arrays(copied, np.concatenate([Y, Y[:30]]))
    data = source.data_prepare(StubRun)
    train, test = ({int(each) % 100 for each in split.ids} for split in (data.train, data.test))
    notes = describe_copies(data)
    assert any(note.startswith(f"test: {len(train & test)} of {len(data.test)} samples") for note in notes)
    assert not describe_copies(data_from_arrays(X, Y).data_prepare(StubRun))
    assert not describe_copies(data_from_arrays(np.eye(4)[np.arange(100) % 4], Y).data_prepare(StubRun))
