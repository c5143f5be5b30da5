"""Feedback on a running server: durable labels, the review page, and monitoring of accuracy and drift.

TUNEFORGE_FEEDBACK_KILLS sets how often the server is killed while it takes labels (by default once);
TUNEFORGE_SCREENSHOTS names a directory for the screenshot of the page.
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
from tuneforge_serve.endpoint_test.http_client import ServerClient
from tuneforge_serve.endpoint_test.measure import measure_endpoint, prepare_endpoint_data
from tuneforge_serve.feedback.request_log import RequestLog, is_sampled
from tuneforge_serve.server.request_logger import allows_logging
from tuneforge_serve.server.routes_feedback import SampledRequestLog, feedback_routes

import tuneforge as tf
from tuneforge.builtin.datasets.demo.digit_images import real_digits

KILLS = int(os.environ.get("TUNEFORGE_FEEDBACK_KILLS", "1"))
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    step = tf.Phase("head", train="head", steps=20, lr=1e-2)
    return finished_digits(tmp_path_factory.mktemp("runs") / "run", step, per_class=10)


def pngs(count):
    images, labels = real_digits()
    return [(png(image * 15.9375), str(label)) for image, label in zip(images[:count], labels[:count], strict=True)]


def logging_to(request_log, sample_rate=1.0):
    """Return the options of a server that logs a fraction of its requests."""
    return {"request_log": SampledRequestLog(request_log, sample_rate), "extra_routes": [feedback_routes(request_log)]}


@pytest.fixture
def served(digits, request_log, serving):
    with serving(digits.run_dir, **logging_to(request_log)) as server, ServerClient(server.url) as client:
        yield client, server.url


def predict(client, content):
    return client.request("POST", "/predict", content, {"Content-Type": "image/png"})[0]


def label(client, request_id, name):
    return client.request("POST", "/feedback", json.dumps({"id": request_id, "class": name}).encode(), JSON)[0]


def test_request_can_be_labeled_at_once(served, request_log):
    client, _ = served
    ((content, name),) = pngs(1)
    answer = predict(client, content)
    assert label(client, answer["id"], "eleventh")["previous"] is None
    second = label(client, answer["id"], name)
    assert (second["previous"], second["agrees"]) == ("eleventh", answer["class"] == name)
    (sample,) = request_log.labeled_requests()
    assert (sample.request.body, sample.request.content_type, sample.label) == (content, "image/png", name)
    assert sample.request.version == answer["version"]
    assert sample.request.prediction["probabilities"] == answer["probabilities"]


def infer(client, pixels, **options):
    """Predict stored images (b, 1, 32, 32) by the Open Inference Protocol."""
    tensor = {"name": "input", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.flatten().tolist()}
    return client.request("POST", "/v2/models/run/infer", json.dumps({"inputs": [tensor], **options}).encode(), JSON)[0]


def test_v2_requests_are_logged_and_labeled(served, request_log, digits):
    client, _ = served
    inputs = tf.load(digits.run_dir).inputs
    pixels = torch.stack([inputs.decode(content) for content, _ in pngs(3)])
    alone, named, several = (
        infer(client, pixels[:1]),
        infer(client, pixels[1:2], id="7"),
        infer(client, pixels),
    )
    assert (named["id"], infer(client, pixels[:1], id="7")["id"]) == ("7", "7")  # a client may repeat its id
    ids = [alone["id"], named["parameters"]["feedback_id"], *(f"{several['id']}-{row}" for row in range(3))]
    assert [label(client, each, "3")["previous"] for each in ids] == [None] * 5
    kept = [request_log.find(each) for each in ids]
    assert all(torch.equal(each.decode(inputs), pixels[row]) for each, row in zip(kept, (0, 1, 0, 1, 2), strict=True))
    assert [each.prediction["class"] for each in kept] == [
        json.loads(text)["class"] for answer in (alone, named, several) for text in answer["outputs"][1]["data"]
    ]
    ((content, _),) = pngs(1)
    again = request_log.find(label(client, predict(client, content)["id"], "4")["id"])
    assert again.content_digest == kept[0].content_digest  # the same input sent as a file
    assert [each.label for each in request_log.labeled_requests()] == ["3", "3", "4"]
    assert again.features == kept[0].features
    infer(client, pixels[:1])
    assert client.request("GET", "/review/next")[0]["image"].startswith("data:image/png;base64,")


def test_no_store_requests_are_not_logged(served, request_log):
    client, _ = served
    ((content, _),) = pngs(1)
    private = {"Cache-Control": "max-age=0, no-store"}
    client.request("POST", "/predict", content, {"Content-Type": "image/png", **private})
    tensor = {"name": "input", "datatype": "UINT8", "shape": [1, 1, 32, 32], "data": [0] * 1024}
    body = json.dumps({"inputs": [tensor]}).encode()
    client.request("POST", "/v2/models/run/infer", body, {**JSON, **private})
    client.request("POST", "/predict", content, {"Content-Type": "application/x-safetensors"})  # an internal type
    assert client.request("GET", "/monitoring")[0]["request_log"]["requests"] <= 1
    (kept,) = [request_log.least_certain()]
    assert kept.content_type == "application/octet-stream"
    assert request_log.stats().num_requests == 1


def test_endpoint_test_is_not_logged(served, request_log, digits):
    measure_endpoint(served[0], prepare_endpoint_data(digits.run_dir), batch_size=16)
    served[0].request("GET", "/review/next")
    assert request_log.stats().num_requests == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "400.*not valid JSON"),
        (b"[]", "400.*an object with id and class"),
        (b'{"id": "x"}', "400.*an object with id and class"),
        (b'{"id": "x", "class": 3}', "400.*class: a string is required"),
        (b'{"id": "x", "class": "3"}', "404.*the request log has no request 'x'"),
        (b'{"id": "x", "class": "a\\nb"}', "422.*cannot be a class name"),
    ],
)
def test_wrong_label_is_refused_with_the_field(served, body, message):
    with pytest.raises(tf.DataError, match=message):
        served[0].request("POST", "/feedback", body, JSON)


def test_metrics_of_the_endpoint_test_equal_the_offline_report(served, digits):
    data = prepare_endpoint_data(digits.run_dir)
    result = measure_endpoint(served[0], data, offline=digits.report["splits"], batch_size=16, concurrency=2)
    assert len(result.comparisons["test"]) > 40
    assert [each for each in result.comparisons["test"] if not each.equal] == []


def test_sample_rate_logs_a_fixed_fraction(digits, request_log, serving):
    with (
        serving(digits.run_dir, **logging_to(request_log, sample_rate=0.5)) as server,
        ServerClient(server.url) as client,
    ):
        ids = [predict(client, content)["id"] for content, _ in pngs(60)]
        client.request("GET", "/review/next")
    kept = {each for each in ids if request_log.find(each) is not None}
    assert 15 <= len(kept) <= 45
    assert kept == {each for each in ids if is_sampled(each, 0.5, salt="sample")}


def test_review_returns_the_least_certain_request_with_its_image(served, request_log):
    client, _ = served
    answers = sorted((predict(client, content) for content, _ in pngs(20)), key=lambda each: each["probability"])
    first, _ = client.request("GET", "/review/next")
    assert (first["id"], first["class"], first["left"]) == (answers[0]["id"], answers[0]["class"], 20)
    assert first["image"].startswith("data:image/png;base64,")
    assert first["classes"] == list("0123456789")
    second, _ = client.request("GET", f"/review/next?skip={first['id']}")
    assert second["id"] == answers[1]["id"]
    label(client, first["id"], "new pen")
    third, _ = client.request("GET", "/review/next")
    assert (third["id"], third["classes"][-1], third["num_labeled"]) == (answers[1]["id"], "new pen", 1)


def test_monitoring_is_part_of_the_prometheus_metrics(served):
    client, url = served
    for content, name in pngs(40):
        label(client, predict(client, content)["id"], name)
    (seen,) = client.request("GET", "/monitoring")[0]["models"]
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


def test_acknowledged_labels_survive_a_kill_of_the_server(digits, tmp_path):
    path, acknowledged, contents = tmp_path / "requests.db", {}, [content for content, _ in pngs(50)]
    for kill in range(KILLS):
        command = [sys.executable, "-m", "tuneforge", "serve", str(digits.run_dir), "--port", "0", "--json"]
        command += ["--request-log", str(path)]
        with forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            url = json.loads(process.stdout.readline())["url"]
            given = [{} for _ in range(3)]

            def work(mine, url=url, kill=kill):
                with contextlib.suppress(tf.TryAgainError), ServerClient(url, timeout_s=5) as client:
                    for number in range(10_000):
                        found = predict(client, contents[number % 50])["id"]
                        label(client, found, f"{kill}-{number}")
                        mine[found] = f"{kill}-{number}"

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
        with RequestLog(path) as request_log:
            assert {each: request_log.history(each)[-1:] for each in acknowledged} == {
                each: [name] for each, name in acknowledged.items()
            }
    assert len(acknowledged) > 3 * KILLS


@pytest.mark.skipif(not installed(), reason=MISSING)
def test_keys_of_the_review_page_confirm_or_correct(served, request_log, tmp_path):
    client, url = served
    names = {predict(client, content)["id"]: name for content, name in pngs(12)}
    with browser(tmp_path / "profile") as page:
        page.open(f"{url}/review")
        page.wait("return sample !== null && document.getElementById('image').naturalWidth > 0")
        first, answered = page.run("return [sample.id, sample.class]")
        page.press("\ue007")
        page.wait(f"return sample.id !== '{first}'")
        assert request_log.history(first) == [answered]
        second = page.run("return sample.id")
        page.press(names[second])
        third = page.wait(f"return sample.id !== '{second}' && sample.id")
        assert request_log.history(second) == [names[second]]
        page.press("/new pen\ue007")
        fourth = page.wait(f"return sample.id !== '{third}' && sample.id")
        assert request_log.history(third) == ["new pen"]
        assert page.run("return sample.classes.includes('new pen')")
        page.press("\ue014")
        page.wait(f"return sample.id !== '{fourth}'")
        assert request_log.history(fourth) == []
        page.press("\ue012")
        page.wait(f"return sample.id === '{third}'")
        page.press("n")
        page.wait(f"return sample.id !== '{third}'")
        assert request_log.history(third) == ["new pen", "new pen"]
        assert "on 3 labeled requests" in page.wait("return document.getElementById('monitoring').textContent")
        if folder := os.environ.get("TUNEFORGE_SCREENSHOTS"):
            page.screenshot(Path(folder) / "review.png")
        assert page.messages() == []


def test_review_page_is_safe_with_hostile_names(served, request_log):
    client, _ = served
    ((content, _),) = pngs(1)
    label(client, predict(client, content)["id"], "<img src=x onerror=alert(1)>")
    with urllib.request.urlopen(served[1] + "/review") as answer:
        policy, text = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy
    assert "onerror" not in text
    assert "innerHTML" not in text


def test_no_store_is_found_in_any_of_several_headers():
    def kept(*values):
        headers = [(b"cache-control", value) for value in values]
        return allows_logging(Request({"type": "http", "headers": headers}))

    assert kept()
    assert kept(b"no-cache", b"max-age=0")
    assert not kept(b"no-cache", b"max-age=0, No-Store")
