"""The head is the layer that computes the output, and a tied head trains with what it is tied to."""

import pytest
import torch
from tiny import tiny_net
from torch import nn

import tuneforge as tf

HEAD_PHASE = [tf.Phase("head", train="head", epochs=1, lr=0.05)]


class Net(nn.Module):
    """`body` and `head`, and layers registered behind them: (b, 8) -> (b, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.other = nn.Linear(16, 3)
        self.projection = nn.Linear(8, 8)

    def features(self, inputs):
        return torch.relu(self.body(self.projection(inputs)))

    def forward(self, inputs):
        return self.head(self.features(inputs))


class ScaledOutput(Net):
    def __init__(self):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(3)

    def forward(self, inputs):
        return {"logits": self.norm(super().forward(inputs)).log_softmax(1) * self.scale}


class Pooled(Net):
    """Tokens that attention weights of width 1 pool behind the head."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(16, 1)

    def forward(self, inputs):
        tokens = self.features(inputs)[:, None].expand(-1, 4, -1)
        return (self.attention(tokens).softmax(1) * self.head(tokens)).sum(1)


class WithoutGradients(Net):
    def features(self, inputs):
        with torch.no_grad():
            return super().features(inputs)


class Distilled(Net):
    def forward(self, inputs):
        hidden = self.features(inputs)
        outputs = self.head(hidden), self.other(hidden)
        return outputs if self.training else sum(outputs) / 2


class OtherInTraining(Net):
    def forward(self, inputs):
        return (self.other if self.training else self.head)(self.features(inputs))


class Gated(Net):
    def forward(self, inputs):
        hidden = self.features(inputs)
        return self.head(hidden) * self.other(hidden).sigmoid()


class WithoutLayer(Net):
    """The weight of `other` is used without calling it."""

    def forward(self, inputs):
        return self.features(inputs) @ self.other.weight.T


@pytest.mark.parametrize("kind", [Net, ScaledOutput, Pooled, WithoutGradients])
def test_head_is_found_by_dataflow(tune, kind):
    net = kind()
    before = {name: each.clone() for name, each in net.state_dict().items()}
    result = tune(HEAD_PHASE, model=net, cache="off")
    moved = [name for name, each in net.named_parameters() if not torch.equal(before[name], each)]
    assert result.model.head == "head"
    assert moved == ["head.weight", "head.bias"]


def test_frozen_and_half_precision_modules_show_their_head():
    from tuneforge.engine.model.output_layer import find_output_layers

    net = Net().requires_grad_(False)
    assert find_output_layers(net, torch.randn(2, 8)) == ["head"]
    assert find_output_layers(net.to(torch.bfloat16), torch.randn(2, 8)) == ["head"]
    assert not any(each.requires_grad for each in net.parameters())


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Distilled, "head, other"),
        (OtherInTraining, "head, other"),
        (Gated, "head, other"),
        (WithoutLayer, r"other\.weight"),
    ],
)
def test_candidates_for_the_head_are_listed_before_training(tune, kind, named):
    net = kind()
    before = {name: each.clone() for name, each in net.state_dict().items()}
    with pytest.raises(tf.PluginError, match=f"is not one layer: {named}"):
        tune(HEAD_PHASE, model=net)
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())


class Headless(nn.Module):
    """Residual blocks and a norm: features, and no layer that computes one output for each class."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Identity()

    def forward(self, inputs):
        for block in self.blocks:
            inputs = inputs + block(inputs).relu()
        return self.head(self.norm(inputs))


def test_a_network_without_a_head_is_refused_with_what_to_add(tune):
    for net in (Headless(), nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten())):
        with pytest.raises(tf.PluginError, match=r"nn\.Sequential\(network, nn\.Linear\(num_features, num_classes\)\)"):
            tune(HEAD_PHASE, model=net)
    result = tune(HEAD_PHASE, model=nn.Sequential(Headless(), nn.Linear(8, 3)))
    assert result.model.head == "1"


@pytest.mark.parametrize("kind", [Distilled, Gated])
def test_named_head_is_taken(tune, kind):
    result = tune(HEAD_PHASE, model=tf.Model.from_module(kind(), head="head"), cache="off")
    assert result.model.head == "head"


def test_component_that_does_not_name_the_head_is_checked(tune):
    class Builds:
        @tf.hookimpl
        def model_adapt(self):
            net = Net()
            net.last = nn.Linear(8, 3)
            return tf.Model.from_module(net)

    with pytest.raises(tf.PluginError, match="the head 'last' does not compute the output"):
        tune(HEAD_PHASE, model=Builds())


class Tied(nn.Module):
    """The head shares its weight with the first layer: (b, 8) -> (b, k)."""

    def __init__(self, num_outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, num_outputs, bias=False)
        self.middle, self.head = nn.Linear(num_outputs, 8), nn.Linear(8, num_outputs)
        self.head.weight = self.first.weight

    def forward(self, inputs):
        return self.head(torch.relu(self.middle(self.first(inputs))))


@pytest.mark.parametrize("selector", ["head", "head.weight", "re:^head", "groups[-1:]"])
def test_tied_weight_trains_under_each_of_its_names(tune, selector):
    net, lines = Tied(), []
    before = net.first.weight.detach().clone()
    tune([tf.Phase("head", train=selector, epochs=1, lr=0.05)], model=net, log=lines.append)
    assert net.head.weight is net.first.weight
    assert not torch.equal(net.first.weight, before)
    assert "tied: 'head.weight' of the head is shared with 'first.weight', so both train or none" in lines


def test_resized_head_says_that_it_is_no_longer_tied(tune):
    net = Tied(5)
    result = tune(HEAD_PHASE, model=net)
    assert result.model.changes == (
        "head: 5 -> 3 outputs, all randomly initialized; no longer tied to first.weight, which keeps its weight",
    )
    assert net.first.weight.shape == (5, 8)


def test_tied_head_cannot_be_solved(tune):
    with pytest.raises(tf.DataError, match=r"tied to first\.weight"):
        tune([tf.HeadFit("fit")], model=Tied())


@pytest.mark.parametrize("target", ["head.weight", "buffer"])
def test_frozen_tensor_in_the_memory_of_a_trained_one_is_refused(tune, target):
    net = tiny_net()
    if target == "buffer":
        net.first.register_buffer("copied", net.head.weight.data)
    else:
        net.second[0].bias.data = net.head.weight.data.view(-1)[:16]
    with pytest.raises(tf.PluginError, match=r"shares its memory with 'head\.weight'"):
        tune(HEAD_PHASE, model=net)


def test_parameters_that_lie_side_by_side_in_one_storage_train(tune):
    net = tiny_net()
    flat = torch.cat([net.second[0].bias.data, net.head.bias.data])
    net.second[0].bias.data, net.head.bias.data = flat[:16], flat[16:]
    assert tune(HEAD_PHASE, model=net).strategy_steps[0][1].reason == "1 epoch completed"
