"""The registry uses no number twice, has one champion at any moment, and survives deletions and kills."""

import os
import shutil
import signal
import textwrap

import pytest
import torch
from bundles import data, finished
from tiny import blobs
from tuneforge_serve import GateRules, ModelRegistry, promote
from tuneforge_serve.registry import model_registry
from tuneforge_serve.registry.model_registry import find_model, list_models

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.engine.storage import fault_injection
from tuneforge.exporting import export, load_inference_model

ANY = GateRules(min_recall=0.0, non_inferiority_margin=1.0, accept_equal=True, latency_ratio=1e6)
POINTS = ("bundle.sealed", "registry.reserved", "registry.published", "registry.logged")


class Killed(BaseException):
    """Stands for SIGKILL, because nothing catches it."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on the same data; the second one is far better."""
    path = tmp_path_factory.mktemp("runs")
    return finished(path / "poor", lr=1e-4), finished(path / "good", epochs=6, lr=3e-2)


def promote_run(run, registry, **options):
    """Promote with rules that accept everything."""
    return promote(
        run, registry=registry, **{"data": data(), "rules": ANY, "formats": ["safetensors"], "name": "blobs", **options}
    )


def test_better_version_becomes_champion_and_rollback_restores_the_previous_one(runs, tmp_path):
    poor, good = runs
    rules = GateRules(min_recall=0.0)
    assert promote_run(poor, tmp_path, rules=rules).version == 1
    second = promote_run(good, tmp_path, rules=rules)
    assert (second.version, second.previous_champion, second.decision.promoted) == (2, 1, True)
    refused = promote_run(poor, tmp_path, rules=rules)
    assert (refused.version, refused.previous_champion) == (None, 2)

    registry = ModelRegistry(tmp_path, "blobs")
    assert (registry.champion, registry.versions()) == (2, [1, 2])
    assert registry.rollback() == 1
    assert registry.champion == 1
    assert registry.rollback(2) == 2
    events = [(line["event"], line.get("version"), line.get("previous_champion")) for line in registry.read_events()]
    assert events == [
        ("reserved", 1, None), ("promoted", 1, None), ("reserved", 2, None), ("promoted", 2, 1), ("refused", None, 2),
        ("rolled back", 1, 2), ("rolled back", 2, 1),
    ]  # fmt: skip
    assert sorted(each.name for each in registry.path.iterdir()) == [".lock", "1", "2", "champion.json", "log.jsonl"]
    assert [each.name for each in list_models(tmp_path)] == ["blobs"]


def test_version_in_the_registry_has_the_outputs_of_the_run(runs, tmp_path):
    promote_run(runs[1], tmp_path)
    stored = blobs(30, seed=5).fetch(torch.arange(30))
    expected = load_inference_model(runs[1]).outputs(stored)
    registry = ModelRegistry(tmp_path, "blobs")
    for found in (registry.load(), registry.load(1)):
        assert (found.name, found.version) == ("blobs", "1")
        assert torch.equal(found.outputs(stored), expected)
    assert registry.load().verify() == 16


def test_version_numbers_are_never_used_twice(runs, tmp_path):
    for expected in (1, 2, 3):
        assert promote_run(runs[1], tmp_path).version == expected
    registry = ModelRegistry(tmp_path, "blobs")
    before = {path.name: path.read_bytes() for path in registry.version_dir(3).iterdir()}
    shutil.rmtree(registry.version_dir(2))
    assert promote_run(runs[1], tmp_path).version == 4
    assert {path.name: path.read_bytes() for path in registry.version_dir(3).iterdir()} == before
    shutil.rmtree(registry.version_dir(4))
    registry.rollback(3)
    assert promote_run(runs[1], tmp_path).version == 5
    assert registry.versions() == [1, 3, 5]


