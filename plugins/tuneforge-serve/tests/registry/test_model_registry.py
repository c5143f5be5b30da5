"""The store: no number twice, one champion at any moment, a log that only grows, whatever is deleted or killed."""

import os
import shutil
import signal
import textwrap

import pytest
import torch
from bundles import data, finished
from tiny import blobs
from tuneforge_serve.registry.gate import GateRules
from tuneforge_serve.registry.model_registry import ModelRegistry, find_model, list_models
from tuneforge_serve.registry.promotion import promote

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.exporting import load_inference_model
from tuneforge.exporting.exporter import export

ANY = GateRules(min_recall=0.0, non_inferiority_margin=1.0, accept_equal=True, latency_ratio=1e6)
POINTS = ("bundle.sealed", "store.reserved", "store.placed", "store.logged")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same data, the second far better."""
    place = tmp_path_factory.mktemp("runs")
    return finished(place / "poor", lr=1e-4), finished(place / "good", epochs=6, lr=3e-2)


def admitted(run, store, **more):
    """Promote with the least of rules."""
    given = {"data": data(), "rules": ANY, "to": ["safetensors"], "name": "blobs", **more}
    return promote(run, registry=store, **given)


def test_a_first_version_a_better_one_and_the_way_back(runs, tmp_path):
    poor, good = runs
    rules = GateRules(min_recall=0.0)
    assert admitted(poor, tmp_path, rules=rules).version == 1
    second = admitted(good, tmp_path, rules=rules)
    assert (second.version, second.previous_champion, second.decision.promoted) == (2, 1, True)
    refused = admitted(poor, tmp_path, rules=rules)
    assert (refused.version, refused.previous_champion) == (None, 2)

    store = ModelRegistry(tmp_path, "blobs")
    assert (store.champion, store.versions()) == (2, [1, 2])
    assert store.rollback() == 1
    assert store.champion == 1
    assert store.rollback(2) == 2
    events = [(line["event"], line.get("version"), line.get("previous_champion")) for line in store.read_events()]
    assert events == [
        ("reserved", 1, None), ("promoted", 1, None), ("reserved", 2, None), ("promoted", 2, 1), ("refused", None, 2),
        ("rolled back", 1, 2), ("rolled back", 2, 1),
    ]  # fmt: skip
    assert sorted(each.name for each in store.path.iterdir()) == [".lock", "1", "2", "champion.json", "log.jsonl"]
    assert [each.name for each in list_models(tmp_path)] == ["blobs"]


def test_what_is_served_from_the_store_is_the_run(runs, tmp_path):
    admitted(runs[1], tmp_path)
    stored = blobs(30, seed=5).fetch(torch.arange(30))
    expected = load_inference_model(runs[1]).outputs(stored)
    for path in (tmp_path / "blobs", tmp_path / "blobs" / "1"):
        found = load_inference_model(path)
        assert (found.name, found.version) == ("blobs", "1")
        assert torch.equal(found.outputs(stored), expected)
    assert ModelRegistry(tmp_path, "blobs").load().verify() == 16


def test_a_number_is_never_used_twice(runs, tmp_path):
    for expected in (1, 2, 3):
        assert admitted(runs[1], tmp_path).version == expected
    store = ModelRegistry(tmp_path, "blobs")
    before = {path.name: path.read_bytes() for path in store.version_dir(3).iterdir()}
    shutil.rmtree(store.version_dir(2))
    assert admitted(runs[1], tmp_path).version == 4
    assert {path.name: path.read_bytes() for path in store.version_dir(3).iterdir()} == before
    shutil.rmtree(store.version_dir(4))
    store.rollback(3)
    assert admitted(runs[1], tmp_path).version == 5
    assert store.versions() == [1, 3, 5]


@pytest.mark.parametrize("point", POINTS)
def test_interrupted_anywhere_the_old_champion_answers_and_the_next_promotion_goes_through(runs, tmp_path, point):
    poor, good = runs
    admitted(poor, tmp_path)
    store = ModelRegistry(tmp_path, "blobs")
    expected = store.load().outputs(data().test.fetch(torch.arange(9)))

    def kill(name):
        if name == point:
            raise Killed

    faults.hook = kill
    try:
        with pytest.raises(Killed):
            admitted(good, tmp_path)
    finally:
        faults.hook = None
    assert store.champion == 1
    assert torch.equal(store.load().outputs(data().test.fetch(torch.arange(9))), expected)
    done = admitted(good, tmp_path)
    assert store.champion == done.version == (2 if point == "bundle.sealed" else 3)
    left = sorted(path.name for path in store.path.iterdir() if path.name.startswith("."))
    assert left == [".lock"]
    undone = [line["version"] for line in store.read_events() if line["event"] == "interrupted"]
    assert undone == ([2] if point == "store.logged" else [])


def test_a_line_that_a_kill_cut_off_hides_none_before_or_after_it(runs, tmp_path):
    admitted(runs[1], tmp_path)
    store = ModelRegistry(tmp_path, "blobs")
    with (store.path / "log.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01T00:00:00+00:00", "event": "res')
    assert admitted(runs[1], tmp_path).version == 2
    assert [line["event"] for line in store.read_events()] == ["reserved", "promoted", "reserved", "promoted"]


def test_two_promoters_do_not_meet(runs, tmp_path):
    store = ModelRegistry(tmp_path, "blobs")
    with store.lock(), pytest.raises(tf.FolderError, match="in use") as refused:
        admitted(runs[1], tmp_path)
    assert f"process {os.getpid()} is promoting" in refused.value.why
    assert admitted(runs[1], tmp_path).version == 1


def test_a_bundle_is_promoted_as_it_is(runs, tmp_path):
    bundle = export(runs[1], to=["safetensors"], out=tmp_path / "b", data=data())
    admitted(bundle, tmp_path / "store")
    for name in ("model.safetensors", "bundle.json", "manifest.json"):
        assert (tmp_path / "store" / "blobs" / "1" / name).read_bytes() == (bundle / name).read_bytes()


def test_a_version_that_changed_on_the_disk_is_no_way_back(runs, tmp_path):
    admitted(runs[0], tmp_path)
    admitted(runs[1], tmp_path)
    store = ModelRegistry(tmp_path, "blobs")
    with (store.version_dir(1) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(tf.FolderError, match=r"model.safetensors"):
        store.rollback()
    assert store.champion == 2


def test_the_log_counts_how_often_a_test_set_decided(runs, tmp_path):
    for times in range(3):
        done = admitted(runs[1], tmp_path)
        assert done.decision.test_sets["old"]["num_uses"] == times
    verdicts = [line["decision"] for line in ModelRegistry(tmp_path, "blobs").read_events() if "decision" in line]
    assert [each["test_sets"]["old"]["num_uses"] for each in verdicts] == [0, 1, 2]
    assert verdicts[0]["reason"] == "it is the first of its name, and every floor holds"


def test_a_challenger_that_trained_on_the_champions_test_set_is_refused(runs, tmp_path):
    admitted(runs[0], tmp_path)
    test = data().test
    cheat = data(train=tf.Split(test.source.inputs, test.targets), test=blobs(60, seed=8))
    run = finished(tmp_path / "cheat", epochs=6, lr=3e-2, given=cheat)
    done = admitted(run, tmp_path, data=cheat, old_test_set=test)
    assert done.version is None
    assert "trained on 100.0 % of the old test set" in done.decision.reason


def test_a_challenger_that_fails_its_parity_is_refused_and_logged(runs, tmp_path, plant):
    source = """
        import tuneforge as tf
        from tuneforge.builtin.exports.safetensors import SafetensorsFormat

        @tf.component(api=1)
        class Crooked(SafetensorsFormat):
            "Answers that are off."

            def load(self, directory, *, device_name):
                forward = super().load(directory, device_name=device_name)
                return lambda stored: -forward(stored)
        """
    plant("crooked", {"tuneforge.export": {"crooked": "crooked:Crooked"}}, crooked=textwrap.dedent(source))
    admitted(runs[0], tmp_path / "s")
    done = admitted(runs[1], tmp_path / "s", to=["crooked"])
    assert (done.version, done.decision.promoted) == (None, False)
    assert done.decision.reason.startswith(
        "the crooked export does not answer as the tuned model: an answer is off by "
    )
    store = ModelRegistry(tmp_path / "s", "blobs")
    assert (store.champion, store.read_events()[-1]["event"]) == (1, "refused")
    assert sorted(each.name for each in store.path.iterdir()) == [".lock", "1", "champion.json", "log.jsonl"]


def test_the_champions_own_test_split_is_prepared_again_where_the_challengers_is_another(tmp_path):
    lines = [f"{n / 100:.2f},{'ab'[n % 20 > 9]}\n" for n in range(200)]
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(lines))
    source = tf.use("table-csv", path=str(tmp_path / "t.csv"), target="y")
    settings = {"data": source, "model": tf.use("mlp", hidden=(8,)), "strategy": [], "page": False}
    verdicts = []
    for seed in (0, 1):
        tf.Engine(out=tmp_path / f"run{seed}", seed=0, data_seed=seed, **settings).run()
        done = admitted(tmp_path / f"run{seed}", tmp_path / "s", data=None, name=None)
        verdicts.append(done.decision)
    assert done.name == "table-csv"
    assert verdicts[0].promoted
    assert verdicts[1].test_sets["old"]["fingerprint"] == verdicts[0].test_sets["old"]["fingerprint"]


def test_names_and_places_that_do_not_exist_are_said(tmp_path):
    for name in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(tf.UsageError, match="cannot be a model's name"):
            ModelRegistry(tmp_path, name)
    with pytest.raises(tf.FolderError, match="there is no store"):
        list_models(tmp_path / "none")
    with pytest.raises(tf.FolderError, match="the store has no model 'digit'"):
        find_model(tmp_path, "digit")
    with pytest.raises(tf.FolderError, match="has no champion"):
        ModelRegistry(tmp_path, "x").load()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_sigkill_in_promote_leaves_the_old_champion(runs, tmp_path):
    admitted(runs[1], tmp_path)
    store = ModelRegistry(tmp_path, "blobs")
    champions = []
    for point in ("store.reserved", "store.logged", "store.pointed"):
        assert killed_at(point, lambda: admitted(runs[1], tmp_path)) == -signal.SIGKILL
        champions.append(store.champion)
        assert store.load().verify() == 16
    assert champions == [1, 1, 4]
    assert admitted(runs[1], tmp_path).version == 5
    assert [path.name for path in (tmp_path / "blobs").glob(".*")] == [".lock"]


def killed_at(point, action):
    """How a child ends that does something and is killed at a point."""
    child = os.fork()
    if not child:
        signal.alarm(60)
        faults.hook = lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == point else None
        try:
            action()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("place", ["", "models", "checkpoints/models"])
def test_a_store_is_not_made_in_the_folder_of_a_run_or_of_a_bundle(runs, tmp_path, place):
    bundle = export(runs[1], to=("safetensors",), out=tmp_path / "bundle", data=data())
    for inside, kind in ((runs[1], "run"), (bundle, "bundle")):
        before = sorted(inside.rglob("*"))
        with pytest.raises(tf.FolderError, match=f"lies in the folder of a {kind}"):
            admitted(runs[1], inside / place)
        assert sorted(inside.rglob("*")) == before


def test_new_files_are_looked_for_before_any_work(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, said in (("nosuch", "there is no folder"), ("empty", "holds no labelled files")):
        with pytest.raises(tf.DataError, match=said):
            admitted(runs[1], tmp_path / "models", new_test_set=tmp_path / name)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("group", [["models"], ["plugins"], ["cache"], ["data"], []])
def test_a_group_alone_prints_its_help(group, capsys):
    assert main(group) == 2
    said = capsys.readouterr().err
    assert said.startswith("Usage: tuneforge")
    assert "error:" not in said
