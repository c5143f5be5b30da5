"""An endpoint test compares each metric with the offline one, and notices a prediction that differs."""

import json
import socket

import attrs
import pytest
import torch
from bundles import digits as finished_digits
from fake_server import serving
from PIL import Image
from tiny import tiny_data, tiny_net
from tuneforge_serve.endpoint_test import measure, senders
from tuneforge_serve.endpoint_test.http_client import ServerClient
from tuneforge_serve.endpoint_test.measure import EndpointData, measure_endpoint

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.plugin import build_component, find_component, load_component


@pytest.fixture
def tiny(tune):
    result = tune([tf.Phase("all", train="all", epochs=1, lr=1e-2)], seed=1)
    return tf.load(result.run_dir, model=tiny_net()), EndpointData(tiny_data()), result.report["splits"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    step = tf.Phase("head", train="head", steps=4, lr=1e-3)
    return finished_digits(tmp_path_factory.mktemp("runs") / "run", step, per_class=4)


def measure_url(url, data, *, token=None, **options):
    with ServerClient(url, token=token) as server:
        return measure_endpoint(server, data, **options)


def test_stored_tensors_give_the_offline_metrics(tiny):
    predictor, data, offline = tiny
    with serving(predictor) as url:
        result = measure_url(url, data, splits=["test", "val"], offline=offline, concurrency=3, batch_size=4)
    assert [each for split in ("test", "val") for each in result.comparisons[split] if not each.equal] == []
    assert len(result.comparisons["test"]) > 20
    assert result.metrics["test"]["confusion"] == offline["test"]["confusion"]
    assert (result.route, result.versions, result.num_samples, result.num_requests) == ("v2", ("7",), 60, 16)
    assert len(result.latencies_s) == 16
    assert 0 < result.latency_ms(50) <= result.latency_ms(99) < 1000 * result.seconds


def test_one_different_prediction_is_noticed(tiny):
    predictor, data, offline = tiny
    calls = []

    def change(probabilities):
        calls.append(len(calls))
        return probabilities.roll(1, 1) if len(calls) == 5 else probabilities

    with serving(predictor, change=change) as url:
        result = measure_url(url, data, offline=offline)
    mismatches = {each.name for each in result.comparisons["test"] if not each.equal}
    assert "confusion" in mismatches
    assert "loss" in mismatches


def test_files_are_sent_unchanged_and_give_the_offline_metrics(tmp_path, tune):
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        folder = tmp_path / "images" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 160, (9, 11, 3), generator=generator) + 40 * (number % 3)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    data = tf.use("image-folder", path=str(tmp_path / "images"), size=6)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 3))
    result = tune([tf.Phase("all", train="all", epochs=3, lr=1e-2)], data=data, model=network)
    predictor = tf.load(result.run_dir, model=network)
    endpoint_data = measure.prepare_endpoint_data(result.run_dir, model=network)
    with serving(predictor) as url:
        by_file = measure_url(url, endpoint_data, offline=result.report["splits"])
        by_tensor = measure_url(url, endpoint_data, offline=result.report["splits"], route="v2")
    assert (by_file.route, by_tensor.route) == ("predict", "v2")
    assert all(each.equal for result in (by_file, by_tensor) for each in result.comparisons["test"])


def test_busy_server_is_retried(tiny):
    predictor, data, _ = tiny
    with serving(predictor, num_busy=3) as url:
        result = measure_url(url, data, concurrency=2)
    assert result.num_retries == 3
    assert result.num_requests == 30


def test_error_contains_the_reason_of_the_server(tiny):
    predictor, data, _ = tiny
    with serving(predictor) as url, pytest.raises(tf.DataError, match="responds 401.*the token is wrong"):
        measure_url(url, data, token="wrong")


def test_missing_server_is_an_error_to_try_again(tiny):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(tf.TryAgainError, match="cannot reach the server"):
            measure_url(f"http://127.0.0.1:{free.getsockname()[1]}", tiny[1])


def test_extra_classes_of_the_server_are_matched_by_name(tiny):
    predictor, data, offline = tiny

    def change(probabilities):
        return torch.cat([torch.zeros(len(probabilities), 1), probabilities.flip(1)], 1)

    with serving(predictor, change=change, labels=["new", "c", "b", "a"]) as url:
        result = measure_url(url, data, offline=offline)
    assert result.metrics["test"]["accuracy"] == offline["test"]["accuracy"]
    assert list(result.metrics["test"]["per_class"]) == ["a", "b", "c", "new"]
    assert {each.name.split(".")[0] for each in result.comparisons["test"] if not each.equal} <= {
        "confusion", "per_class", "top3_accuracy",
    }  # fmt: skip


