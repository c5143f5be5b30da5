"""Snapshots are written once, only where a later step can ask for them, and checkpoints refer to them."""

import json

import pytest
import torch
from simulated_kill import read_files, run_and_kill
from tiny import tiny_data, tiny_net
from torch import nn

import tuneforge as tf
from tuneforge.engine.storage.snapshot_files import SnapshotFiles

CPU = torch.device("cpu")


def save(files, snapshots):
    files.write(files.add(snapshots))
    return json.loads(json.dumps(files.state()))


def reload(directory, state):
    hashes = {file: tuple(measured) for file, measured in state.pop("files").items()}
    return SnapshotFiles(directory, files=hashes, **state).load(CPU)


def test_shared_tensor_is_written_once_and_shared_again(tmp_path):
    frozen, first, second = torch.ones(1000), torch.zeros(2), torch.arange(2.0)
    snapshots = {"start": {"frozen": frozen, "head": first}, "one": {"frozen": frozen, "head": second}}
    files = SnapshotFiles(tmp_path / "snapshots")
    state = save(files, snapshots)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "snapshots").iterdir())]
    assert sizes[0] > 4000 > 300 > sizes[1]
    assert save(files, snapshots) == state, "nothing is written twice"
    again = reload(tmp_path / "snapshots", state)
    assert again["one"]["frozen"] is again["start"]["frozen"]
    assert torch.equal(again["start"]["head"], first)
    assert torch.equal(again["one"]["head"], second)


def test_snapshot_that_is_dropped_leaves_what_a_later_one_shares(tmp_path):
    frozen = torch.ones(3)
    snapshots = {"start": {"frozen": frozen, "head": torch.zeros(2)}}
    files = SnapshotFiles(tmp_path / "snapshots")
    save(files, snapshots)
    snapshots["one"] = {"frozen": frozen, "head": torch.ones(2)}
    save(files, snapshots)
    del snapshots["start"]
    again = reload(tmp_path / "snapshots", save(files, snapshots))
    assert list(again) == ["one"]
    assert torch.equal(again["one"]["frozen"], frozen)
    assert save(files, {}) == {"num_files": 2, "files": {}, "parts": {}}


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_damaged_file_is_named(tmp_path, damage):
    files = SnapshotFiles(tmp_path / "snapshots")
    state = save(files, {"start": {"a": torch.zeros(2)}})
    damage(tmp_path / "snapshots" / "0001.safetensors")
    with pytest.raises(tf.FolderError, match=r"snapshot of the weights is damaged.*0001\.safetensors"):
        reload(tmp_path / "snapshots", state)


class Weigh:
    """Records the bytes of the checkpoints, and of the snapshots, at the start of each phase."""

    def __init__(self, path):
        self.path, self.checkpoints, self.snapshots = path, [], []

    @tf.hookimpl
    def phase_started(self):
        for name, sizes in (("checkpoints", self.checkpoints), ("snapshots", self.snapshots)):
            sizes.append(sum(each.stat().st_size for each in (self.path / name).rglob("*") if each.is_file()))


def phases(count):
    return [tf.Phase(f"p{number}", train="head", steps=1, lr=1e-3) for number in range(count)]


def in_turn(steps):
    def strategy(task):
        for step in steps:
            result = yield step
            assert result.step_name == step.name

    return strategy


AVERAGE = tf.WeightAverage("average", snapshots=["p1", "start"], weights=[0.5])


@pytest.mark.parametrize(
    ("strategy", "num_snapshots"),
    [
        (phases(10), [0] * 10),
        ([*phases(10), AVERAGE], [0, 1, *[2] * 8]),
        ([*phases(4), AVERAGE, *[tf.Phase(f"q{number}", train="head", steps=1) for number in range(5)]], [0, 1, 2, 2]),
        (in_turn(phases(10)), [0, *range(2, 11)]),
    ],
    ids=["list", "list with an average at the end", "list with an average in the middle", "generator"],
)
def test_checkpoints_do_not_grow_with_the_steps_of_a_strategy(tmp_path, strategy, num_snapshots):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 2000), nn.ReLU(), nn.Linear(2000, 3))
    scale = Weigh(tmp_path / "r")
    settings = {"page": False, "checkpoint_s": 0.0, "keep": 1, "out": tmp_path / "r", "batch_size": 64}
    tf.Engine(data=tiny_data(), model=network, strategy=strategy, callbacks=[scale], **settings).run()
    assert max(scale.checkpoints[6:]) < 1.1 * max(scale.checkpoints[2:6])
    body, head = 4 * 9 * 2000, 4 * 3 * 2001  # the frozen body is written with the first snapshot alone
    for size, count in zip(scale.snapshots, num_snapshots, strict=False):
        assert size == pytest.approx((body if count else 0) + count * head, rel=0.02)
    assert not (tmp_path / "r" / "snapshots").exists(), "a finished run needs none"


def engine(path, strategy, resume=False):
    objects = {"data": tiny_data(), "model": tiny_net(), "strategy": strategy}
    if resume:
        return tf.Engine.resume(path, **objects)
    return tf.Engine(**objects, page=False, checkpoint_s=0.0, out=path, batch_size=48, seed=1)


@pytest.mark.parametrize("make", [list, in_turn])
def test_snapshots_of_a_killed_run_are_averaged_bit_identically(tmp_path, make):
    steps = [*phases(3), AVERAGE, tf.WeightAverage("back", snapshots=["p0"]), tf.Phase("last", steps=2)]
    engine(tmp_path / "unbroken", make(steps)).run()
    expected = read_files(tmp_path / "unbroken")
    for number in (1, 3, 4, 5):
        path = tmp_path / f"r{number}"
        run_and_kill(engine(path, make(steps)).run, number, only="phase-saved")
        run_and_kill(engine(path, make(steps), resume=True).run, 1, only="phase-saved")
        engine(path, make(steps), resume=True).run()
        assert read_files(path) == expected


def test_checkpoint_whose_snapshot_is_damaged_is_skipped(tmp_path):
    path, steps = tmp_path / "r", [*phases(3), AVERAGE]
    engine(tmp_path / "unbroken", steps).run()
    run_and_kill(engine(path, steps).run, 2, only="phase-saved")
    assert len(list((path / "snapshots").iterdir())) == 2
    (path / "snapshots" / "0002.safetensors").unlink()
    lines = []
    objects = {"data": tiny_data(), "model": tiny_net(), "strategy": steps}
    tf.Engine.resume(path, log=lines.append, **objects).run()
    assert any("warning: a snapshot of the weights is damaged" in line for line in lines)
    assert read_files(path) == read_files(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("steps", "error", "words"),
    [
        ([tf.WeightAverage("a", snapshots=["p0"]), *phases(1)], tf.UsageError, "no snapshot 'p0'.*known: start"),
        ([*phases(2), tf.WeightAverage("a", snapshots=["x"])], tf.UsageError, "no snapshot 'x'.*known: start, p0, p1"),
        ([*phases(1), *phases(1)], tf.PluginError, "names two steps 'p0'"),
    ],
)
def test_plan_that_names_an_unknown_snapshot_is_refused_before_it_trains(tmp_path, steps, error, words):
    with pytest.raises(error, match=words):
        engine(tmp_path / "r", steps).run()
    assert not (tmp_path / "r" / "steps.jsonl").exists()
