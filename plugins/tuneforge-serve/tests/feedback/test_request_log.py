"""The records of production keep what was acknowledged, stay below their cap and never mix the two sides.

TUNEFORGE_FEEDBACK_KILLS sets how often the process that takes labels is killed (3 by default, 50 for the full proof).
"""

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time

import forked
import pytest
import torch
from tuneforge_serve.feedback.request_log import LoggedRequest, RequestLog, is_sampled
from tuneforge_serve.feedback.schemas import TENSORS, encode_row

import tuneforge as tf

KILLS = int(os.environ.get("TUNEFORGE_FEEDBACK_KILLS", "3"))

LABELLER = """
import itertools, sys
from tuneforge_serve.feedback.request_log import LoggedRequest, RequestLog
start, records = int(sys.argv[2]), RequestLog(sys.argv[1])
for number in itertools.count(start):
    records.append([LoggedRequest(f"r{number}", "1", b"%d" % number, "text/plain", {"class": "a", "probability": 0.5})])
    records.label(f"r{number}", f"class {number}")
    print(number, flush=True)
"""


def exchange(key, *, body=None, probability=0.9, named="a", **given):
    body = key.encode() if body is None else body
    return LoggedRequest(key, "1", body, "text/plain", {"class": named, "probability": probability}, **given)


def test_acknowledged_labels_survive_kill(tmp_path):
    path, acknowledged, started = tmp_path / "requests.db", set(), 0
    for kill in range(KILLS):
        with forked.Popen(
            [sys.executable, "-c", LABELLER, str(path), str(started)], stdout=subprocess.PIPE, text=True
        ) as process:
            acknowledged.add(int(process.stdout.readline()))
            time.sleep(random.Random(kill).uniform(0.01, 0.2))
            process.kill()
            acknowledged |= {int(line) for line in process.stdout if line.endswith("\n")}
        started = max(acknowledged) + 2  # one more may have been written and not acknowledged
        with RequestLog(path) as records:
            labels = {sample.request.id: sample.label for sample in records.labeled_requests()}
            assert {f"r{number}": f"class {number}" for number in acknowledged}.items() <= labels.items()
            assert len(labels) - len(acknowledged) <= kill + 1
    assert len(acknowledged) > KILLS
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_commits_wait_for_the_disk(records):
    assert records._fetch_one("PRAGMA journal_mode") == ("wal",)
    assert records._fetch_one("PRAGMA synchronous") == (2,)


def test_what_was_sent_comes_back_as_it_was(records):
    sent = exchange("x", body=bytes(range(256)), features=b"1234", time=12.5)
    assert records.append([sent]) == 1
    found = records.find("x")
    assert (found.body, found.content_type, found.prediction, found.time, found.features) == (
        sent.body, sent.content_type, sent.prediction, 12.5, b"1234",
    )  # fmt: skip


def test_a_label_says_what_changed_and_history_is_kept(records):
    records.append([exchange("x")])
    assert records.label("x", "b").previous_class is None
    second = records.label("x", " a ")
    assert (second.class_name, second.previous_class, second.agrees) == ("a", "b", True)
    assert records.history("x") == ["b", "a"]
    assert [sample.label for sample in records.labeled_requests()] == ["a"]
    assert records.stats().num_labels == 2


def test_a_class_never_seen_before_is_taken(records):
    records.append([exchange("x"), exchange("y")])
    records.label("x", "eleventh")
    records.label("y", "a")
    assert records.classes() == ["a", "eleventh"]


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, "a\nb", "a\0b"])
def test_a_name_that_cannot_be_a_class_is_refused(records, name):
    records.append([exchange("x")])
    with pytest.raises(tf.DataError, match="cannot name a class"):
        records.label("x", name)
    assert records.history("x") == []


def test_a_label_for_what_is_not_kept_is_refused(records):
    with pytest.raises(tf.UnknownNameError, match="no request 'x' is kept"):
        records.label("x", "a")


def test_a_fixed_share_is_held_out_and_the_sides_are_apart(records):
    records.append([exchange(f"r{number}") for number in range(400)])
    for number in range(400):
        records.label(f"r{number}", "a")
    train = {sample.request.id for sample in records.labeled_requests("train")}
    held_out = {sample.request.id for sample in records.labeled_requests("held-out")}
    assert not train & held_out
    assert len(train | held_out) == 400
    assert 50 <= len(held_out) <= 110  # 0.2 of 400, four deviations around
    assert records.stats().num_held_out == len(held_out)


def test_the_same_content_is_on_one_side_and_counts_once_with_its_newest_label(records):
    for number in range(40):
        records.append([exchange(f"a{number}", body=b"%d" % number), exchange(f"b{number}", body=b"%d" % number)])
        assert records.label(f"a{number}", "a").held_out == records.label(f"b{number}", "b").held_out
    assert [sample.label for sample in records.labeled_requests()] == ["b"] * 40
    records.label("a7", "c")
    assert [sample.label for sample in records.labeled_requests()].count("c") == 1
    assert len(list(records.labeled_requests())) == 40


def test_one_picture_sent_in_two_ways_counts_as_one(records):
    records.append([exchange("png", content_digest="same"), exchange("bmp", content_digest="same")])
    assert records.label("png", "a").held_out == records.label("bmp", "a").held_out
    assert len(list(records.labeled_requests())) == 1


def test_a_share_given_later_moves_nothing(tmp_path):
    with RequestLog(tmp_path / "r.db", held_out_fraction=0.5) as records:
        records.append([exchange("x")])
        side = records.label("x", "a").held_out
    with RequestLog(tmp_path / "r.db", held_out_fraction=0.0) as records:
        assert records.held_out_fraction == 0.5
        assert records.label("x", "b").held_out == side


