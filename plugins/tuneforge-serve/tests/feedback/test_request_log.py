"""The request log keeps acknowledged labels, stays below its size, and never mixes training and held-out samples.

TUNEFORGE_FEEDBACK_KILLS sets how often the labeling process is killed (by default 3 times).
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

LABEL_FOREVER = """
import itertools, sys
from tuneforge_serve.feedback.request_log import LoggedRequest, RequestLog
start, log = int(sys.argv[2]), RequestLog(sys.argv[1])
for number in itertools.count(start):
    log.append([LoggedRequest(f"r{number}", "1", b"%d" % number, "text/plain", {"class": "a", "probability": 0.5})])
    log.label(f"r{number}", f"class {number}")
    print(number, flush=True)
"""


def make_request(key, *, body=None, probability=0.9, predicted="a", **options):
    body = key.encode() if body is None else body
    return LoggedRequest(key, "1", body, "text/plain", {"class": predicted, "probability": probability}, **options)


def test_acknowledged_labels_survive_kill(tmp_path):
    path, acknowledged, started = tmp_path / "requests.db", set(), 0
    for kill in range(KILLS):
        with forked.Popen(
            [sys.executable, "-c", LABEL_FOREVER, str(path), str(started)], stdout=subprocess.PIPE, text=True
        ) as process:
            acknowledged.add(int(process.stdout.readline()))
            time.sleep(random.Random(kill).uniform(0.01, 0.2))
            process.kill()
            acknowledged |= {int(line) for line in process.stdout if line.endswith("\n")}
        started = max(acknowledged) + 2  # one more may have been written without an acknowledgment
        with RequestLog(path) as request_log:
            labels = {sample.request.id: sample.label for sample in request_log.labeled_requests()}
            assert {f"r{number}": f"class {number}" for number in acknowledged}.items() <= labels.items()
            assert len(labels) - len(acknowledged) <= kill + 1
    assert len(acknowledged) > KILLS
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_commits_wait_for_the_disk(request_log):
    assert request_log._fetch_one("PRAGMA journal_mode") == ("wal",)
    assert request_log._fetch_one("PRAGMA synchronous") == (2,)


def test_request_is_read_back_unchanged(request_log):
    sent = make_request("x", body=bytes(range(256)), features=b"1234", time=12.5)
    assert request_log.append([sent]) == 1
    found = request_log.find("x")
    assert (found.body, found.content_type, found.prediction, found.time, found.features) == (
        sent.body, sent.content_type, sent.prediction, 12.5, b"1234",
    )  # fmt: skip


def test_label_reports_the_previous_one_and_history_keeps_all(request_log):
    request_log.append([make_request("x")])
    assert request_log.label("x", "b").previous_class is None
    second = request_log.label("x", " a ")
    assert (second.class_name, second.previous_class, second.agrees) == ("a", "b", True)
    assert request_log.history("x") == ["b", "a"]
    assert [sample.label for sample in request_log.labeled_requests()] == ["a"]
    assert request_log.stats().num_labels == 2


def test_new_class_is_accepted(request_log):
    request_log.append([make_request("x"), make_request("y")])
    request_log.label("x", "eleventh")
    request_log.label("y", "a")
    assert request_log.classes() == ["a", "eleventh"]


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, "a\nb", "a\0b"])
def test_invalid_class_name_is_refused(request_log, name):
    request_log.append([make_request("x")])
    with pytest.raises(tf.DataError, match="cannot be a class name"):
        request_log.label("x", name)
    assert request_log.history("x") == []


def test_label_for_an_unknown_request_is_refused(request_log):
    with pytest.raises(tf.UnknownNameError, match="the request log has no request 'x'"):
        request_log.label("x", "a")


def test_fixed_fraction_is_held_out(request_log):
    request_log.append([make_request(f"r{number}") for number in range(400)])
    for number in range(400):
        request_log.label(f"r{number}", "a")
    train = {sample.request.id for sample in request_log.labeled_requests("train")}
    held_out = {sample.request.id for sample in request_log.labeled_requests("held-out")}
    assert not train & held_out
    assert len(train | held_out) == 400
    assert 50 <= len(held_out) <= 110  # 0.2 of 400, within four standard deviations
    assert request_log.stats().num_held_out == len(held_out)


def test_equal_inputs_are_on_one_side_and_count_once_with_their_last_label(request_log):
    for number in range(40):
        request_log.append(
            [make_request(f"a{number}", body=b"%d" % number), make_request(f"b{number}", body=b"%d" % number)]
        )
        assert request_log.label(f"a{number}", "a").held_out == request_log.label(f"b{number}", "b").held_out
    assert [sample.label for sample in request_log.labeled_requests()] == ["b"] * 40
    request_log.label("a7", "c")
    assert [sample.label for sample in request_log.labeled_requests()].count("c") == 1
    assert len(list(request_log.labeled_requests())) == 40


def test_one_image_in_two_encodings_counts_once(request_log):
    request_log.append([make_request("png", content_digest="same"), make_request("bmp", content_digest="same")])
    assert request_log.label("png", "a").held_out == request_log.label("bmp", "a").held_out
    assert len(list(request_log.labeled_requests())) == 1


def test_held_out_fraction_is_fixed_when_the_file_is_created(tmp_path):
    with RequestLog(tmp_path / "r.db", held_out_fraction=0.5) as request_log:
        request_log.append([make_request("x")])
        side = request_log.label("x", "a").held_out
    with RequestLog(tmp_path / "r.db", held_out_fraction=0.0) as request_log:
        assert request_log.held_out_fraction == 0.5
        assert request_log.label("x", "b").held_out == side


def test_oldest_unlabeled_requests_are_removed_first_and_labeled_ones_never(tmp_path):
    with RequestLog(tmp_path / "r.db", max_mb=1) as request_log:
        request_log.append([make_request("old", body=b"old" * 10_000)])
        request_log.label("old", "a")
        for number in range(200):
            assert request_log.append([make_request(f"r{number}", body=os.urandom(20_000))]) == 1
        assert request_log.find("old") is not None
        assert request_log.find("r0") is None
        assert request_log.find("r199") is not None
        assert request_log.num_evicted > 100
        assert request_log.stats().used_bytes < 1.1 * 2**20
    assert (tmp_path / "r.db").stat().st_size < 1.2 * 2**20


def test_log_full_of_labels_drops_new_requests(tmp_path):
    with RequestLog(tmp_path / "r.db", max_mb=1) as request_log:
        number = 0
        while not request_log.is_full:
            request_log.append([make_request(f"r{number}", body=os.urandom(50_000))])
            request_log.label(f"r{number}", "a")
            number += 1
        assert request_log.append([make_request("late")]) == 0
        assert request_log.num_rejected == 1
        assert request_log.stats().num_labeled == number
        assert request_log.label("r0", "b").previous_class == "a"


def test_body_of_more_than_a_tenth_of_the_limit_is_dropped(tmp_path):
    with RequestLog(tmp_path / "r.db", max_mb=1) as request_log:
        request_log.append([make_request("small")])
        assert request_log.append([make_request("large", body=bytes(200_000))]) == 0
        assert request_log.find("small") is not None


def test_least_certain_unlabeled_request_comes_first(request_log):
    request_log.append([make_request("sure", probability=0.99), make_request("torn", probability=0.4)])
    request_log.append(
        [make_request("half", probability=0.6), make_request("number", predicted=None, probability=None)]
    )
    seen = []
    while (found := request_log.least_certain(skip=["half"])) is not None:
        seen.append(found.id)
        request_log.label(found.id, "a")
    assert seen == ["torn", "sure", "number"]


def test_labeled_predictions_are_those_of_the_newest_requests(request_log):
    request_log.append(
        [make_request("1", predicted="a"), make_request("2", predicted="b"), make_request("3", predicted="a")]
    )
    for key in "123":
        request_log.label(key, "a")
    assert request_log.labeled_predictions() == [("a", "a"), ("b", "a"), ("a", "a")]
    assert request_log.labeled_predictions(limit=1) == [("a", "a")]
    assert request_log.labeled_predictions(version="2") == []


def test_id_is_logged_once(request_log):
    assert request_log.append([make_request("x", body=b"1"), make_request("x", body=b"2")]) == 1
    assert request_log.find("x").body == b"1"


def test_threads_and_two_connections_share_the_file(request_log):
    request_log.append([make_request(f"r{number}") for number in range(40)])
    with RequestLog(request_log.path) as other:

        def work(opened, numbers):
            for number in numbers:
                opened.label(f"r{number}", "a")

        threads = [
            threading.Thread(target=work, args=(opened, range(start, 40, 4)))
            for start, opened in enumerate([request_log, request_log, other, other])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(other.labeled_requests())) == 40


def test_other_file_is_refused(tmp_path):
    (tmp_path / "r.db").write_bytes(b"something else" * 100)
    with pytest.raises(tf.FolderError, match="cannot use"):
        RequestLog(tmp_path / "r.db")
    with pytest.raises(tf.FolderError, match="cannot open"):
        RequestLog(tmp_path / "none" / "r.db")


def test_file_of_a_later_format_is_refused(tmp_path):
    RequestLog(tmp_path / "r.db").close()
    later = sqlite3.connect(tmp_path / "r.db")
    later.execute("PRAGMA user_version=9")
    later.close()
    with pytest.raises(tf.FolderError, match="format 9"):
        RequestLog(tmp_path / "r.db")


def test_sampled_fraction_of_keys_is_close_to_the_rate():
    assert 0.27 < sum(is_sampled(str(number), 0.3, salt="x") for number in range(4000)) / 4000 < 0.33
    assert not is_sampled("x", 0, salt="x")
    assert is_sampled("x", 1, salt="x")


def test_tensors_are_read_back_unchanged_and_broken_ones_are_reported(request_log):
    rows = {"words": torch.arange(6).reshape(2, 3), "size": torch.tensor([[0.5], [-1.0]])}
    for row in range(2):
        request_log.append([LoggedRequest(f"r{row}", "1", encode_row(rows, row), TENSORS, {})])
    back = request_log.find("r1").decode(None)
    assert {name: tensor.tolist() for name, tensor in back.items()} == {"words": [3, 4, 5], "size": [-1.0]}
    assert LoggedRequest("x", "1", encode_row(rows["size"], 0), TENSORS, {}).decode(None).tolist() == [0.5]
    with pytest.raises(tf.DataError, match="tensors of request 'x' cannot be read"):
        LoggedRequest("x", "1", b"no tensors", TENSORS, {}).decode(None)


def test_label_knows_its_position(request_log):
    request_log.append([make_request(each) for each in "abc"])
    for each, name in zip("abca", "xyzy", strict=True):
        request_log.label(each, name)
    assert [(each.request.id, each.label_number) for each in request_log.labeled_requests()] == [
        ("b", 2),
        ("c", 3),
        ("a", 4),
    ]


def test_database_of_another_program_is_refused_and_left_unchanged(tmp_path):
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE users (name TEXT)")
        other.commit()
    before = path.read_bytes()
    with pytest.raises(tf.FolderError, match="the database of another program"):
        RequestLog(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["other.db"]
