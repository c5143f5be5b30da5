"""A test over the wire says of each figure whether it equals the offline one, and notices an answer that does not."""

import json
import socket

import attrs
import pytest
import torch
from bundles import digits as finished_digits
from fake_server import serving
from PIL import Image
from tiny import tiny_data, tiny_net
from tuneforge_serve.endpoint_test import measure as wire
from tuneforge_serve.endpoint_test import senders
from tuneforge_serve.endpoint_test.http_client import ServerClient

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.engine.session import predictor as tuned


@pytest.fixture
def tiny(tune):
    result = tune([tf.Phase("all", train="all", epochs=1, lr=1e-2)], seed=1)
    found = tuned.load(result.run_dir, model=tiny_net())
    return found, found.with_data(tiny_data()), result.report["splits"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    step = tf.Phase("head", train="head", steps=4, lr=1e-3)
    return finished_digits(tmp_path_factory.mktemp("runs") / "run", step, per_class=4)


def test_stored_tensors_give_the_offline_figures(tiny):
    found, run, offline = tiny
    with serving(found) as url:
        measured = wire.measure_endpoint(
            ServerClient(url), run, splits=["test", "val"], offline=offline, concurrency=3, batch_size=4
        )
    assert [each for split in ("test", "val") for each in measured.comparisons[split] if not each.equal] == []
    assert len(measured.comparisons["test"]) > 20
    assert measured.metrics["test"]["confusion"] == offline["test"]["confusion"]
    assert (measured.via, measured.versions, measured.num_samples, measured.num_requests) == ("v2", ("7",), 60, 16)
    assert len(measured.latencies_s) == 16
    assert 0 < measured.latency_ms(50) <= measured.latency_ms(99) < 1000 * measured.seconds


def test_one_sample_answered_otherwise_is_noticed(tiny):
    found, run, offline = tiny
    turned = []

    def change(probabilities):
        turned.append(len(turned))
        return probabilities.roll(1, 1) if len(turned) == 5 else probabilities

    with serving(found, change=change) as url:
        measured = wire.measure_endpoint(ServerClient(url), run, offline=offline)
    differ = {each.name for each in measured.comparisons["test"] if not each.equal}
    assert "confusion" in differ
    assert "loss" in differ


def test_files_go_as_they_are_and_give_the_offline_figures(tmp_path, tune):
    generator = torch.Generator().manual_seed(0)
    for place in range(60):
        folder = tmp_path / "pictures" / f"class {place % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 160, (9, 11, 3), generator=generator) + 40 * (place % 3)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{place}.png")
    data = tf.use("image-folder", path=str(tmp_path / "pictures"), size=6)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 3))
    result = tune([tf.Phase("all", train="all", epochs=3, lr=1e-2)], data=data, model=network)
    found = tuned.load(result.run_dir, model=network)
    run = wire.prepare_run(result.run_dir, model=network)
    with serving(found) as url:
        by_file = wire.measure_endpoint(ServerClient(url), run, offline=result.report["splits"])
        by_tensor = wire.measure_endpoint(ServerClient(url), run, offline=result.report["splits"], via="v2")
    assert (by_file.via, by_tensor.via) == ("predict", "v2")
    assert all(each.equal for measured in (by_file, by_tensor) for each in measured.comparisons["test"])


def test_a_busy_server_is_asked_again(tiny):
    found, run, _ = tiny
    with serving(found, busy=3) as url:
        measured = wire.measure_endpoint(ServerClient(url), run, concurrency=2)
    assert measured.num_retries == 3
    assert measured.num_requests == 30


def test_what_the_server_says_is_in_the_error(tiny):
    found, run, _ = tiny
    with serving(found) as url, pytest.raises(tf.DataError, match="answers 401.*the token is wrong"):
        wire.measure_endpoint(ServerClient(url, token="wrong"), run)


def test_a_server_that_is_not_there_is_an_error_to_try_again(tiny):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(tf.TryAgainError, match="cannot reach the server"):
            wire.measure_endpoint(ServerClient(f"http://127.0.0.1:{free.getsockname()[1]}"), tiny[1])


