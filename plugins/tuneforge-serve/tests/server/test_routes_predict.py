"""`/predict` and the pages, over a real connection."""

import base64
import json

import numpy as np
import pytest
from bundles import png
from tuneforge_serve import RequestLog
from tuneforge_serve.server.model_manager import hash_version

import tuneforge as tf

ROW = {"size": 1.5, "weight": -0.5, "color": "red"}


@pytest.fixture(scope="module")
def digit() -> bytes:
    from sklearn.datasets import load_digits

    return png(load_digits().images[3] * 255 / 16)


def test_image_gets_the_prediction_of_the_run(serving, digits_run, digit):
    (offline,) = tf.predict(digits_run, [digit])
    with serving(digits_run) as server:
        answer = server.request("POST", "/predict", digit, Content_Type="application/x-www-form-urlencoded")
    assert answer.status == 200
    assert answer.json["class"] == offline["class"] == "3"
    assert answer.json["probabilities"] == pytest.approx(offline["probabilities"], abs=1e-6)
    assert (answer.json["model"], answer.json["version"]) == ("digits", hash_version(digits_run))
    assert answer.json["id"] == answer.headers["x-request-id"]
    assert 0 < answer.json["forward_ms"] <= answer.json["ms"]


def test_rows_are_sent_as_json_alone_and_as_a_list(serving, table_run):
    (offline,) = tf.predict(table_run, [ROW])
    with serving(table_run) as server:
        alone = server.request("POST", "/predict", ROW).json
        raw = server.request("POST", "/predict", json.dumps(ROW).encode()).json
        many = server.request("POST", "/predict", {"inputs": [ROW, {**ROW, "size": -2.0}]}).json
    assert alone["class"] == raw["class"] == offline["class"]
    assert alone["probability"] == pytest.approx(offline["probability"], abs=1e-6)
    assert many["predictions"][0]["probability"] == pytest.approx(offline["probability"], abs=1e-6)
    assert many["predictions"][1]["class"] != offline["class"]
    assert len({many["id"], *(each["id"] for each in many["predictions"])}) == 3


RECORDS = [{"size": "1.5", "weight": "-0.5", "color": "red"}, {"size": "-2", "weight": "0.5", "color": "red"}]


def csv_text(delimiter, end):
    return end.join(delimiter.join(cells) for cells in (ROW, *(row.values() for row in RECORDS)))


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/csv", csv_text(",", "\n").encode()),
        ("text/csv; charset=utf-8", csv_text(";", "\r\n").encode("utf-8-sig")),
        ("text/tab-separated-values", csv_text("\t", "\r").encode("utf-16")),
        ("application/x-www-form-urlencoded", csv_text(",", "\n").encode()),
        ("application/jsonl", "\n".join(map(json.dumps, RECORDS)).encode()),
        ("application/json", json.dumps(RECORDS).encode()),
    ],
)
def test_a_table_is_predicted_row_by_row(serving, table_run, content_type, body):
    expected = list(tf.predict(table_run, RECORDS))
    with serving(table_run) as server:
        answer = server.request("POST", "/predict", body, Content_Type=content_type)
    assert answer.status == 200
    assert [each["class"] for each in answer.json["predictions"]] == [each["class"] for each in expected]


def test_a_table_that_cannot_be_read_is_refused_by_its_line(serving, table_run):
    with serving(table_run) as server:
        for body, message in (
            (b"size,weight,color\n1,2,red\n1,2\n", "line 3"),
            (b"size,weight,color\n", "no rows"),
            (b"size,weight\n1,2\n", "column 'color' is missing"),
            (b"size,weight,color\n1,heavy,red\n", "the body.csv:2, column 'weight'"),
        ):
            answer = server.request("POST", "/predict", body, Content_Type="text/csv")
            assert answer.status == 422
            assert message in answer.json["error"]


def test_an_unseen_value_is_marked(serving, table_run):
    with serving(table_run) as server:
        assert "unseen" not in server.request("POST", "/predict", ROW).json
        many = server.request("POST", "/predict", {"inputs": [ROW, {**ROW, "color": "mauve"}]}).json["predictions"]
    assert [each.get("unseen") for each in many] == [None, {"color": "mauve"}]


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("body", [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000])
def test_deeply_nested_json_is_refused_as_such(serving, table_run, caplog, content_type, body):
    with serving(table_run) as server:
        answer = server.request("POST", "/predict", body, Content_Type=content_type)
        assert 400 <= answer.status < 500
        assert "nested too deeply" in answer.json["error"]
        assert server.request("POST", "/predict", ROW).status == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_image_may_be_base64_encoded(serving, digits_run, digit):
    with serving(digits_run) as server:
        answer = server.request("POST", "/predict", {"inputs": [base64.b64encode(digit).decode()]}).json
    assert answer["predictions"][0]["class"] == "3"


