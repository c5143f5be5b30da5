"""A resumed run is the run that was started: other data, steps, components or settings are refused with a diff."""

import json
import shutil

import attrs
import numpy as np
import pytest
import torch
from simulated_kill import run_and_kill
from tiny import blobs, tiny_data, tiny_net
from torch import nn
from torch.utils.data import Dataset

import tuneforge as tf
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import ClassTargets
from tuneforge.engine.data.fingerprint import describe_split
from tuneforge.engine.model.module_state import full_state
from tuneforge.engine.session.resume_check import check_data, check_model, check_plan, check_step
from tuneforge.engine.session.run_log import describe_data
from tuneforge.plugin.config_conflicts import find_changes
from tuneforge.sklearn import data_from_arrays

PHASE = {"train": "all", "epochs": 2, "lr": 1e-2}


class Lazy:
    """A source without a fingerprint."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def fetch(self, indices):
        return self.values[indices]


def with_split(name, *, inputs=lambda x: x, targets=lambda y: y, source=lambda x: x, ids=None):
    split = getattr(tiny_data(), name)
    values = split.fetch(torch.arange(len(split)))
    return attrs.evolve(
        tiny_data(), **{name: tf.Split(source(inputs(values)), targets(split.targets.clone()), ids=ids)}
    )


def shift_one(row):
    def shift(values):
        values = values.clone()
        values[row] += 1
        return values

    return shift


def lazily(inputs=lambda x: x):
    return with_split("train", inputs=inputs, source=Lazy)


def flipped(values):
    return values.flip(0)


def group(rows):
    return attrs.evolve(tiny_data(), sample_groups={"old": torch.tensor(rows)})


def recorded(data):
    return json.loads(json.dumps(describe_data(data)))


WATCHED_ROW = int(torch.randperm(96, generator=torch.Generator().manual_seed(0))[63])
"""The last row of the chunks of 4, 4, 8, 16 and 32 rows that are read of a source without a fingerprint."""

CHANGES = {
    "one value": (tiny_data, lambda: with_split("train", inputs=shift_one(7)), "train split: other inputs"),
    "one label": (
        tiny_data,
        lambda: with_split("val", targets=lambda y: shift_one(3)(y) % 3),
        "val split: other targets",
    ),
    "order": (tiny_data, lambda: with_split("test", inputs=flipped, targets=flipped), "test split: other inputs and"),
    "ids": (tiny_data, lambda: with_split("train", ids=[f"r{row}" for row in range(96)]), "train split: other ids"),
    "fewer": (
        tiny_data,
        lambda: attrs.evolve(tiny_data(), train=blobs(90, seed=1)),
        "train split: 96 samples in the run, 90 samples now",
    ),
    "a split more": (
        tiny_data,
        lambda: attrs.evolve(tiny_data(), extra_test_splits={"late": blobs(9, seed=4)}),
        "late split: no such split in the run, 9 samples now",
    ),
    "class names": (
        tiny_data,
        lambda: attrs.evolve(tiny_data(), targets=ClassTargets(names=("a", "x", "c"))),
        r"targets.options.names\[1\]: 'b' in the run, 'x' now",
    ),
    "one class more": (
        tiny_data,
        lambda: attrs.evolve(tiny_data(), targets=ClassTargets(names=("a", "b", "c", "d"))),
        r"targets.options.names\[3\]: None in the run, 'd' now",
    ),
    "preprocessing": (
        tiny_data,
        lambda: attrs.evolve(tiny_data(), inputs=TensorInputs(means=(1.0,) * 8, scales=(2.0,) * 8)),
        r"inputs.options.means\[0\]: None in the run, 1.0 now",
    ),
    "sample groups": (lambda: group([0, 1]), lambda: group([0, 2]), "sample_groups.old"),
    "a source without fingerprint": (lazily, lambda: lazily(shift_one(WATCHED_ROW)), "train split: other inputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_other_data_is_refused_and_the_difference_named(name):
    before, now, words = CHANGES[name]
    record = recorded(before())
    check_data(before(), record)
    with pytest.raises(tf.DataError, match=words) as caught:
        check_data(now(), record)
    assert str(caught.value).count(" split: ") + str(caught.value).count(" in the run, ") >= 1


def test_sources_that_cannot_tell_are_not_refused():
    class Random(Lazy):
        def fetch(self, indices):
            return self.values[indices] + np.random.default_rng().normal()

    class Unknown(Lazy):
        def fingerprint(self):
            return None

    for source in (Random, Unknown):
        split = tf.Split(source(torch.zeros(9, 2)), torch.zeros(9, dtype=torch.int64))
        assert describe_split(split)["inputs"] is None
    check_data(lazily(shift_one(0)), recorded(tiny_data()))  # once a hash of all rows, once hashes of chunks


def test_slow_sources_are_compared_as_far_as_both_were_read(monkeypatch):
    split = lazily().train
    complete = describe_split(split)["inputs"]
    assert len(complete) == 5  # chunks of 4, 4, 8, 16 and 32 rows
    monkeypatch.setattr("tuneforge.engine.data.fingerprint._READING_TIME_S", 1e-9)
    ticks = iter([0.0, 0.0, 1.0])
    monkeypatch.setattr("tuneforge.engine.data.fingerprint.time.monotonic", lambda: next(ticks))
    assert describe_split(split)["inputs"] == complete[:1]


STEPS = [
    (tf.Phase("p", **PHASE), tf.Phase("p", **PHASE | {"lr": 0.1}), "lr=0.01; now: lr=0.1"),
    (tf.Phase("p", **PHASE), tf.Phase("p", **PHASE | {"epochs": 3, "lr": 1}), "epochs=2, lr=0.01; now: epochs=3, lr=1"),
    (tf.Phase("p", **PHASE), tf.Phase("p", **PHASE | {"train": "head"}), r"train=\('all',\); now: train=\('head',\)"),
    (tf.Phase("p", **PHASE), tf.Phase("q", **PHASE), "name='p'; now: name='q'"),
    (
        tf.Phase("p", **PHASE, lr_scales={"all": 0.5, "head": 2.0}),
        tf.Phase("p", **PHASE, lr_scales={"head": 2.0, "all": 0.5}),
        "lr_scales",
    ),
    (
        tf.Phase("p", **PHASE, optimizer=tf.use("sgd", momentum=0.9)),
        tf.Phase("p", **PHASE, optimizer="sgd"),
        "optimizer=ComponentSpec",
    ),
    (tf.HeadFit("h", l2=0.1), tf.HeadFit("h", l2=0.2), "l2=0.1; now: l2=0.2"),
    (tf.HeadFit("h"), tf.Phase("h", **PHASE), "HeadFit 'h'; now: Phase 'h'"),
    (tf.HeadFit("h"), None, "HeadFit 'h'; now: the strategy ends"),
    (tf.WeightAverage("w", snapshots=["start"]), tf.WeightAverage("w", snapshots=["p"]), "snapshots="),
    (tf.Diagnosis("d"), tf.Diagnosis("d", batches=1), "batches=5; now: batches=1"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "now", "words"), STEPS)
def test_another_step_is_refused_and_only_the_options_that_differ_are_named(before, now, words):
    check_step(3, before, attrs.evolve(before, why="another reason"))
    with pytest.raises(tf.UsageError, match=f"strategy step 3, '{before.name}'.*before: .*{words}") as caught:
        check_step(3, before, now)
    assert "batchnorm_stats" not in str(caught.value)


def test_a_plan_with_more_or_fewer_steps_is_refused():
    steps = (tf.HeadFit("h"), tf.Phase("p", **PHASE))
    check_plan(steps, steps)
    for before, now in ((steps, steps[:1]), (steps[:1], steps)):
        with pytest.raises(tf.UsageError, match=f"has {len(now)} steps, and {len(before)}"):
            check_plan(before, now)


def as_list(*steps):
    return list(steps)


def as_generator(*steps):
    def strategy(task):
        for step in steps:
            result = yield step
            assert result.step_name == step.name

    return strategy


FIRST, SECOND = tf.Phase("one", **PHASE), tf.Phase("two", **PHASE | {"lr": 1e-3})
OTHER = tf.Phase("two", **PHASE | {"lr": 1e-4})


def resume(path, **objects):
    return tf.Engine.resume(path, **{"data": tiny_data(), "model": tiny_net(), "strategy": [FIRST, SECOND]} | objects)


def stopped(path, strategy, number=0, *, at="step-saved", **settings):
    """Kill a run at a point, and return its directory."""
    settings = {"batch_size": 16, "page": False, "out": path, "checkpoint_s": 1e9, "seed": 2} | settings
    engine = tf.Engine(data=tiny_data(), model=tiny_net(), strategy=strategy, **settings)
    run_and_kill(engine.run, number, only=at)
    return path


@pytest.mark.parametrize("make", [as_list, as_generator])
@pytest.mark.parametrize(
    ("number", "settings"),
    [(3, {}), (3, {"checkpoint_steps": 1}), (15, {"checkpoint_steps": 12}), (15, {"checkpoint_steps": 1})],
    ids=["first phase, no checkpoint", "first phase", "second phase, checkpoint before it", "second phase"],
)
def test_the_step_under_way_may_not_change_with_or_without_a_checkpoint_in_it(tmp_path, make, number, settings):
    path = stopped(tmp_path / "r", make(FIRST, SECOND), number, **settings)
    edited = (attrs.evolve(FIRST, lr=0.5), SECOND) if number == 3 else (FIRST, OTHER)
    metrics = path / "metrics.jsonl"
    before = metrics.read_bytes() if metrics.exists() else b""
    with pytest.raises(tf.UsageError, match=r"before: lr=.*now: lr="):
        resume(path, strategy=make(*edited)).run()
    assert (metrics.read_bytes() if metrics.exists() else b"") == before, "refused before anything trains"
    assert resume(path, strategy=make(FIRST, SECOND)).run().report["splits"]["test"]


def test_a_later_step_of_a_list_may_not_change_and_a_generator_may_end_as_before_only(tmp_path):
    path = stopped(tmp_path / "r", [FIRST, SECOND], 3, checkpoint_steps=1)
    with pytest.raises(tf.UsageError, match="strategy step 2, 'two'.*lr=0.001; now: lr=0.0001"):
        resume(path, strategy=[FIRST, OTHER]).run()
    with pytest.raises(tf.UsageError, match="has 3 steps"):
        resume(path, strategy=[FIRST, SECOND, tf.HeadFit("fit")]).run()
    path = stopped(tmp_path / "s", as_generator(FIRST, SECOND), 15, checkpoint_steps=12)
    with pytest.raises(tf.UsageError, match="Phase 'two'; now: the strategy ends"):
        resume(path, strategy=as_generator(FIRST)).run()


@pytest.mark.parametrize("make", [as_list, as_generator])
def test_steps_after_a_damaged_checkpoint_are_executed_again(tmp_path, make):
    """The run had begun step 2; it goes on from a checkpoint in step 1, and then records step 2 again."""
    path = stopped(tmp_path / "r", make(FIRST, SECOND), 14, checkpoint_steps=5)
    for later in sorted((path / "checkpoints").glob("[0-9]*"))[1:]:
        (later / "state.json").write_text("{")
    lines = []
    resume(path, strategy=make(FIRST, SECOND), log=lines.append).run()
    assert "in strategy step 1, 5 optimizer steps done" in "\n".join(lines)


class Rows(Dataset):
    def __init__(self, values, labels):
        self.values, self.labels = values, labels

    def __len__(self):
        return len(self.values)

    def __getitem__(self, row):
        return self.values[row], int(self.labels[row])


@pytest.mark.parametrize("kind", ["arrays", "dataset", "no checkpoint"])
def test_engine_refuses_other_data_before_it_trains(tmp_path, kind):
    make = {"dataset": Rows}.get(kind, lambda *pair: pair)
    values, labels = blobs(96, seed=1).fetch(torch.arange(96)).numpy(), (np.arange(96) % 3)
    settings = {"checkpoint_s": 1e9 if kind == "no checkpoint" else 0.0, "page": False, "out": tmp_path / "r"}
    engine = tf.Engine(data=make(values, labels), model=tiny_net(), strategy=[FIRST], **settings)
    run_and_kill(engine.run, 1, only="step-saved")
    order = np.random.default_rng(0).permutation(96)
    for other in (make(values[order], labels[order]), make(values + (np.arange(96) == 95)[:, None], labels)):
        with pytest.raises(tf.DataError, match="the data is not that of the stopped run"):
            resume(tmp_path / "r", data=other, strategy=[FIRST]).run()
    assert not (tmp_path / "r" / "metrics.jsonl").exists()
    resume(tmp_path / "r", data=make(values, labels), strategy=[FIRST]).run()


def altered(change):
    """Return the network of the run with a change."""
    network = tiny_net()
    change(network)
    return network


def narrow(network):
    network.first[0], network.first[1] = nn.Linear(8, 12), nn.BatchNorm1d(12)
    network.second[0] = nn.Linear(12, 16)


MODELS = {
    "width": (narrow, r"tensor.first.0.weight: '\(16, 8\) torch.float32' in the run, '\(12, 8\) torch.float32' now"),
    "more": (lambda net: net.second.append(nn.Linear(16, 16)), r"second.4.weight: None in the run, '\(16, 16\)"),
    "fewer": (lambda net: setattr(net.second, "0", nn.Identity()), "tensor.second.0.weight: .* in the run, None now"),
    "dropout": (lambda net: setattr(net.first[3], "p", 0.1), r"Dropout\(p=0.5.*in the run\n.*Dropout\(p=0.1.*now"),
    "activation": (lambda net: setattr(net.first, "2", nn.GELU()), r"ReLU\(\) in the run\n.*GELU\(.*now"),
    "frozen": (
        lambda net: net.first.requires_grad_(False),
        r"frozen by the user\[0\]: None in the run, 'first.0.bias'",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_model_is_refused_with_the_difference(tmp_path, name):
    change, words = MODELS[name]
    path = stopped(tmp_path / "r", [FIRST, SECOND], 2, checkpoint_s=0.0)
    with pytest.raises(tf.TuneforgeError, match=words):
        resume(path, model=altered(change)).run()


def test_model_with_many_differences_is_refused_in_few_lines(tmp_path):
    path = stopped(tmp_path / "r", [FIRST], 2, checkpoint_s=0.0)
    with pytest.raises(tf.UsageError, match="and 12 more") as caught:
        resume(path, model=nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3)), strategy=[FIRST]).run()
    assert str(caught.value).count("tensor.") == 8


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("task.json", lambda path: path.unlink()),
        ("task.json", lambda path: path.write_text('{"$kind": "TaskInfo", "a": 1}')),
        ("strategy.json", lambda path: path.write_text("[]")),
        ("strategy.json", lambda path: path.write_bytes(b"\xff")),
        ("steps.jsonl", lambda path: path.unlink()),
        ("steps.jsonl", lambda path: path.write_text("{" * path.stat().st_size)),
        ("metrics.jsonl", lambda path: path.write_text("")),
        ("model.json", lambda path: path.write_text("{}")),
        ("run.json", lambda path: path.write_text("{}")),
        ("run.json", lambda path: path.write_text("{")),
        ("status.json", lambda path: path.unlink()),
    ],
)
def test_damaged_file_of_a_run_is_named(tmp_path, file, damage):
    path = stopped(tmp_path / "r", [FIRST, SECOND], 14, checkpoint_s=0.0)
    damage(path / file)
    with pytest.raises(tf.FolderError, match=file):
        resume(path).run()


def test_other_dtype_of_a_tensor_is_refused():
    model = tf.Model.from_module(tiny_net(), head="head")
    record = {"modules": None, "frozen_by_user": []}
    tensors = full_state(tiny_net())
    check_model(model, record, tensors)
    with pytest.raises(
        tf.UsageError, match=r"tensor.head.bias: '\(3,\) torch.float16' in the run, .*torch.float32' now"
    ):
        check_model(model, record, {**tensors, "head.bias": tensors["head.bias"].half()})


@pytest.mark.parametrize("name", ["batchsize", "steps", "extensions"])
def test_unknown_keyword_is_refused(half, name):
    with pytest.raises(tf.UnknownNameError, match=name):
        tf.Engine.resume(half, model=tiny_net(), data=(np.zeros((9, 2)), np.arange(9) % 3), **{name: 1})


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    place = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEFORGE_CACHE", str(place / "cache"))
        data = data_from_arrays(blobs(60, seed=1).fetch(torch.arange(60)).numpy(), np.arange(60) % 3)
        engine = tf.Engine(
            data=data, model=tiny_net(), strategy=tf.use("full", epochs=2), callbacks=[tf.use("ema", decay=0.9)],
            optimizer=tf.use("sgd", momentum=0.5), page=False, out=place / "r", seed=2,
        )  # fmt: skip
        run_and_kill(engine.run, 2, only="step-saved")
    return place / "r"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 8}, "batch_size: the run has none, given 8"),
        ({"seed": 3}, "seed: the run has 2, given 3"),
        ({"budget": "3epochs"}, "budget: the run has none, given 3epochs"),
        ({"precision": "bf16", "seed": 2}, "precision: the run has fp32, given bf16"),
        ({"out": "elsewhere"}, "out: the run has .*r, given elsewhere"),
        ({"strategy": tf.use("full", epochs=3)}, "strategy.epochs: the run has 2, given 3"),
        ({"strategy": "full"}, "strategy.epochs: the run has 2, given 8"),
        ({"strategy": [FIRST]}, "strategy: the run has full, given object:strategy"),
        ({"optimizer": "sgd"}, "optimizer.momentum: the run has 0.5, given 0.9"),
        ({"callbacks": []}, "callback: the run has ema, given none"),
        ({"callbacks": [tf.use("ema", decay=0.8)]}, "ema.decay: the run has 0.9, given 0.8"),
        ({"callbacks": ["grad-clip", tf.use("ema", decay=0.9)]}, "callback: the run has ema, given grad-clip, ema"),
        ({"loss": "mse"}, "loss: the run has none, given mse"),
        ({"model": "mlp"}, "model: the run has object:model, given mlp"),
        ({"augment": [tf.use("tiny:GaussianJitter")]}, "augment: the run has none, given tiny:GaussianJitter"),
    ],
)
def test_other_components_and_settings_are_refused_with_both_values(half, changed, words):
    data = data_from_arrays(np.zeros((60, 8), "float32"), np.arange(60) % 3)
    with pytest.raises(tf.UsageError, match=words) as caught:
        tf.Engine.resume(half, **{"data": data, "model": tiny_net()} | changed)
    assert str(caught.value).count("the run has") == 1


def test_class_of_a_script_equals_that_of_its_module():
    before = {"callback": [{"name": "__main__:GaussianJitter"}, {"name": "ema", "decay": 0.9}]}
    same = {"callback": [{"name": "tiny:GaussianJitter"}, {"name": "ema", "decay": 0.9}]}
    other = {"callback": [{"name": "tiny:DoubleHeadInput"}, {"name": "ema", "decay": 0.9}]}
    assert list(find_changes(before, same)) == []
    assert [str(each) for each in find_changes(before, other)] == [
        "--callback: the run has __main__:GaussianJitter, ema, given tiny:DoubleHeadInput, ema"
    ]


def test_settings_that_decide_nothing_may_differ_and_are_logged(half, tmp_path):
    path = shutil.copytree(half, tmp_path / "r")
    data = data_from_arrays(blobs(60, seed=1).fetch(torch.arange(60)).numpy(), np.arange(60) % 3)
    lines = []
    given = {"keep": 5, "num_workers": 1, "checkpoint_s": 7.0, "device": "cpu", "page": False, "out": path, "seed": 2}
    same = {"optimizer": tf.use("sgd", momentum=0.5), "callbacks": [tf.use("ema", decay=0.9)]}
    tf.Engine.resume(path, data=data, model=tiny_net(), log=lines.append, **given, **same).run()
    changed = [line for line in lines if "the run has" in line]
    assert changed == [
        "  keep: the run has 2, given 5",
        "  num_workers: the run has 0, given 1",
        "  checkpoint_s: the run has 60.0, given 7.0",
        "  device: the run has auto, given cpu",
    ]
