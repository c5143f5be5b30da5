import math
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tuneforge as tf
from tuneforge.plugin import Diagnostics, LayerGroupInfo
from tuneforge.plugin.serialization import from_json, to_json, to_plain_data

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


def same(one, other):
    if isinstance(one, float) and isinstance(other, float):
        return (one == other and math.copysign(1, one) == math.copysign(1, other)) or (
            math.isnan(one) and math.isnan(other)
        )
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, MappingProxyType):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@given(VALUES)
def test_plain_data_survives_json_without_loss(value):
    assert same(from_json(to_json(value)), to_plain_data(value))


@pytest.mark.parametrize(
    "step",
    [
        tf.Phase("p", train=["head", "re:x"], epochs=2, lr=0.1, lr_scales={"head": 2.0}, schedule="cosine"),
        tf.Phase("q", steps=5, class_weights={"a": 2.0}, optimizer=tf.use("sgd", momentum=0.5)),
        tf.HeadFit("f", l2=0.1),
        tf.Diagnosis("r", measure="lrs", batches=2),
        tf.WeightAverage("b", snapshots=["start", "p"]),
        tf.StrategyStepResult("p", val={"f1": math.nan, "confusion": [[1, 2], [3, 4]]}, history=[{"epoch": 1}]),
        Diagnostics("r", values={1e-3: math.inf}),
    ],
)
def test_steps_and_results_survive_json(step):
    again = from_json(to_json(step))
    assert type(again) is type(step)
    assert to_json(again) == to_json(step)


def test_numpy_and_torch_scalars_become_numbers():
    assert to_plain_data({"a": np.float32(0.5), "b": torch.tensor(3), "c": [np.int64(1)]}) == {
        "a": 0.5,
        "b": 3,
        "c": (1,),
    }


def test_a_tensor_is_not_plain_data():
    with pytest.raises(TypeError, match="Tensor"):
        tf.StrategyStepResult("x", val={"weights": torch.zeros(3)})


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"epochs": 1, "steps": 1},
        {"epochs": 0},
        {"epochs": 1, "lr": 0},
        {"epochs": 1, "layer_decay": 2},
        {"epochs": 1, "batchnorm_stats": "x"},
    ],
)
def test_an_invalid_phase_is_refused_by_name(wrong):
    with pytest.raises(tf.UsageError, match="Phase 'p'"):
        tf.Phase("p", **wrong)


def test_a_task_knows_its_backbone():
    groups = [LayerGroupInfo("a", 3, ["a.w"]), LayerGroupInfo("head", 1, ["h.w"])]
    task = tf.TaskInfo(groups, ("x",), 33, 5, 16, "cpu", 0, "f1", "max")
    assert task.backbone == (groups[0],)
    assert task.head.name == "head"
    assert task.steps_per_epoch() == 2  # 16 and 17: a last sample alone joins the step before it


def test_the_order_of_lr_scales_is_kept_because_a_later_one_overrides():
    phase = tf.Phase("x", train="all", epochs=1, lr=1.0, lr_scales={"norms": 0.1, "all": 0.5, "head": 2.0})
    assert list(from_json(to_json(phase)).lr_scales) == ["norms", "all", "head"]


def test_diagnostics_keep_the_order_of_the_layers():
    readings = Diagnostics("r", values={"stem": 1.0, "body": 1.0, "head": 0.5})
    assert list(from_json(to_json(readings)).values) == ["stem", "body", "head"]


def test_metrics_of_a_result_are_sorted_because_a_strategy_may_break_ties_by_order():
    per_class = {"b": {"recall": 0.5}, "a": {"recall": 0.5}}
    report = tf.StrategyStepResult("p", val={"per_class": per_class}, history=[{"val": {"b": 1, "a": 1}, "epoch": 1}])
    for each in (report, from_json(to_json(report))):
        assert list(each.val["per_class"]) == ["a", "b"]
        assert list(each.history[0]["val"]) == ["a", "b"]


def test_the_order_of_other_mappings_of_a_step_does_not_count():
    one, other = (tf.Phase("p", epochs=1, class_weights=weights) for weights in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert to_json(one) == to_json(other)
