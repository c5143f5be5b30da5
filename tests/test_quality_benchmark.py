"""The benchmark of accuracy: its splits, its statistics and its bookkeeping. No weights, no data."""

import importlib.util
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

FOLDER = Path(__file__).parent.parent / "benchmarks" / "quality"
sys.path.append(str(FOLDER))

import costs  # noqa: E402
import intervals  # noqa: E402
import records  # noqa: E402
import tables  # noqa: E402
from splits import Cell, split_rows  # noqa: E402
from tasks import CELLS, TASKS, cells  # noqa: E402

LABELS = np.repeat(np.arange(4), 60)


def record(cell, split, method, accuracy):
    return records.Record(cell, split, method, accuracy, accuracy, seconds=1.0)


def table(*found):
    return {each.key: each for each in found}


def everywhere(half, method, *accuracies):
    return [record(str(cell), split, method, value) for cell in cells(half) for split, value in enumerate(accuracies)]


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("quality_program", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ten_tasks_have_twenty_cells_and_no_source_is_in_both_halves():
    assert len(TASKS) == 10
    assert len(set(CELLS)) == 20
    assert {cell.labels for cell in CELLS} == {5, 20, 100}
    assert len(cells("choosing")) == len(cells("reporting")) == 10
    halves = [{TASKS[cell.task].read for cell in cells(half)} for half in ("choosing", "reporting")]
    assert not halves[0] & halves[1]


@pytest.mark.parametrize(("labels", "val"), [(5, 1), (20, 4), (40, 8)])
def test_each_class_of_a_balanced_cell_has_its_labels_and_a_fifth_of_them_for_validation(labels, val):
    rows = split_rows(Cell("a-task", labels), 0, LABELS, test_per_class=10)
    assert np.bincount(LABELS[rows.labeled]).tolist() == [labels] * 4
    assert np.bincount(LABELS[rows.val]).tolist() == [val] * 4
    assert np.bincount(LABELS[rows.test]).tolist() == [10] * 4


@pytest.mark.parametrize("labels", [20, 40])
def test_the_counts_of_an_imbalanced_cell_fall_to_a_twentieth_in_equal_ratios(labels):
    assert Cell("a", labels, imbalanced=True).counts(4) == [round(labels * 20 ** (-i / 3)) for i in range(4)]
    rows = split_rows(Cell("a", labels, imbalanced=True), 0, LABELS, test_per_class=10)
    counts = np.bincount(LABELS[rows.labeled])
    assert counts.max() == 20 * counts.min() == labels
    assert len(set(LABELS[rows.train])) == 4


def test_no_sample_is_in_two_parts_of_a_split():
    for split in range(5):
        rows = split_rows(Cell("a", 20), split, LABELS, test_per_class=10)
        together = np.concatenate([rows.train, rows.val, rows.test])
        assert len(set(together)) == len(together) == 4 * 30


def test_cells_of_a_task_share_their_test_samples_and_small_ones_are_parts_of_large_ones():
    small, large = (split_rows(Cell("a", labels), 3, LABELS, test_per_class=10) for labels in (5, 20))
    assert small.test.tolist() == large.test.tolist()
    assert set(small.labeled) < set(large.labeled)


def test_splits_and_tasks_differ_and_repeat_exactly():
    first, again, second = (split_rows(Cell("a", 5), split, LABELS, test_per_class=10) for split in (0, 0, 1))
    other = split_rows(Cell("b", 5), 0, LABELS, test_per_class=10)
    assert first.labeled.tolist() == again.labeled.tolist()
    assert first.labeled.tolist() != second.labeled.tolist()
    assert first.labeled.tolist() != other.labeled.tolist()


def test_a_group_of_samples_is_either_tested_or_labeled():
    groups = [f"font {row % 12}" for row in range(len(LABELS))]
    rows = split_rows(Cell("a", 20), 0, LABELS, test_per_class=10, groups=groups)
    assert not {groups[row] for row in rows.test} & {groups[row] for row in rows.labeled}


def test_a_class_with_too_few_samples_is_refused():
    with pytest.raises(ValueError, match="class 0 has 50 samples besides the test, fewer than 51"):
        split_rows(Cell("a", 51), 0, LABELS, test_per_class=10)


def test_cells_of_one_split_are_averaged_and_only_pairs_count():
    found = table(
        record("a/5", 0, "ours", 0.8), record("a/5", 0, "peer", 0.7),
        record("a/20", 0, "ours", 0.9), record("a/20", 0, "peer", 0.6),
        record("a/5", 1, "ours", 0.5), record("a/5", 1, "peer", None),
        record("b/5", 0, "ours", 0.5), record("b/5", 0, "peer", 0.6),
        record("c/5", 0, "ours", 0.5),
    )  # fmt: skip
    differences = intervals.differences(found, "ours", "peer", ["a/5", "a/20", "b/5", "c/5"])
    assert {task: pytest.approx(values) for task, values in differences.items()} == {"a": [20.0], "b": [-10.0]}
    assert set(intervals.differences(found, "ours", "peer", ["b/5"])) == {"b"}


def test_the_interval_of_a_task_is_students():
    values = [1.0, 2.0, 4.0, 5.0]
    found = intervals.of_task(values)
    low, high = stats.t.interval(0.95, 3, loc=3.0, scale=stats.sem(values))
    assert (found.mean, found.low, found.high, found.pairs) == (3.0, pytest.approx(low), pytest.approx(high), 4)


def test_one_pair_has_no_interval():
    assert str(intervals.of_task([2.0])) == "+2.0 (no interval)"
    assert str(intervals.pooled({"a": [1.0, 2.0], "b": [3.0]})) == "+2.2 (no interval)"


def test_tasks_have_equal_weight_and_the_pooled_interval_is_welchs():
    one, other = [1.0, 2.0, 3.0], [4.0, 4.5, 6.0, 9.5]
    found = intervals.pooled({"a": one, "b": other})
    # the mean of two means is half of the difference between one and the other with its sign changed
    expected = stats.ttest_ind(one, [-value for value in other], equal_var=False).confidence_interval(0.95)
    assert found.mean == pytest.approx((2.0 + 6.0) / 2)
    assert (found.low, found.high) == (pytest.approx(expected.low / 2), pytest.approx(expected.high / 2))


def test_the_interval_over_tasks_is_students_over_their_means():
    tasks = {"a": [1.0, 3.0], "b": [4.0], "c": [6.0]}
    assert intervals.over_tasks(tasks) == intervals.of_task([2.0, 4.0, 6.0])


def test_equal_results_give_an_interval_of_zero():
    assert intervals.pooled({"a": [0.0, 0.0], "b": [0.0, 0.0]}) == intervals.Interval(0.0, 0.0, 0.0, 4)


def test_a_stopped_run_goes_on_with_what_has_no_result(tmp_path):
    path = tmp_path / "results.jsonl"
    wanted = [("a/5", split, method) for split in range(2) for method in ("ours", "peer")]
    assert records.read(path) == {}
    for key in wanted[:2]:
        records.append(path, record(*key, 0.5))
    assert list(records.pending(wanted, records.read(path))) == wanted[2:]


def test_half_a_line_of_a_killed_run_is_ignored_and_replaced(tmp_path):
    path = tmp_path / "results.jsonl"
    records.append(path, record("a/5", 0, "ours", 0.5))
    whole = path.read_bytes()
    records.append(path, record("a/5", 1, "ours", 0.6))
    path.write_bytes(path.read_bytes()[:-9])
    assert set(records.read(path)) == {("a/5", 0, "ours")}
    records.append(path, record("a/5", 2, "ours", 0.7))
    assert path.read_bytes().startswith(whole)
    assert set(records.read(path)) == {("a/5", 0, "ours"), ("a/5", 2, "ours")}


def test_a_failure_is_a_record_and_the_later_of_two_results_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    failure = records.Record("a/5", 0, "peer", None, None, 0.1, "1.0", "ValueError: no")
    records.append(path, failure)
    assert records.read(path) == {failure.key: failure}
    records.append(path, record("a/5", 0, "peer", 0.5))
    assert records.read(path)[failure.key].accuracy == 0.5


def test_the_peer_that_is_best_on_the_choosing_half_is_compared_on_the_reporting_half():
    found = table(
        *everywhere("choosing", "fastai", 0.7, 0.7), *everywhere("choosing", "skorch", 0.6, 0.6),
        *everywhere("reporting", "fastai", 0.5, 0.5), *everywhere("reporting", "skorch", 0.9, 0.9),
        *everywhere("reporting", "tuneforge", 0.52, 0.52),
    )  # fmt: skip
    assert tables.best_peer(found, "choosing") == "fastai"
    assert "`fastai`" in tables.verdict(found)
    assert "+2.0 (+2.0 to +2.0) points more, and is significantly worse on no task" in tables.verdict(found)


def test_peers_are_ranked_on_the_runs_that_all_of_them_have():
    partial = [each for each in everywhere("choosing", "fastai", 0.55) if each.cell != "digits-cnn/5"]
    better = [each for each in everywhere("choosing", "skorch", 0.5) if each.cell != "digits-cnn/5"]
    found = table(*partial, *better, record("digits-cnn/5", 0, "skorch", 1.0))
    assert tables.best_peer(found, "choosing") == "fastai"
    few = [record("digits-cnn/5", 0, "lightning", 1.0)]
    assert tables.best_peer(table(*found.values(), *few), "choosing") == "fastai"
    assert tables.best_peer(table(*few), "choosing") is None


def test_the_verdict_names_the_tasks_that_are_significantly_worse():
    ours = [
        record(each.cell, each.split, "tuneforge", each.accuracy - (0.1 if each.cell.startswith("emoji") else 0))
        for each in everywhere("reporting", "skorch", 0.6, 0.7)
    ]
    found = table(*ours, *everywhere("reporting", "skorch", 0.6, 0.7), *everywhere("choosing", "skorch", 0.6))
    assert tables.verdict(found).endswith("significantly worse on emoji-lite1.")
    few = {key: each for key, each in found.items() if each.split == 0 or not each.cell.startswith("letters")}
    assert tables.verdict(few).endswith("on emoji-lite1. Too few pairs for an interval: letters-cnn.")


def test_strategies_are_compared_with_the_best_of_each_cell_in_hindsight():
    found = table(
        record("digits-cnn/5", 0, "tuneforge", 0.5), record("digits-cnn/5", 0, "tuneforge:auto", 0.6),
        record("digits-cnn/100i", 0, "tuneforge", 0.7), record("digits-cnn/100i", 0, "tuneforge:auto", 0.6),
        record("fashion-cnn/20", 0, "tuneforge", 0.7), record("fashion-cnn/20", 0, "tuneforge:auto", 0.5),
        record("packages-minilm/5", 0, "tuneforge", 0.9), record("fashion-cnn/20", 0, "fastai", 0.9),
    )  # fmt: skip
    below = {"tuneforge": pytest.approx((5 + 0) / 2), "tuneforge:auto": pytest.approx((5 + 20) / 2)}
    assert tables.below_the_best(found, "choosing") == below
    assert tables.below_the_best(table(record("digits-cnn/5", 0, "tuneforge", 0.5)), "choosing") == {}


def test_failures_and_splits_that_did_not_run_are_listed():
    failure = records.Record("digits-cnn/5", 0, "skorch", None, None, 0.1, "1.0", "ValueError: no")
    text = tables.missing(table(failure), "choosing")
    assert "digits-cnn/5, split 0, skorch failed: ValueError: no" in text
    assert "- Runs: skorch 1 of 50." in text


def test_the_table_of_stored_results_is_printed(program, tmp_path):
    for each in [*everywhere("choosing", "skorch", 0.6), *everywhere("choosing", "tuneforge", 0.7)]:
        records.append(tmp_path / "results.jsonl", each)
    printed = CliRunner().invoke(program.main, ["--table", "--out", str(tmp_path / "results.jsonl")])
    assert "| digits-cnn/5 | 70.0 | 60.0 |" in printed.output
    assert "| skorch | +10.0 (no interval) |" in printed.output


def test_a_run_beyond_its_hours_is_refused_before_it_starts(program, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "estimate", lambda *_: 11 * 3600.0)
    printed = CliRunner().invoke(program.main, ["--out", str(tmp_path / "results.jsonl")])
    assert printed.exit_code == 1
    assert "about 11.00 CPU hours" in printed.output
    assert "more than --hours 10" in printed.output
    assert not list(tmp_path.iterdir())


def test_the_first_split_of_every_cell_comes_before_the_second(program):
    keys = program.keys("choosing", ("skorch", "fastai"), ("digits-cnn", "fashion-cnn/20"), 2)
    assert [key[1] for key in keys] == [0] * 6 + [1] * 6
    assert {key[0] for key in keys} == {"digits-cnn/5", "digits-cnn/100i", "fashion-cnn/20"}


def test_costs_come_from_the_other_splits_of_a_cell():
    done = table(
        *(attrs.evolve(record("digits-cnn/5", split, "skorch", 0.5), seconds=s) for split, s in enumerate((2, 3, 9)))
    )
    assert costs.estimate([("digits-cnn/5", 3, "skorch"), ("digits-cnn/5", 4, "skorch")], done) == 6.0
