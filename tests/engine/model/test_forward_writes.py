"""A forward pass that writes to frozen tensors is found before the phase: `max_norm` is settled, others are refused."""

import attrs
import pytest
import torch
from tiny import TinyNet, tiny_data, tiny_net
from torch import nn
from torch.nn import functional as F

import tuneforge as tf

HEAD_PHASE = [tf.Phase("head", train="head", epochs=2, lr=0.05)]


class Looked(nn.Module):
    """The mean of embeddings with `max_norm`, and a head: ids (b, 5) -> (b, 3)."""

    def __init__(self, norm_type=2.0):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20, 8, max_norm=1.0, norm_type=norm_type), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


class Bag(Looked):
    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(20, 8, max_norm=1.0)

    def forward(self, ids):
        return self.head(self.table(ids))


class Functional(Looked):
    def __init__(self):
        super().__init__()
        self.table = nn.Linear(8, 20, bias=False)
        nn.init.normal_(self.table.weight)

    def forward(self, ids):
        return self.head(F.embedding(ids, self.table.weight, max_norm=1.0).mean(1))


def ids_data():
    def split(seed, count=60):
        ids = torch.randint(0, 20, (count, 5), generator=torch.Generator().manual_seed(seed))
        return tf.Split(ids, ids[:, 0] % 3)

    return attrs.evolve(tiny_data(), train=split(0), val=split(1), test=split(2))


@pytest.mark.parametrize("make", [Looked, lambda: Looked(norm_type=1.0), Bag, Functional])
def test_frozen_embedding_with_max_norm_is_scaled_once_before_the_phase(tune, make):
    net, lines = make(), []
    expected = net.table.weight.detach().clone()
    norm_type = getattr(net.table, "norm_type", 2.0)
    with torch.no_grad():
        for _ in range(5):
            torch.embedding_renorm_(expected, torch.arange(20), 1.0, norm_type)
    tune(HEAD_PHASE, model=net, data=ids_data(), log=lines.append)
    assert torch.equal(net.table.weight, expected)
    assert any("rows of 'table.weight' were scaled to max_norm 1" in line for line in lines)


def test_embedding_within_max_norm_is_left_alone(tune):
    net, lines = Looked(), []
    with torch.no_grad():
        net.table.weight.mul_(0.01)
    before = net.table.weight.detach().clone()
    tune(HEAD_PHASE, model=net, data=ids_data(), log=lines.append)
    assert torch.equal(net.table.weight, before)
    assert not any("were scaled" in line for line in lines)


def test_trained_embedding_with_max_norm_trains_and_is_then_frozen(tune):
    phases = [tf.Phase("all", epochs=1, lr=0.5), *HEAD_PHASE, tf.Phase("again", epochs=1, lr=0.5)]
    result = tune(phases, model=Looked(), data=ids_data())
    assert [step.name for step, _ in result.strategy_steps] == ["all", "head", "again"]


def test_head_is_solved_on_a_frozen_embedding_with_max_norm(tune):
    assert tune([tf.HeadFit("fit")], model=Looked(), data=ids_data()).report["splits"]


class Clamps(TinyNet):
    def forward(self, inputs):
        self.first[0].weight.data.clamp_(-0.05, 0.05)
        return super().forward(inputs)


class Counts(TinyNet):
    def __init__(self):
        super().__init__()
        self.second.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.second.calls += 1
        return super().forward(inputs)


@pytest.mark.parametrize(("kind", "name"), [(Clamps, r"first\.0\.weight"), (Counts, r"second\.calls")])
def test_forward_that_writes_to_a_frozen_tensor_is_refused_before_the_phase(tune, kind, name):
    net = kind()
    before = {key: each.clone() for key, each in net.state_dict().items()}
    with pytest.raises(tf.PluginError, match=f"writes to frozen tensors: {name}"):
        tune(HEAD_PHASE, model=net)
    assert all(torch.equal(each, before[key]) for key, each in net.state_dict().items())
    assert tune([tf.Phase("all", epochs=1)], model=kind()).report["splits"]


def test_model_that_writes_nothing_has_no_forward_writes():
    from tuneforge.engine.model.forward_writes import ForwardWrites

    net = tiny_net()
    assert ForwardWrites.find(net, torch.randn(2, 8)).names == frozenset()
    assert net.training