def test_a_model_that_knows_more_classes_is_judged_by_name(tiny):
    found, run, offline = tiny

    def change(probabilities):
        return torch.cat([torch.zeros(len(probabilities), 1), probabilities.flip(1)], 1)

    with serving(found, change=change, labels=["new", "c", "b", "a"]) as url:
        measured = wire.measure_endpoint(ServerClient(url), run, offline=offline)
    assert measured.metrics["test"]["accuracy"] == offline["test"]["accuracy"]
    assert list(measured.metrics["test"]["per_class"]) == ["a", "b", "c", "new"]
    assert {each.name.split(".")[0] for each in measured.comparisons["test"] if not each.equal} <= {
        "confusion", "per_class", "top3_accuracy",
    }  # fmt: skip


def test_another_number_of_classes_is_an_error(tiny):
    found, run, _ = tiny
    with (
        serving(found, change=lambda probabilities: probabilities[:, :2]) as url,
        pytest.raises(tf.DataError, match="the data has 3"),
    ):
        wire.measure_endpoint(ServerClient(url), run)


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://x:port"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(tf.UsageError, match="is no address"):
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
def test_a_description_turns_back_into_the_output(targets, output):
    from tuneforge.engine.loop.phase_components import create_component

    built = create_component("targets", targets)
    described = json.loads(json.dumps(built.describe(torch.tensor(output))))
    again = built.describe(senders.to_outputs(built, described))
    for key, value in described.items():
        assert again[key] == pytest.approx(value) if not isinstance(value, str) else again[key] == value


def test_floors_are_kept_or_missed(tiny):
    found, run, _ = tiny
    with serving(found) as url:
        measured = wire.measure_endpoint(ServerClient(url), run)
    accuracy, loss = (measured.metrics["test"][name] for name in ("accuracy", "loss"))
    targets = run.data.targets
    assert list(wire.describe_failures(measured, {"accuracy": accuracy, "loss": loss}, targets)) == []
    misses = list(wire.describe_failures(measured, {"accuracy": accuracy + 0.01, "loss": loss - 0.01}, targets))
    assert len(misses) == 2
    assert "at least" in misses[0]
    assert "at most" in misses[1]
    with pytest.raises(tf.UnknownNameError, match="did you mean 'accuracy'"):
        wire.require_metrics(run, "test", {"acuracy": 1})
    wire.require_metrics(run, "test", {"accuracy": 1, "loss": 1})
    nan = attrs.evolve(measured, metrics={"test": {"accuracy": float("nan")}})
    assert len(list(wire.describe_failures(nan, {"accuracy": 0.0}, targets))) == 1


def test_the_command_prints_the_report_and_says_what_is_equal(digits, capsys):
    with serving(tuned.load(digits.run_dir)) as url:
        code = main(["test", url, "--run", str(digits.run_dir), "--concurrency", "2", "--rows", "8"])
        said = capsys.readouterr().out
        missed = main(["test", url, "--run", str(digits.run_dir), "--rows", "8", "--floor", "accuracy=1.01", "--json"])
        plain = json.loads(capsys.readouterr().out)
    assert (code, missed) == (0, 3)
    assert main(["evaluate", str(digits.run_dir)]) == 0
    figures = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("0 ", "9 ", "hardest"))]
    assert len(figures) == 3
    assert all(line in said for line in figures)
    assert "figures of 'test' equal the offline report\n" in said
    assert plain["offline_mismatches"] == {"test": {}}
    assert plain["latency_ms"]["p50"] > 0
    assert "accuracy is" in plain["failures"][0]


def test_data_by_name_need_no_run(digits, capsys):
    with serving(tuned.load(digits.run_dir)) as url:
        arguments = ["--data", "digits", "--data.other-share", "0", "--rows", "8", "--json"]
        assert main(["test", url, *arguments]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["splits"]["test"]["accuracy"] == digits.report["splits"]["test"]["accuracy"]
    assert plain["offline_mismatches"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to send"),
        (["--data", "digits", "--floor", "accuracy"], "is no floor"),
        (["--data", "digits", "--data.other-share", "0", "--floor", "acuracy=1"], "there is no figure 'acuracy'"),
        (["--run", "nowhere"], "there is no directory 'nowhere'"),
        (["--data", "digits", "--data.other-share", "0", "--split", "tests"], "there is no split 'tests'"),
    ],
)
def test_wrong_use_is_said(arguments, said, capsys):
    assert main(["test", "http://127.0.0.1:9", *arguments]) in (2, 73)
    assert said in capsys.readouterr().err
