"""`auto`: ranking of layer groups from synthetic diagnostics, then runs on a small model."""

import attrs
import pytest
import torch
from tiny import tiny_data, tiny_net

import tuneforge as tf
from tuneforge.builtin.strategies.auto import Auto, accuracy_after_relabeling, rank_blocks
from tuneforge.plugin import Diagnostics, LayerGroupInfo

TASK = tf.TaskInfo(
    groups=[LayerGroupInfo(name, 1, (f"{name}.weight",)) for name in ("first", "second", "head")],
    classes=("a", "b"),
    num_train=200,
    num_val=100,
    batch_size=20,
    device="cpu",
    seed=0,
    monitor="accuracy",
    monitor_mode="max",
    old_classes=("a", "b"),
)
GRADIENTS = Diagnostics("gradients", {"first": 0.5, "second": 2.0, "head": 1.0})
STILL = Diagnostics("feature-drift", {"first": 0.1, "second": 0.1, "head": 0.1})


def before(confusion):
    return tf.StrategyStepResult("start-metrics", val={"accuracy": 0.5, "loss": 1.0, "confusion": confusion})


def order(confusion=((40, 10), (10, 40)), drift=STILL):
    return [block for block, _ in rank_blocks(TASK, before(confusion), GRADIENTS, drift, 5)]


def test_without_other_signs_blocks_come_by_relative_gradient_norm():
    assert order() == ["second", "head", "first"]


def test_permuted_predictions_rank_the_head_first():
    assert accuracy_after_relabeling(before(((5, 45), (48, 2))), ()) == pytest.approx(
        (0.07, 0.93, (0.93 * 0.07 / 100) ** 0.5)
    )
    assert order(((5, 45), (48, 2))) == ["head", "second", "first"]
    assert order(((24, 26), (26, 24))) == ["second", "head", "first"]  # 0.48 or 0.52: by chance


def test_permuted_predictions_are_found_from_the_largest_confusions():
    rows = {name: {"recall": correct / 50, "support": 50} for name, correct in (("a", 5), ("b", 2))}
    val = {"accuracy": 0.07, "loss": 1.0, "per_class": rows, "largest_confusions": [[1, 0, 48], [0, 1, 45]]}
    found = tf.StrategyStepResult("start-metrics", val=val)
    assert accuracy_after_relabeling(found, TASK.classes) == accuracy_after_relabeling(before(((5, 45), (48, 2))), ())
    assert [block for block, _ in rank_blocks(TASK, found, GRADIENTS, STILL, 5)] == ["head", "second", "first"]


def test_the_lowest_block_whose_features_drift_comes_before_those_with_large_gradients():
    chance = (2 / torch.pi * (1 / 100 + 1 / 100)) ** 0.5
    drifting = Diagnostics("feature-drift", {"first": 3.1 * chance, "second": 9.0, "head": 9.0})
    assert order(drift=drifting) == ["first", "second", "head"]
    assert order(drift=Diagnostics("feature-drift", {"first": 2.9 * chance, "second": 0.1, "head": 0.1}))[0] == "second"
    assert order(((5, 45), (48, 2)), drifting) == ["head", "first", "second"]


def test_targets_without_confusion_are_diagnosed_by_the_probes_alone():
    assert accuracy_after_relabeling(tf.StrategyStepResult("start-metrics", val={"rmse": 1.0}), ()) == (0.0, 0.0, 0.0)


class Witness:
    """Copies the weights and buffers when a phase starts."""

    def __init__(self):
        self.starts = {}

    @tf.hookimpl
    def phase_started(self, run):
        state = run.model.module.state_dict()
        self.starts[run.phase.name] = {name: each.clone() for name, each in state.items()}


def knowing(net):
    return tf.Model.from_module(net, head="head", labels=("a", "b", "c"))


@pytest.fixture
def shifted(tune):
    """The tiny network, tuned on the blobs, and blobs whose classes are other ones."""
    net = tiny_net()
    tune([tf.Phase("all", epochs=20, lr=0.01)], model=knowing(net))
    data = tiny_data()
    moved = {name: tf.Split(split.source.inputs, (split.targets + 1) % 3) for name, split in
             (("train", data.train), ("val", data.val), ("test", data.test))}  # fmt: skip
    return net, attrs.evolve(data, **moved)


