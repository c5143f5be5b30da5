import pytest
import torch
from tiny import TinyNet
from torch import nn

import tuneforge as tf
from tuneforge.engine.model.freezing import compute_modes, freeze, select
from tuneforge.engine.model.modes import set_modes


@pytest.fixture
def model():
    return tf.Model.from_module(TinyNet())


def test_layer_groups_are_inferred_from_the_structure(model):
    assert [group.name for group in model.groups] == ["first", "second", "head"]
    assert model.head == "head"


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("head", ["head.weight", "head.bias"]),
        ("second", ["second.0.weight", "second.0.bias", "second.1.weight", "second.1.bias"]),
        ("groups[-1:]", ["head.weight", "head.bias"]),
        ("groups[-1]", ["head.weight", "head.bias"]),
        ("groups[0]", ["first.0.weight", "first.0.bias", "first.1.weight", "first.1.bias"]),
        ("norms", ["first.1.weight", "first.1.bias", "second.1.weight", "second.1.bias"]),
        ("biases", ["first.0.bias", "first.1.bias", "second.0.bias", "second.1.bias", "head.bias"]),
        ("*.0.weight", ["first.0.weight", "second.0.weight"]),
        ("re:^head", ["head.weight", "head.bias"]),
    ],
)
def test_selectors(model, selector, expected):
    assert select(model, [selector]) == expected


def test_all_selects_everything_and_selectors_are_combined(model):
    assert len(select(model, ["all"])) == 10
    assert select(model, ["head", "groups[0]"])[-1] == "head.bias"


@pytest.mark.parametrize("selector", ["heat", "groups[7:]", "conv*", "re:^x", "groups[9]"])
def test_selector_without_a_match_is_an_error(model, selector):
    with pytest.raises(tf.SelectorError, match="matches no parameter"):
        select(model, [selector])


def test_similar_selector_is_suggested(model):
    with pytest.raises(tf.SelectorError, match="did you mean 'second'"):
        select(model, ["secnd"])


def test_parameter_outside_all_groups_is_refused():
    with pytest.raises(tf.PluginError, match="no layer group"):
        tf.Model(TinyNet(), groups=[tf.LayerGroup("head", ["head"])], head="head")


def trained_modes(model, trained, **policy):
    freeze(model, select(model, trained))
    modes = compute_modes(model, torch.randn(4, 8), batchnorm_stats=policy.get("batchnorm_stats", "frozen"))
    set_modes(modes)
    return {path: module.training for path, module in model.module.named_modules()}


def test_frozen_backbone_is_in_eval_mode(model):
    modes_by_path = trained_modes(model, ["head"])
    assert not any(modes_by_path[path] for path in ("first.1", "first.3", "second.1", "second.3"))
    assert modes_by_path["head"]
    inputs = torch.randn(4, 8)
    assert torch.equal(model.module(inputs), model.module(inputs))


def test_dropout_follows_the_dataflow(model):
    modes_by_path = trained_modes(model, ["groups[-2:]"])
    assert not modes_by_path["first.3"]
    assert modes_by_path["second.3"]


def test_norm_with_any_frozen_parameter_keeps_its_statistics(model):
    modes_by_path = trained_modes(model, ["biases"])
    assert not modes_by_path["first.1"]
    assert modes_by_path["first.3"]


def test_batchnorm_stats_updating_keeps_norms_in_training_mode(model):
    assert trained_modes(model, ["head"], batchnorm_stats="updating")["first.1"]


def test_observing_the_dataflow_changes_nothing(model):
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model.module.train()
    compute_modes(model, torch.randn(4, 8, generator=torch.Generator()), batchnorm_stats="frozen")
    assert torch.equal(torch.rand(1), expected)
    assert model.module.first[3].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())


def test_dropout_after_a_trained_embedding_is_in_training_mode():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.body = nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, inputs):
            return self.head(self.drop(self.body(inputs)))

    model = tf.Model.from_module(Reversed())
    assert trained_modes(model, ["all"])["drop"]
    assert not trained_modes(model, ["head"])["drop"]


def test_selectors_with_an_exclamation_mark_exclude(model):
    assert select(model, ["head", "!biases"]) == ["head.weight"]
    assert select(model, ["!norms", "!head"]) == ["first.0.weight", "first.0.bias", "second.0.weight", "second.0.bias"]
    with pytest.raises(tf.SelectorError):
        select(model, ["head", "!all"])


def test_two_groups_with_one_name_are_refused():
    with pytest.raises(tf.PluginError, match="names must differ"):
        tf.Model(TinyNet(), groups=[tf.LayerGroup("a", ["first", "second"]), tf.LayerGroup("a", ["head"])], head="head")


def test_norm_after_the_head_has_its_own_group():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.norm = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3), torch.nn.LayerNorm(8)

        def forward(self, inputs):
            return self.head(self.norm(self.body(inputs)))

    model = tf.Model.from_module(Net(), head="head")
    assert [group.name for group in model.groups] == ["body", "norm", "head"]
    assert {name for name in model.parameters() if any(group.contains(name) for group in model.groups)} == set(
        model.parameters()
    )