def test_the_oldest_unlabelled_go_first_and_a_labelled_one_never(tmp_path):
    with RequestLog(tmp_path / "r.db", max_mb=1) as records:
        records.append([exchange("old", body=b"old" * 10_000)])
        records.label("old", "a")
        for number in range(200):
            assert records.append([exchange(f"r{number}", body=os.urandom(20_000))]) == 1
        assert records.find("old") is not None
        assert records.find("r0") is None
        assert records.find("r199") is not None
        assert records.num_evicted > 100
        assert records.stats().used_bytes < 1.1 * 2**20
    assert (tmp_path / "r.db").stat().st_size < 1.2 * 2**20


def test_full_of_labels_it_says_so_and_keeps_no_new_one(tmp_path):
    with RequestLog(tmp_path / "r.db", max_mb=1) as records:
        number = 0
        while not records.is_full:
            records.append([exchange(f"r{number}", body=os.urandom(50_000))])
            records.label(f"r{number}", "a")
            number += 1
        assert records.append([exchange("late")]) == 0
        assert records.num_rejected == 1
        assert records.stats().num_labeled == number
        assert records.label("r0", "b").previous_class == "a"


def test_a_body_of_more_than_a_tenth_of_the_cap_is_not_kept(tmp_path):
    with RequestLog(tmp_path / "r.db", max_mb=1) as records:
        records.append([exchange("small")])
        assert records.append([exchange("large", body=bytes(200_000))]) == 0
        assert records.find("small") is not None


def test_the_least_certain_comes_first_and_labelled_ones_do_not(records):
    records.append([exchange("sure", probability=0.99), exchange("torn", probability=0.4)])
    records.append([exchange("half", probability=0.6), exchange("number", named=None, probability=None)])
    seen = []
    while (found := records.least_certain(skip=["half"])) is not None:
        seen.append(found.id)
        records.label(found.id, "a")
    assert seen == ["torn", "sure", "number"]


def test_judged_gives_answer_and_truth_of_the_newest(records):
    records.append([exchange("1", named="a"), exchange("2", named="b"), exchange("3", named="a")])
    for key in "123":
        records.label(key, "a")
    assert records.labeled_predictions() == [("a", "a"), ("b", "a"), ("a", "a")]
    assert records.labeled_predictions(limit=1) == [("a", "a")]
    assert records.labeled_predictions(version="2") == []


def test_an_id_is_kept_once(records):
    assert records.append([exchange("x", body=b"1"), exchange("x", body=b"2")]) == 1
    assert records.find("x").body == b"1"


def test_threads_and_two_openings_share_the_file(records):
    records.append([exchange(f"r{number}") for number in range(40)])
    with RequestLog(records.path) as other:

        def work(opened, numbers):
            for number in numbers:
                opened.label(f"r{number}", "a")

        threads = [
            threading.Thread(target=work, args=(opened, range(start, 40, 4)))
            for start, opened in enumerate([records, records, other, other])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(other.labeled_requests())) == 40


def test_a_file_that_is_no_records_file_is_refused(tmp_path):
    (tmp_path / "r.db").write_bytes(b"something else" * 100)
    with pytest.raises(tf.FolderError, match="cannot use"):
        RequestLog(tmp_path / "r.db")
    with pytest.raises(tf.FolderError, match="cannot open"):
        RequestLog(tmp_path / "none" / "r.db")


def test_a_file_of_a_later_kind_is_refused(tmp_path):
    RequestLog(tmp_path / "r.db").close()
    later = sqlite3.connect(tmp_path / "r.db")
    later.execute("PRAGMA user_version=9")
    later.close()
    with pytest.raises(tf.FolderError, match="kind 9"):
        RequestLog(tmp_path / "r.db")


def test_a_share_of_keys_is_that_share():
    assert 0.27 < sum(is_sampled(str(number), 0.3, salt="x") for number in range(4000)) / 4000 < 0.33
    assert not is_sampled("x", 0, salt="x")
    assert is_sampled("x", 1, salt="x")


def test_tensors_come_back_as_they_were_sent_and_broken_ones_are_said(records):
    rows = {"words": torch.arange(6).reshape(2, 3), "size": torch.tensor([[0.5], [-1.0]])}
    for place in range(2):
        records.append([LoggedRequest(f"r{place}", "1", encode_row(rows, place), TENSORS, {})])
    back = records.find("r1").decode(None)
    assert {name: tensor.tolist() for name, tensor in back.items()} == {"words": [3, 4, 5], "size": [-1.0]}
    assert LoggedRequest("x", "1", encode_row(rows["size"], 0), TENSORS, {}).decode(None).tolist() == [0.5]
    with pytest.raises(tf.DataError, match="tensors of request 'x' cannot be read"):
        LoggedRequest("x", "1", b"no tensors", TENSORS, {}).decode(None)


def test_a_label_knows_how_many_came_before_it(records):
    records.append([exchange(each) for each in "abc"])
    for each, name in zip("abca", "xyzy", strict=True):
        records.label(each, name)
    assert [(each.request.id, each.label_number) for each in records.labeled_requests()] == [
        ("b", 2),
        ("c", 3),
        ("a", 4),
    ]


def test_the_database_of_something_else_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE users (name TEXT)")
        other.commit()
    before = path.read_bytes()
    with pytest.raises(tf.FolderError, match="a database of something else"):
        RequestLog(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["other.db"]
