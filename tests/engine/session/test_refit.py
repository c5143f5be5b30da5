"""`refit`: training again on training and validation samples, by the choices that were made before."""

import json

import attrs
import pytest
import torch
from tiny import blobs, tiny_data, tiny_net

import tuneforge as tf
from tuneforge.engine.data.joined_source import join_splits
from tuneforge.sklearn import data_from_arrays

PHASES = [
    tf.Phase("head", train="head", epochs=2, lr=1e-2),
    tf.Phase("all", train="all", epochs=6, lr=3e-2, restore_best=True, patience=2),
]


def joined():
    data = tiny_data()
    return attrs.evolve(data, train=join_splits(data.train, data.val), val=data.val.subset(torch.arange(0)))


def same(first, second):
    return all(torch.equal(one, two) for one, two in zip(first.values(), second.values(), strict=True))


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_a_refit_is_a_run_on_all_samples_with_the_choices_of_before(tune, cache):
    lines = []
    plain, refitted = (tune(PHASES, refit=refit, cache=cache, log=lines.append) for refit in (False, True))
    assert refitted.report["splits"]["val"] == plain.report["splits"]["val"]
    assert [each for _, each in refitted.strategy_steps] == [each for _, each in plain.strategy_steps]
    record = refitted.report["refit"]
    best = plain.strategy_steps[1][1].best_epoch
    assert record["num_samples"] == 126
    assert [each["epochs"] for each in record["steps"]] == [2, best]
    assert "before the refit" in record["note"]
    assert any("before the refit" in line for line in lines)
    assert (refitted.run_dir / "metrics.jsonl").read_bytes() == (plain.run_dir / "metrics.jsonl").read_bytes()
    fixed = [PHASES[0], tf.Phase("all", train="all", epochs=6, lr=3e-2)]
    by_hand = tune(fixed, data=joined(), callbacks=[StopAfter(2 + best)], cache=cache)
    assert same(refitted.model.module.state_dict(), by_hand.model.module.state_dict())
    assert refitted.report["splits"]["test"] == by_hand.report["splits"]["test"]
    loaded = tf.load(refitted.run_dir, model=tiny_net(seed=9)).model.module.state_dict()
    assert same(loaded, refitted.model.module.state_dict())


class StopAfter:
    """Keeps the weights that the model had after some epochs, and puts them back at the end of the phase."""

    def __init__(self, epochs):
        self.epochs, self.kept = epochs, None

    @tf.hookimpl
    def epoch_ended(self, run):
        if run.epoch == self.epochs:
            self.kept = {name: each.clone() for name, each in run.model.module.state_dict().items()}

    @tf.hookimpl
    def phase_ended(self, run):
        if self.kept is not None:
            run.model.module.load_state_dict(self.kept)


@pytest.mark.parametrize("strategy", ["lp-ft", "wise-ft", "l2-sp"])
def test_strategies_are_refitted_by_their_own_steps(tune, strategy):
    first, again, plain = (tune(strategy, refit=refit) for refit in (True, True, False))
    assert same(first.model.module.state_dict(), again.model.module.state_dict())
    assert not torch.equal(first.model.module.head.weight, plain.model.module.head.weight)
    assert first.report["splits"]["val"] == plain.report["splits"]["val"]


@pytest.mark.parametrize("stop_at", [3, 25, 80])
def test_a_refit_that_is_stopped_is_started_again_by_a_resume(tune, stop_at):
    whole = tune(PHASES, refit=True)
    steps = []

    class Count:
        @tf.hookimpl(wrapper=True)
        def optimizer_step(self, run):
            result = yield
            steps.append(run.step)
            if len(steps) == stop_at:
                engines[0].stop("the test", exit_code=130)
            return result

    engines = []
    settings = {"data": tiny_data(), "batch_size": 16, "page": False, "refit": True}
    out = whole.run_dir.parent / "stopped"
    engines.append(tf.Engine(strategy=PHASES, model=tiny_net(), out=out, callbacks=[Count()], **settings))
    with pytest.raises(tf.TuneforgeError, match="stopped"):
        engines[0].run()
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    resumed = tf.Engine.resume(out, model=tiny_net(), data=tiny_data(), strategy=PHASES, callbacks=[Count()]).run()
    assert same(resumed.model.module.state_dict(), whole.model.module.state_dict())
    assert resumed.report == whole.report


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"data": data_from_arrays(*([torch.randn(60, 8), torch.arange(60) % 3]), val=0.0)}, "no validation split"),
     ({"budget": "5epochs"}, "budget")],
)  # fmt: skip
def test_what_cannot_be_refitted_is_refused_before_training(tune, settings, message):
    with pytest.raises(tf.UsageError, match=f"--refit cannot be used.*{message}"):
        tune([tf.Phase("all", train="all", epochs=1)], refit=True, **settings)


def test_joined_splits_keep_samples_targets_ids_and_draws():
    class Noise:
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return self.rows

        def fetch(self, indices):
            return torch.stack([indices.float(), torch.randn(len(indices))], 1)

    first, second = (tf.Split(Noise(rows), torch.arange(rows)) for rows in (4, 3))
    split = join_splits(first, second)
    rows = torch.tensor([5, 0, 6, 3])
    assert split.targets[rows].tolist() == [1, 0, 2, 3]
    assert split.fetch(rows)[:, 0].tolist() == [1, 0, 2, 3]
    assert torch.equal(split.fetch(rows, 3), split.fetch(rows.flip(0), 3).flip(0))
    assert not torch.equal(split.fetch(rows, 4), split.fetch(rows, 3))
    in_memory = join_splits(blobs(5, seed=1), blobs(4, seed=2))
    assert in_memory.in_memory
    assert torch.equal(in_memory.fetch(torch.arange(5, 9)), blobs(4, seed=2).fetch(torch.arange(4)))