def test_errors_name_the_field_and_never_a_path(serving, table_run, digits_run, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(np.zeros((8, 8))))
    cases = [
        ({"inputs": [ROW, {"size": 1, "color": "red"}]}, 422, "inputs[1]"),
        ({**ROW, "weight": "heavy"}, 422, "weight"),
        ({"inputs": []}, 400, "inputs"),
        ({"inputs": 3}, 400, "inputs"),
        (b"", 400, "empty"),
        (7, 422, "row"),
    ]
    with serving(table_run) as server:
        for body, status, words in cases:
            answer = server.request("POST", "/predict", body)
            assert answer.status == status, body
            assert words in answer.json["error"], body
        nan = server.request("POST", "/predict", b'{"size": NaN}', Content_Type="application/json")
        assert nan.status == 400
        assert "NaN" in nan.json["error"]
        form = server.request("POST", "/predict", b"--x", Content_Type="multipart/form-data; boundary=x")
        assert form.status == 415
        unknown = server.request("POST", "/predict?model=pears", ROW)
        assert unknown.status == 404
    with serving(digits_run) as server:
        for body in (str(secret).encode(), json.dumps(str(secret)).encode()):
            for kind in ("application/json", "text/plain"):
                answer = server.request("POST", "/predict", body, Content_Type=kind)
                assert answer.status in (400, 422)
                assert str(tmp_path) not in answer.json["error"]


def test_row_with_an_overflow_fails_alone(serving, table_run):
    with serving(table_run) as server:
        huge = server.request("POST", "/predict", {**ROW, "size": 1e308})
        assert huge.status == 422
        assert "Inf" in huge.json["error"] or "NaN" in huge.json["error"]
        assert server.request("POST", "/predict", ROW).status == 200


def test_requests_are_logged_as_they_were_sent(serving, table_run, tmp_path):
    with RequestLog(tmp_path / "requests.db") as request_log:
        with serving(table_run, request_log=request_log) as server:
            first = server.request("POST", "/predict", ROW).json
            many = server.request("POST", "/predict", {"inputs": [ROW, {**ROW, "size": 0}]}).json
            server.service.request_logger.flush()
            assert request_log.stats().num_requests == 3
        kept = request_log.find(first["id"])
        assert json.loads(kept.body) == ROW
        assert kept.prediction["class"] == first["class"]
        assert kept.version == first["version"]
        assert len(kept.features) > 0
        second = request_log.find(many["predictions"][0]["id"])
        assert second.content_digest == kept.content_digest
        assert second.content_digest != request_log.find(many["predictions"][1]["id"]).content_digest


def test_pages_load_nothing_from_elsewhere(serving, table_run, digits_run):
    with serving(table_run) as server:
        page, docs = server.request("GET", "/"), server.request("GET", "/docs")
        assert page.status == docs.status == 200
        assert b'<textarea id="text"' in page.body
        assert b"color" in page.body
    with serving(digits_run) as server:
        page = server.request("GET", "/")
        assert b'<canvas id="board"' in page.body
    for each in (page, docs):
        assert b"http://" not in each.body.replace(b"http://HOST:PORT", b"")
        assert b"https://" not in each.body
        assert b"src=" not in each.body
        assert each.headers["content-security-policy"].startswith("default-src 'none'")


def test_metrics_count_requests_batches_and_versions(serving, table_run):
    with serving(table_run) as server:
        server.request("POST", "/predict", ROW)
        server.request("POST", "/predict", b"")
        server.request("GET", "/nowhere/at/all")
        text = server.request("GET", "/metrics").body.decode()
        version = server.service.models.list_loaded()[0].version
    assert 'tuneforge_requests_total{path="/predict",status="200"} 1.0' in text
    assert 'tuneforge_requests_total{path="/predict",status="400"} 1.0' in text
    assert 'tuneforge_requests_total{path="other",status="404"} 1.0' in text
    assert "tuneforge_batch_size_count 1.0" in text
    assert f'version="{version}"' in text
