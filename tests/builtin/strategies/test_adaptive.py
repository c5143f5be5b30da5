"""`adaptive`: decisions from synthetic results in the strategy loop, then runs of the engine."""

import json

import attrs
import pytest
import torch
from tiny import tiny_data, tiny_net
from torch import nn

import tuneforge as tf
from tuneforge.builtin.strategies.adaptive import Adaptive, is_better, weigh_weak_classes
from tuneforge.plugin import LayerGroupInfo

TASK = tf.TaskInfo(
    groups=[LayerGroupInfo(name, 1, (f"{name}.weight", f"{name}.bias")) for name in ("a", "b", "c", "d", "head")],
    classes=("x", "y"),
    num_train=100,
    num_val=100,
    batch_size=10,
    device="cpu",
    seed=0,
    monitor="accuracy",
    monitor_mode="max",
    old_classes=("x", "y"),
    can_fit_head=True,
)


def report(step, accuracy, loss=1.0, **further):
    return tf.StrategyStepResult(step, val={"accuracy": accuracy, "loss": loss, **further})


def conversation(figures, *, task=TASK, **options):
    """The steps that are asked for where the head and each round end on these accuracies; the start is at 0.5."""
    answers = iter(figures)
    steps, answer = [], None
    talk = Adaptive(**options).finetune_strategy(task=task)
    while True:
        try:
            steps.append(talk.send(answer))
        except StopIteration:
            return steps
        step = steps[-1]
        answer = report(step.name, 0.5 if isinstance(step, tf.WeightAverage) else next(answers))


def test_improvements_unfreeze_the_upper_half_then_all_and_two_failures_end_on_the_best_weights():
    steps = conversation([0.6, 0.7, 0.8, 0.9, 0.9, 0.9], rounds=9)
    assert [step.name for step in steps] == [
        "start-metrics", "head", "round-1", "round-2", "round-3", "round-4",
        "restore-4", "round-5", "restore-5", "final",
    ]  # fmt: skip
    assert [step.train for step in steps if isinstance(step, tf.Phase)] == [("groups[-3:]",), *[("all",)] * 4]
    assert steps[6].snapshots == steps[8].snapshots == ("round-3",)
    assert (steps[-1].snapshots, steps[-1].weights) == (("head", "round-3"), (0.5, 0.75, 1.0, 0.25, 0.0))
    assert "two rounds in a row did not improve" in steps[-1].why


def test_a_failure_with_all_unfrozen_divides_lr_by_three_and_an_improvement_keeps_it():
    phases = [
        step for step in conversation([0.6, 0.7, 0.7, 0.9, 0.9, 0.9], lr=0.09, rounds=9) if isinstance(step, tf.Phase)
    ]
    assert [step.lr for step in phases] == pytest.approx([0.09, 0.09, 0.03, 0.03, 0.01])


def test_a_failure_before_all_is_unfrozen_is_undone_and_the_next_round_unfreezes_more_at_the_same_lr():
    steps = conversation([0.6, 0.4, 0.9, 0.9, 0.9], lr=0.09)
    undone, following = steps[3:5]
    assert (undone.name, undone.snapshots) == ("restore-1", ("head",))
    assert (following.train, following.lr) == (("all",), 0.09)


def test_the_target_ends_it_as_soon_as_it_is_met():
    steps = conversation([0.6, 0.8], target=0.75)
    assert [step.name for step in steps] == ["start-metrics", "head", "round-1", "final"]
    assert "target is met: accuracy is 0.8" in steps[-1].why
    assert [step.name for step in conversation([], target=0.5)] == ["start-metrics", "final"]
    loss = attrs.evolve(TASK, monitor="loss", monitor_mode="min")  # 1.0 throughout
    assert [step.name for step in conversation([], target=1.5, task=loss)] == ["start-metrics", "final"]


@pytest.mark.parametrize(("num_train", "batch_size", "epochs"), [(100, 10, 15), (1000, 10, 6), (4, 10, 150)])
def test_a_round_takes_6_epochs_or_150_steps(num_train, batch_size, epochs):
    steps = conversation([0.6, 0.7, 0.8], task=attrs.evolve(TASK, num_train=num_train, batch_size=batch_size))
    assert {step.epochs for step in steps if isinstance(step, tf.Phase)} == {epochs}


