"""Feedback on a running server: labels arrive and last, the page asks for them, and watching says how it stands.

TUNEFORGE_FEEDBACK_KILLS sets how often the server is killed under labels (1 by default, 50 for the full proof);
TUNEFORGE_SCREENSHOTS names a folder for the picture of the page.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import forked
import pytest
import torch
from browser import MISSING, browser, installed
from bundles import digits as finished_digits
from bundles import png
from starlette.requests import Request

import tuneforge as tf

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
from tuneforge_serve.endpoint_test import measure as wire
from tuneforge_serve.endpoint_test.http_client import ServerClient
from tuneforge_serve.feedback.request_log import RequestLog, is_sampled
from tuneforge_serve.server.request_logger import allows_logging
from tuneforge_serve.server.routes_feedback import SampledRequestLog, feedback_routes

from tuneforge.builtin.datasets.demo.digit_images import real_digits

KILLS = int(os.environ.get("TUNEFORGE_FEEDBACK_KILLS", "1"))
JSON = {"Content_Type": "application/json"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    step = tf.Phase("head", train="head", steps=20, lr=1e-2)
    return finished_digits(tmp_path_factory.mktemp("runs") / "run", step, per_class=10)


def pngs(count):
    images, labels = real_digits()
    return [(png(image * 15.9375), str(label)) for image, label in zip(images[:count], labels[:count], strict=True)]


def kept_by(records, share=1.0):
    """What a server is given that keeps a share of its requests."""
    return {"request_log": SampledRequestLog(records, share), "extra_routes": [feedback_routes(records)]}


@pytest.fixture
def served(digits, records, serving):
    with serving(digits.run_dir, **kept_by(records)) as server:
        connection = ServerClient(server.url).connect()
        yield connection, server.url
        connection.close()


def predict(connection, content):
    return connection.request("POST", "/predict", content, Content_Type="image/png")[0]


def label(connection, request_id, name):
    return connection.request("POST", "/feedback", json.dumps({"id": request_id, "class": name}).encode(), **JSON)[0]


def test_an_answered_request_takes_its_label_at_once(served, records):
    connection, _ = served
    ((content, name),) = pngs(1)
    answer = predict(connection, content)
    assert label(connection, answer["id"], "eleventh")["previous"] is None
    second = label(connection, answer["id"], name)
    assert (second["previous"], second["agrees"]) == ("eleventh", answer["class"] == name)
    (sample,) = records.labeled_requests()
    assert (sample.request.body, sample.request.content_type, sample.label) == (content, "image/png", name)
    assert sample.request.version == answer["version"]
    assert sample.request.prediction["probabilities"] == answer["probabilities"]


def infer(connection, pixels, **more):
    """Ask over the Open Inference Protocol for rows of stored pictures (b, 1, 32, 32)."""
    tensor = {"name": "input", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.flatten().tolist()}
    return connection.request(
        "POST", "/v2/models/run/infer", json.dumps({"inputs": [tensor], **more}).encode(), **JSON
    )[0]


def test_what_goes_over_v2_is_kept_and_labelled_like_the_rest(served, records, digits):
    connection, _ = served
    inputs = tf.load(digits.run_dir).inputs
    pixels = torch.stack([inputs.decode(content) for content, _ in pngs(3)])
    alone, named, several = (
        infer(connection, pixels[:1]),
        infer(connection, pixels[1:2], id="7"),
        infer(connection, pixels),
    )
    assert (named["id"], infer(connection, pixels[:1], id="7")["id"]) == ("7", "7")  # a client may say it twice
    ids = [alone["id"], named["parameters"]["feedback_id"], *(f"{several['id']}-{row}" for row in range(3))]
    assert [label(connection, each, "3")["previous"] for each in ids] == [None] * 5
    kept = [records.find(each) for each in ids]
    assert all(torch.equal(each.decode(inputs), pixels[row]) for each, row in zip(kept, (0, 1, 0, 1, 2), strict=True))
    assert [each.prediction["class"] for each in kept] == [
        json.loads(text)["class"] for answer in (alone, named, several) for text in answer["outputs"][1]["data"]
    ]
    ((content, _),) = pngs(1)
    again = records.find(label(connection, predict(connection, content)["id"], "4")["id"])
    assert (
        again.content_digest == kept[0].content_digest
    )  # sent as a file it is the same content, and its newest label counts
    assert [each.label for each in records.labeled_requests()] == ["3", "3", "4"]
    assert again.features == kept[0].features
    infer(connection, pixels[:1])
    assert connection.request("GET", "/review/next")[0]["image"].startswith("data:image/png;base64,")


def test_what_a_client_does_not_want_kept_is_not(served, records):
    connection, _ = served
    ((content, _),) = pngs(1)
    private = {"Cache_Control": "max-age=0, no-store"}
    connection.request("POST", "/predict", content, Content_Type="image/png", **private)
    tensor = {"name": "input", "datatype": "UINT8", "shape": [1, 1, 32, 32], "data": [0] * 1024}
    body = json.dumps({"inputs": [tensor]}).encode()
    connection.request("POST", "/v2/models/run/infer", body, **JSON, **private)
    connection.request(
        "POST", "/predict", content, Content_Type="application/x-safetensors"
    )  # a name that is ours alone
    assert connection.request("GET", "/monitoring")[0]["request_log"]["requests"] <= 1
    (kept,) = [records.least_certain()]
    assert kept.content_type == "application/octet-stream"
    assert records.stats().num_requests == 1


def test_the_wire_test_leaves_no_trace_in_the_records(served, records, digits):
    wire.measure_endpoint(ServerClient(served[1]), wire.prepare_run(digits.run_dir), batch_size=16)
    served[0].request("GET", "/review/next")
    assert records.stats().num_requests == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "400.*no valid JSON"),
        (b"[]", "400.*an object with id and class"),
        (b'{"id": "x"}', "400.*an object with id and class"),
        (b'{"id": "x", "class": 3}', "400.*class: a text is needed"),
        (b'{"id": "x", "class": "3"}', "404.*no request 'x' is kept"),
        (b'{"id": "x", "class": "a\\nb"}', "422.*cannot name a class"),
    ],
)
def test_a_wrong_label_is_refused_by_its_field(served, body, said):
    with pytest.raises(tf.DataError, match=said):
        served[0].request("POST", "/feedback", body, **JSON)


def test_the_test_split_over_the_wire_equals_the_offline_report(served, digits):
    run = wire.prepare_run(digits.run_dir)
    measured = wire.measure_endpoint(
        ServerClient(served[1]), run, offline=digits.report["splits"], batch_size=16, concurrency=2
    )
    assert len(measured.comparisons["test"]) > 40
    assert [each for each in measured.comparisons["test"] if not each.equal] == []


def test_only_the_share_is_kept(digits, records, serving):
    with serving(digits.run_dir, **kept_by(records, share=0.5)) as server:
        connection = ServerClient(server.url).connect()
        ids = [predict(connection, content)["id"] for content, _ in pngs(60)]
        connection.request("GET", "/review/next")
        connection.close()
    kept = {each for each in ids if records.find(each) is not None}
    assert 15 <= len(kept) <= 45
    assert kept == {each for each in ids if is_sampled(each, 0.5, salt="sample")}


def test_review_gives_the_least_certain_first_with_its_picture(served, records):
    connection, _ = served
    answers = sorted((predict(connection, content) for content, _ in pngs(20)), key=lambda each: each["probability"])
    first, _ = connection.request("GET", "/review/next")
    assert (first["id"], first["class"], first["left"]) == (answers[0]["id"], answers[0]["class"], 20)
    assert first["image"].startswith("data:image/png;base64,")
    assert first["classes"] == list("0123456789")
    second, _ = connection.request("GET", f"/review/next?skip={first['id']}")
    assert second["id"] == answers[1]["id"]
    label(connection, first["id"], "new pen")
    third, _ = connection.request("GET", "/review/next")
    assert (third["id"], third["classes"][-1], third["num_labeled"]) == (answers[1]["id"], "new pen", 1)


def test_watching_is_on_the_metrics_and_tells_drift(served):
    connection, url = served
    for content, name in pngs(40):
        label(connection, predict(connection, content)["id"], name)
    (seen,) = connection.request("GET", "/monitoring")[0]["models"]
    assert seen["accuracy"]["total"] == 40
    assert seen["accuracy"]["low"] < seen["accuracy"]["proportion"] < seen["accuracy"]["high"]
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (share,) = [
        line for line in lines if line.startswith("tuneforge_labeled_accuracy{") and 'bound="proportion"' in line
    ]
    assert float(share.split()[-1]) == seen["accuracy"]["proportion"]
    assert 'tuneforge_logged_requests{state="labeled"} 40.0' in lines
    assert len({line.split()[2] for line in lines if line.startswith("# TYPE")}) == sum(
        line.startswith("# TYPE") for line in lines
    )


def test_acknowledged_labels_survive_the_servers_kill(digits, tmp_path):
    path, acknowledged, contents = tmp_path / "requests.db", {}, [content for content, _ in pngs(50)]
    for kill in range(KILLS):
        command = [sys.executable, "-m", "tuneforge", "serve", str(digits.run_dir), "--port", "0", "--json"]
        command += ["--records", str(path)]
        with forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            url = json.loads(process.stdout.readline())["url"]
            given = [{} for _ in range(3)]

            def work(mine, url=url, kill=kill):
                connection = ServerClient(url, timeout_s=5).connect()
                with contextlib.suppress(tf.TryAgainError):
                    for number in range(10_000):
                        found = predict(connection, contents[number % 50])["id"]
                        label(connection, found, f"{kill}-{number}")
                        mine[found] = f"{kill}-{number}"
                connection.close()

            threads = [threading.Thread(target=work, args=(mine,)) for mine in given]
            for thread in threads:
                thread.start()
            while not all(given) and any(thread.is_alive() for thread in threads):
                time.sleep(0.01)
            time.sleep(random.Random(kill).uniform(0.0, 0.3))
            process.kill()
            for thread in threads:
                thread.join()
        for mine in given:
            acknowledged |= mine
        with RequestLog(path) as records:
            assert {each: records.history(each)[-1:] for each in acknowledged} == {
                each: [name] for each, name in acknowledged.items()
            }
    assert len(acknowledged) > 3 * KILLS


@pytest.mark.skipif(not installed(), reason=MISSING)
def test_a_key_on_the_review_page_confirms_or_corrects(served, records, tmp_path):
    connection, url = served
    names = {predict(connection, content)["id"]: name for content, name in pngs(12)}
    with browser(tmp_path / "profile") as page:
        page.open(f"{url}/review")
        page.wait("return sample !== null && document.getElementById('image').naturalWidth > 0")
        first, answered = page.run("return [sample.id, sample.class]")
        page.press("\ue007")
        page.wait(f"return sample.id !== '{first}'")
        assert records.history(first) == [answered]
        second = page.run("return sample.id")
        page.press(names[second])
        third = page.wait(f"return sample.id !== '{second}' && sample.id")
        assert records.history(second) == [names[second]]
        page.press("/new pen\ue007")
        fourth = page.wait(f"return sample.id !== '{third}' && sample.id")
        assert records.history(third) == ["new pen"]
        assert page.run("return sample.classes.includes('new pen')")
        page.press("\ue014")
        page.wait(f"return sample.id !== '{fourth}'")
        assert records.history(fourth) == []
        page.press("\ue012")
        page.wait(f"return sample.id === '{third}'")
        page.press("n")
        page.wait(f"return sample.id !== '{third}'")
        assert records.history(third) == ["new pen", "new pen"]
        assert "of 3 labelled answers" in page.wait("return document.getElementById('monitoring').textContent")
        if folder := os.environ.get("TUNEFORGE_SCREENSHOTS"):
            page.picture(Path(folder) / "review.png")
        assert page.messages() == []


def test_the_page_is_safe_with_hostile_names(served, records):
    connection, _ = served
    ((content, _),) = pngs(1)
    label(connection, predict(connection, content)["id"], "<img src=x onerror=alert(1)>")
    with urllib.request.urlopen(served[1] + "/review") as answer:
        policy, text = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy
    assert "onerror" not in text
    assert "innerHTML" not in text


def test_a_wish_not_to_be_kept_is_heard_in_any_of_several_headers():
    def kept(*values):
        headers = [(b"cache-control", value) for value in values]
        return allows_logging(Request({"type": "http", "headers": headers}))

    assert kept()
    assert kept(b"no-cache", b"max-age=0")
    assert not kept(b"no-cache", b"max-age=0, No-Store")