@pytest.mark.parametrize("point", POINTS)
def test_interrupted_promotion_keeps_the_champion_and_the_next_one_succeeds(runs, tmp_path, point):
    poor, good = runs
    promote_run(poor, tmp_path)
    registry = ModelRegistry(tmp_path, "blobs")
    expected = registry.load().outputs(data().test.fetch(torch.arange(9)))

    def kill(name):
        if name == point:
            raise Killed

    fault_injection.hook = model_registry.fault_hook = kill
    try:
        with pytest.raises(Killed):
            promote_run(good, tmp_path)
    finally:
        fault_injection.hook = model_registry.fault_hook = None
    assert registry.champion == 1
    assert torch.equal(registry.load().outputs(data().test.fetch(torch.arange(9))), expected)
    done = promote_run(good, tmp_path)
    assert registry.champion == done.version == (2 if point == "bundle.sealed" else 3)
    left = sorted(path.name for path in registry.path.iterdir() if path.name.startswith("."))
    assert left == [".lock"]
    undone = [line["version"] for line in registry.read_events() if line["event"] == "interrupted"]
    assert undone == ([2] if point == "registry.logged" else [])


def test_truncated_log_line_hides_no_other_event(runs, tmp_path):
    promote_run(runs[1], tmp_path)
    registry = ModelRegistry(tmp_path, "blobs")
    with (registry.path / "log.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01T00:00:00+00:00", "event": "res')
    assert promote_run(runs[1], tmp_path).version == 2
    assert [line["event"] for line in registry.read_events()] == ["reserved", "promoted", "reserved", "promoted"]


def test_only_one_process_promotes_at_a_time(runs, tmp_path):
    registry = ModelRegistry(tmp_path, "blobs")
    with registry.lock(), pytest.raises(tf.FolderError, match="is locked") as refused:
        promote_run(runs[1], tmp_path)
    assert f"process {os.getpid()} is promoting" in refused.value.why
    assert promote_run(runs[1], tmp_path).version == 1


def test_bundle_is_promoted_unchanged(runs, tmp_path):
    bundle = export(runs[1], to=["safetensors"], out=tmp_path / "b", data=data())
    promote_run(bundle, tmp_path / "registry")
    for name in ("model.safetensors", "bundle.json", "manifest.json"):
        assert (tmp_path / "registry" / "blobs" / "1" / name).read_bytes() == (bundle / name).read_bytes()


def test_rollback_refuses_a_version_that_changed_on_disk(runs, tmp_path):
    promote_run(runs[0], tmp_path)
    promote_run(runs[1], tmp_path)
    registry = ModelRegistry(tmp_path, "blobs")
    with (registry.version_dir(1) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(tf.FolderError, match=r"model.safetensors"):
        registry.rollback()
    assert registry.champion == 2


def test_log_counts_the_decisions_of_a_test_set(runs, tmp_path):
    for num_uses in range(3):
        done = promote_run(runs[1], tmp_path)
        assert done.decision.test_sets["old"]["num_uses"] == num_uses
    decisions = [line["decision"] for line in ModelRegistry(tmp_path, "blobs").read_events() if "decision" in line]
    assert [each["test_sets"]["old"]["num_uses"] for each in decisions] == [0, 1, 2]
    assert decisions[0]["reason"] == "it is the first version, and every class reaches the minimum recall"


def test_challenger_trained_on_the_test_set_is_refused(runs, tmp_path):
    promote_run(runs[0], tmp_path)
    test = data().test
    cheat = data(train=tf.Split(test.source.inputs, test.targets), test=blobs(60, seed=8))
    run = finished(tmp_path / "cheat", epochs=6, lr=3e-2, given=cheat)
    done = promote_run(run, tmp_path, data=cheat, old_test_set=test)
    assert done.version is None
    assert "trained on 100.0 % of the old test set" in done.decision.reason


def test_challenger_that_fails_parity_is_refused_and_logged(runs, tmp_path, plant):
    source = """
        import tuneforge as tf
        from tuneforge.builtin.exports.safetensors import SafetensorsFormat

        @tf.component(api=1)
        class WrongFormat(SafetensorsFormat):
            "An export with wrong outputs."

            def load(self, directory, *, device_name):
                forward = super().load(directory, device_name=device_name)
                return lambda stored: -forward(stored)
        """
    plant("crooked", {"tuneforge.export": {"crooked": "crooked:WrongFormat"}}, crooked=textwrap.dedent(source))
    promote_run(runs[0], tmp_path / "s")
    done = promote_run(runs[1], tmp_path / "s", formats=["crooked"])
    assert (done.version, done.decision.promoted) == (None, False)
    assert done.decision.reason.startswith(
        "the crooked export does not answer as the tuned model: an answer is off by "
    )
    registry = ModelRegistry(tmp_path / "s", "blobs")
    assert (registry.champion, registry.read_events()[-1]["event"]) == (1, "refused")
    assert sorted(each.name for each in registry.path.iterdir()) == [".lock", "1", "champion.json", "log.jsonl"]


def test_champions_test_split_is_prepared_again_if_the_challenger_has_another_one(tmp_path):
    lines = [f"{n / 100:.2f},{'ab'[n % 20 > 9]}\n" for n in range(200)]
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(lines))
    source = tf.use("table-csv", path=str(tmp_path / "t.csv"), target="y")
    settings = {"data": source, "model": tf.use("mlp", hidden=(8,)), "strategy": [], "page": False}
    decisions = []
    for seed in (0, 1):
        tf.Engine(out=tmp_path / f"run{seed}", seed=0, data_seed=seed, **settings).run()
        done = promote_run(tmp_path / f"run{seed}", tmp_path / "s", data=None, name=None)
        decisions.append(done.decision)
    assert done.name == "table-csv"
    assert decisions[0].promoted
    assert decisions[1].test_sets["old"]["fingerprint"] == decisions[0].test_sets["old"]["fingerprint"]


def test_invalid_names_and_missing_registries_are_reported(tmp_path):
    for name in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(tf.UsageError, match="cannot be the name of a model"):
            ModelRegistry(tmp_path, name)
    with pytest.raises(tf.FolderError, match="there is no model registry"):
        list_models(tmp_path / "none")
    with pytest.raises(tf.FolderError, match="the registry has no model 'digit'"):
        find_model(tmp_path, "digit")
    with pytest.raises(tf.FolderError, match="has no champion"):
        ModelRegistry(tmp_path, "x").load()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_sigkill_during_promotion_keeps_the_champion(runs, tmp_path):
    promote_run(runs[1], tmp_path)
    registry = ModelRegistry(tmp_path, "blobs")
    champions = []
    for point in ("registry.reserved", "registry.logged", "registry.switched"):
        assert killed_at(point, lambda: promote_run(runs[1], tmp_path)) == -signal.SIGKILL
        champions.append(registry.champion)
        assert registry.load().verify() == 16
    assert champions == [1, 1, 4]
    assert promote_run(runs[1], tmp_path).version == 5
    assert [path.name for path in (tmp_path / "blobs").glob(".*")] == [".lock"]


def killed_at(point, action):
    """Run an action in a child process that is killed at a fault point, and return its exit code."""
    child = os.fork()
    if not child:
        signal.alarm(60)
        model_registry.fault_hook = lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == point else None
        try:
            action()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("name", ["", "models", "checkpoints/models"])
def test_registry_inside_a_run_or_a_bundle_is_refused(runs, tmp_path, name):
    bundle = export(runs[1], to=("safetensors",), out=tmp_path / "bundle", data=data())
    for inside, kind in ((runs[1], "run"), (bundle, "bundle")):
        before = sorted(inside.rglob("*"))
        with pytest.raises(tf.FolderError, match=f"lies inside a {kind}"):
            promote_run(runs[1], inside / name)
        assert sorted(inside.rglob("*")) == before


def test_new_test_set_is_checked_before_any_work(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("nosuch", "there is no directory"), ("empty", "contains no labeled files")):
        with pytest.raises(tf.DataError, match=message):
            promote_run(runs[1], tmp_path / "models", new_test_set=tmp_path / name)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("group", [["models"], ["plugins"], ["cache"], ["data"], []])
def test_group_without_a_verb_prints_its_help(group, capsys):
    assert main(group) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Usage: tuneforge")
    assert "error:" not in printed