def test_every_block_is_tried_from_the_same_weights_and_only_the_chosen_one_moves(tune, shifted):
    net, data = shifted
    start, witness = {name: each.clone() for name, each in net.state_dict().items()}, Witness()
    result = tune(Auto(epochs=4, candidates=3, then_all=False), model=knowing(net), data=data, callbacks=[witness])
    assert set(witness.starts) == {"head-only", "first-only", "second-only"}
    for found in witness.starts.values():
        assert all(torch.equal(found[name], start[name]) for name in start)
    block = result.strategy_steps[-1][0].snapshots[-1].removesuffix("-only")
    after = result.model.module.state_dict()
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], after[name])}
    assert moved == {block}


def test_a_shift_of_the_labels_is_diagnosed_and_fixed(tune, shifted):
    net, data = shifted
    result = tune(tf.use("auto", candidates=2), model=knowing(net), data=data)
    first = next(step for step, _ in result.strategy_steps if isinstance(step, tf.Phase))
    assert first.name == "head-only"
    assert "relabeling the predictions would raise accuracy from" in first.why
    assert result.strategy_steps[0][1].val["accuracy"] < 0.2
    assert result.report["splits"]["test"]["accuracy"] > 0.8


def test_it_tries_at_most_the_given_candidates_with_a_reason_for_each_step(tune, shifted):
    net, data = shifted
    steps = [
        step
        for step, _ in tune(Auto(epochs=1, candidates=1, then_all=False), model=knowing(net), data=data).strategy_steps
    ]
    assert [step.name for step in steps] == ["start-metrics", "gradients", "feature-drift", "head-only", "best-block"]
    assert all(step.why for step in steps)


def test_a_head_with_random_rows_is_fitted_first(tune):
    model = tf.Model.from_module(tiny_net(), head="head", labels=("a", "b", "z"))
    steps = [step for step, _ in tune(Auto(epochs=1, then_all=False), model=model).strategy_steps]
    assert isinstance(steps[0], tf.HeadFit)
    assert steps[-1].snapshots[0] == "head"


def test_starting_weights_are_kept_if_no_layer_group_improves(tune, shifted):
    net, data = shifted
    start = {name: each.clone() for name, each in net.state_dict().items()}
    result = tune(Auto(epochs=1, lr=1e-9, then_all=False), model=knowing(net), data=data)
    assert result.strategy_steps[-1][0].snapshots == ("start-metrics",)
    assert "no layer group improves" in result.strategy_steps[-1][0].why
    assert all(torch.equal(start[name], each) for name, each in result.model.module.state_dict().items())


def conversation(figures):
    """The steps asked for where `head-only`, `chosen` and `all` end on these accuracies; the start is at 0.5."""
    talk, steps, answer = Auto(candidates=1).finetune_strategy(task=TASK), [], None
    while True:
        try:
            step = talk.send(answer)
        except StopIteration:
            return steps
        steps.append(step)
        accuracy = figures.get(step.name, 0.5)
        answer = tf.StrategyStepResult(
            step.name, val={"accuracy": accuracy, "loss": 1.0, "confusion": ((5, 45), (48, 2))}
        )
        if isinstance(step, tf.Diagnosis):
            answer = GRADIENTS if step.measure == "gradients" else STILL


def test_all_layers_train_last_at_a_tenth_of_the_lr_and_that_is_undone_without_improvement():
    kept = conversation({"head-only": 0.8, "best-block": 0.8, "all": 0.9})
    assert [step.name for step in kept] == [
        "start-metrics",
        "gradients",
        "feature-drift",
        "head-only",
        "best-block",
        "all",
    ]
    assert (kept[-1].train, kept[-1].lr) == (("all",), kept[-3].lr / 10)
    undone = conversation({"head-only": 0.8, "best-block": 0.8, "all": 0.8})
    assert [step.name for step in undone[-2:]] == ["all", "final"]
    assert undone[-1].snapshots == ("best-block",)
    assert "accuracy 0.8000 after 0.8000" in undone[-1].why