def test_it_takes_no_more_rounds_than_asked_for():
    steps = conversation([0.6, 0.7, 0.8], rounds=3)
    assert [step.name for step in steps] == ["start-metrics", "head", "round-1", "round-2", "final"]
    assert steps[-1].why == "the maximum of 3 rounds is reached"


def test_every_step_has_a_reason():
    for step in conversation([0.6, 0.4, 0.9, 0.9, 0.9]):
        assert len(step.why) > 20, step


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({}, tf.HeadFit),
        ({"can_fit_head": False}, tf.Phase),
    ],
)
def test_the_head_is_solved_only_where_it_can_be(changed, kind):
    head = conversation([0.6] * 9, task=attrs.evolve(TASK, **changed))[1]
    assert (type(head), head.name) == (kind, "head")


def test_within_validations_standard_error_the_loss_decides():
    before = report("a", 0.9, loss=0.5)  # 0.03 over 100 samples
    assert is_better(report("b", 0.94, loss=0.9), before, TASK)
    assert not is_better(report("b", 0.86, loss=0.1), before, TASK)
    assert is_better(report("b", 0.89, loss=0.48), before, TASK)
    assert not is_better(report("b", 0.92, loss=0.495), before, TASK)  # a fall of 1 %
    error = attrs.evolve(TASK, monitor="rmse", monitor_mode="min")
    first, second = (tf.StrategyStepResult("r", val={"rmse": value, "loss": 1.0}) for value in (3.0, 2.9))
    assert is_better(second, first, error)
    assert not is_better(first, second, error)


def row(recall, support):
    return {"recall": recall, "support": support}


def test_classes_whose_recall_is_low_beyond_chance_weigh_more():
    per_class = {"x": row(1.0, 100), "y": row(0.95, 100), "z": row(0.45, 100), "few": row(0.5, 4), "none": row(0.0, 0)}
    weak = weigh_weak_classes(report("a", 0.8, per_class=per_class, confusion=()))
    assert weak == {"z": pytest.approx(0.725 / 0.45)}
    per_class["z"] = row(0.0, 100)
    assert weigh_weak_classes(report("a", 0.8, per_class=per_class, confusion=()))["z"] == 3.0
    assert weigh_weak_classes(report("a", 0.8, per_class=per_class)) == {}  # several labels a sample: no weights there
    assert weigh_weak_classes(report("a", 0.8)) == {}


def test_weak_classes_are_weighed_in_the_next_round_and_named():
    talk = Adaptive().finetune_strategy(task=TASK)
    next(talk)
    talk.send(report("start-metrics", 0.1))
    per_class = {"x": row(1.0, 50), "y": row(0.5, 50)}
    phase = talk.send(report("head", 0.75, per_class=per_class, confusion=()))
    assert dict(phase.class_weights) == {"y": 1.5}
    assert "larger loss weight for low recall: y" in phase.why


def test_reasons_are_printed_and_stored(tune):
    said = []
    result = tune(Adaptive(epochs=2, rounds=3), log=said.append)
    lines = [json.loads(line) for line in (result.run_dir / "steps.jsonl").read_text().splitlines()]
    reasons = [line["step"]["why"] for line in lines]
    assert len(reasons) >= 4
    assert all(f"  reason: {reason}" in said for reason in reasons)


def test_the_run_ends_on_the_best_round(tune):
    steps = tune(Adaptive(epochs=2)).strategy_steps
    end = steps[-1][1]
    rounds = [answer.val["f1_macro"] for step, answer in steps if isinstance(step, (tf.Phase, tf.HeadFit))]
    assert end.val["f1_macro"] >= max(rounds)
    assert end.val["loss"] < steps[0][1].val["loss"] / 2


def test_it_fine_tunes_regression(tune):
    x = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
    result = tune(
        tf.use("adaptive", lr=0.03, rounds=4),
        data=(x, x[:, 0] * 3 + x[:, 1]),
        model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)),
    )
    assert result.report["splits"]["test"]["r2"] > 0.9


def test_a_run_that_needs_no_tuning_is_left_alone(tune):
    net = tiny_net()
    tune([tf.Phase("all", epochs=30, lr=0.01)], model=net)
    weights = {name: each.clone() for name, each in net.state_dict().items()}
    model = tf.Model.from_module(net, head="head", labels=("a", "b", "c"))
    result = tune(Adaptive(target=0.8), model=model, data=tiny_data())
    assert [step.name for step, _ in result.strategy_steps] == ["start-metrics", "final"]
    assert all(torch.equal(each, weights[name]) for name, each in result.model.module.state_dict().items())
