"""Feedback on a running server: labels arrive and last, the page asks for them, and watching says how it stands.

TUNEFORGE_FEEDBACK_KILLS sets how often the server is killed under labels (1 by default, 50 for the full proof);
TUNEFORGE_SCREENSHOTS names a folder for the picture of the page.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from browser import MISSING, browser, installed
from PIL import Image

import tuneforge as tf

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
import uvicorn

from tuneforge.builtin.characters.digit_images import real_digits
from tuneforge.ship.circle.records import Records, in_share
from tuneforge.ship.serve.app import application
from tuneforge.ship.serve.feedback import Sampled, feedback
from tuneforge.ship.serve.models import sources_of
from tuneforge.ship.wire import wire
from tuneforge.ship.wire.client import Server

KILLS = int(os.environ.get("TUNEFORGE_FEEDBACK_KILLS", "1"))
JSON = {"Content_Type": "application/json"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return tf.Engine(
        data=tf.use("digits", other_share=0, per_class=10),
        model="digit-cnn",
        strategy=[tf.Phase("head", train="head", steps=20, lr=1e-2)],
        out=tmp_path_factory.mktemp("runs") / "run",
        page=False,
    ).run()


def pngs(count, *, inverted=False):
    images, labels = real_digits()
    for image, label in zip(images[:count], labels[:count], strict=True):
        pixels = (image * 15.9375).astype("uint8")
        file = io.BytesIO()
        Image.fromarray(255 - pixels if inverted else pixels).save(file, format="PNG")
        yield file.getvalue(), str(label)


@contextlib.contextmanager
def serving(folder, records, *, share=1.0):
    app = application(sources_of(folder), records=Sampled(records, share), further=[feedback(records)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def records(tmp_path):
    with Records(tmp_path / "records.db") as opened:
        yield opened


@pytest.fixture
def served(digits, records):
    with serving(digits.folder, records) as url:
        connection = Server(url).connect()
        yield connection, url
        connection.close()


def predict(connection, content):
    return connection.ask("POST", "/predict", content, Content_Type="image/png")[0]


def label(connection, request_id, name):
    return connection.ask("POST", "/feedback", json.dumps({"id": request_id, "class": name}).encode(), **JSON)[0]


def test_an_answered_request_takes_its_label_at_once(served, records):
    connection, _ = served
    ((content, name),) = pngs(1)
    answer = predict(connection, content)
    assert label(connection, answer["id"], "eleventh")["previous"] is None
    second = label(connection, answer["id"], name)
    assert (second["previous"], second["agrees"]) == ("eleventh", answer["class"] == name)
    (sample,) = records.labelled()
    assert (sample.exchange.body, sample.exchange.content_type, sample.label) == (content, "image/png", name)
    assert sample.exchange.version == answer["version"]
    assert sample.exchange.answer["probabilities"] == answer["probabilities"]


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
        served[0].ask("POST", "/feedback", body, **JSON)


def test_the_test_split_over_the_wire_equals_the_offline_report(served, digits):
    run = wire.looking(digits.folder)
    measured = wire.measure(Server(served[1]), run, offline=digits.report["splits"], rows=16, concurrency=2)
    assert len(measured.compared["test"]) > 40
    assert [each for each in measured.compared["test"] if not each.equal] == []


def test_only_the_share_is_kept(digits, records):
    with serving(digits.folder, records, share=0.5) as url:
        connection = Server(url).connect()
        ids = [predict(connection, content)["id"] for content, _ in pngs(60)]
        connection.ask("GET", "/review/next")
        connection.close()
    kept = {each for each in ids if records.find(each) is not None}
    assert 15 <= len(kept) <= 45
    assert kept == {each for each in ids if in_share(each, 0.5, salt="sample")}


def test_review_gives_the_least_certain_first_with_its_picture(served, records):
    connection, _ = served
    answers = sorted((predict(connection, content) for content, _ in pngs(20)), key=lambda each: each["probability"])
    first, _ = connection.ask("GET", "/review/next")
    assert (first["id"], first["class"], first["left"]) == (answers[0]["id"], answers[0]["class"], 20)
    assert first["picture"].startswith("data:image/png;base64,")
    assert first["classes"] == list("0123456789")
    second, _ = connection.ask("GET", f"/review/next?skip={first['id']}")
    assert second["id"] == answers[1]["id"]
    label(connection, first["id"], "new pen")
    third, _ = connection.ask("GET", "/review/next")
    assert (third["id"], third["classes"][-1], third["labelled"]) == (answers[1]["id"], "new pen", 1)


def test_watching_is_on_the_metrics_and_tells_drift(served):
    connection, url = served
    for content, name in pngs(40):
        label(connection, predict(connection, content)["id"], name)
    (seen,) = connection.ask("GET", "/watch")[0]["models"]
    assert seen["accuracy"]["total"] == 40
    assert seen["accuracy"]["low"] < seen["accuracy"]["share"] < seen["accuracy"]["high"]
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (share,) = [line for line in lines if line.startswith("tuneforge_labelled_accuracy{") and 'bound="share"' in line]
    assert float(share.split()[-1]) == seen["accuracy"]["share"]
    assert 'tuneforge_kept_requests{state="labelled"} 40.0' in lines
    assert len({line.split()[2] for line in lines if line.startswith("# TYPE")}) == sum(
        line.startswith("# TYPE") for line in lines
    )


def test_acknowledged_labels_survive_the_servers_kill(digits, tmp_path):
    path, acknowledged, contents = tmp_path / "records.db", {}, [content for content, _ in pngs(50)]
    for kill in range(KILLS):
        command = [sys.executable, "-m", "tuneforge", "serve", str(digits.folder), "--port", "0", "--json"]
        command += ["--records", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            url = json.loads(process.stdout.readline())["url"]
            given = [{} for _ in range(3)]

            def work(mine, url=url, kill=kill):
                connection = Server(url, timeout_s=5).connect()
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
        with Records(path) as records:
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
        page.wait("return sample !== null && document.getElementById('picture').naturalWidth > 0")
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
        assert "of 3 labelled answers" in page.wait("return document.getElementById('watch').textContent")
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