def test_other_number_of_classes_is_an_error(tiny):
    predictor, data, _ = tiny
    with (
        serving(predictor, change=lambda probabilities: probabilities[:, :2]) as url,
        pytest.raises(tf.DataError, match="the data has 3"),
    ):
        measure_url(url, data)


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://x:port"])
def test_invalid_address_is_refused(url):
    with pytest.raises(tf.UsageError, match="is not an address"):
        ServerClient(url)


@pytest.mark.parametrize(
    ("targets", "output"),
    [
        (tf.use("classes", names=("a", "b", "c")), [0.3, -1.0, 2.0]),
        (tf.use("label-sets", names=("a", "b", "c")), [0.3, -9.0, 2.0]),
        (
            tf.use("numbers", names=("x", "y", "z"), units=("m",), means=(1.0, 2.0, 3.0), scales=(2.0,)),
            [0.3, -1.0, 2.0],
        ),
        (tf.use("numbers", names=("x",), means=(5.0,), scales=(2.0,)), [0.25]),
    ],
)
def test_description_turns_back_into_the_output(targets, output):
    built = build_component(load_component(find_component("targets", targets.name)), targets.options, where="targets")
    described = json.loads(json.dumps(built.describe(torch.tensor(output))))
    again = built.describe(senders.to_outputs(built, described))
    for key, value in described.items():
        assert again[key] == pytest.approx(value) if not isinstance(value, str) else again[key] == value


def test_minimum_metrics_are_reached_or_missed(tiny):
    predictor, data, _ = tiny
    with serving(predictor) as url:
        result = measure_url(url, data)
    accuracy, loss = (result.metrics["test"][name] for name in ("accuracy", "loss"))
    targets = data.data.targets
    assert list(measure.describe_failures(result, {"accuracy": accuracy, "loss": loss}, targets)) == []
    failures = list(measure.describe_failures(result, {"accuracy": accuracy + 0.01, "loss": loss - 0.01}, targets))
    assert len(failures) == 2
    assert "at least" in failures[0]
    assert "at most" in failures[1]
    with pytest.raises(tf.UnknownNameError, match="did you mean 'accuracy'"):
        measure.require_metrics(data, "test", {"acuracy": 1})
    measure.require_metrics(data, "test", {"accuracy": 1, "loss": 1})
    nan = attrs.evolve(result, metrics={"test": {"accuracy": float("nan")}})
    assert len(list(measure.describe_failures(nan, {"accuracy": 0.0}, targets))) == 1


def test_command_prints_the_metrics_and_compares_them(digits, capsys):
    with serving(tf.load(digits.run_dir)) as url:
        code = main(["test-endpoint", url, "--run", str(digits.run_dir), "--concurrency", "2", "--batch-size", "8"])
        printed = capsys.readouterr().out
        missed = main(
            [
                "test-endpoint",
                url,
                "--run",
                str(digits.run_dir),
                "--batch-size",
                "8",
                "--min-metric",
                "accuracy=1.01",
                "--json",
            ]
        )
        plain = json.loads(capsys.readouterr().out)
    assert (code, missed) == (0, 3)
    assert main(["evaluate", str(digits.run_dir)]) == 0
    metrics = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("0 ", "9 ", "hardest"))]
    assert len(metrics) == 3
    assert all(line in printed for line in metrics)
    assert "metrics of 'test' equal the offline report\n" in printed
    assert plain["offline_mismatches"] == {"test": {}}
    assert plain["latency_ms"]["p50"] > 0
    assert "accuracy is" in plain["failures"][0]


def test_data_by_name_need_no_run(digits, capsys):
    with serving(tf.load(digits.run_dir)) as url:
        arguments = ["--data", "digits", "--data.other-share", "0", "--batch-size", "8", "--json"]
        assert main(["test-endpoint", url, *arguments]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["metrics"]["test"]["accuracy"] == digits.report["splits"]["test"]["accuracy"]
    assert plain["offline_mismatches"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data to send"),
        (["--data", "digits", "--min-metric", "accuracy"], "is not a minimum of a metric"),
        (["--data", "digits", "--data.other-share", "0", "--min-metric", "acuracy=1"], "there is no metric 'acuracy'"),
        (["--run", "nowhere"], "there is no directory 'nowhere'"),
        (["--data", "digits", "--data.other-share", "0", "--split", "tests"], "there is no split 'tests'"),
    ],
)
def test_wrong_use_is_reported(arguments, message, capsys):
    assert main(["test-endpoint", "http://127.0.0.1:9", *arguments]) in (2, 73)
    assert message in capsys.readouterr().err
