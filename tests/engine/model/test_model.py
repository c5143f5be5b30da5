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


class Transformer(nn.Module):
    """A vision transformer with three blocks; its embeddings are parameters of its own or of its encoder."""

    def __init__(self, *, nested=False):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        holder = self.encoder = nn.Module() if nested else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        (holder if nested else self).pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        (holder if nested else self).blocks = layers
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        holder = self.encoder or self
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + holder.pos_embed
        for block in holder.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 0])


@pytest.mark.parametrize("nested", [False, True])
def test_embeddings_of_a_transformer_are_one_group_below_its_blocks(nested):
    groups = tf.Model.from_module(Transformer(nested=nested)).group_infos()
    inside = "encoder." if nested else ""
    assert [group.name for group in groups] == ["patch_embed", *(f"{inside}blocks.{i}" for i in range(3)), "head"]
    names = {"cls_token", f"{inside}pos_embed", "patch_embed.weight", "patch_embed.bias"}
    assert set(groups[0].parameter_names) == names


def test_parameters_without_a_layer_below_the_blocks_are_a_group():
    net = nn.Module()
    net.first, net.second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    net.blocks, net.head = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), nn.Linear(9, 2)
    groups = tf.Model.from_module(net, head="head").groups
    assert [group.prefixes for group in groups] == [("first", "second"), ("blocks.0",), ("blocks.1",), ("head",)]
