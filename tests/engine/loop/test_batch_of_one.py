import attrs
import pytest
import torch
from tiny import blobs, tiny_data, tiny_net
from torch import nn

import tuneforge as tf

HEAD, ALL = (tf.Phase(train, train=train, epochs=1) for train in ("head", "all"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"batch_size": 1}, "--batch-size 1"), ({"micro_batch": 1}, "--micro-batch 1")],
    ids=["batch", "micro-batch"],
)
@pytest.mark.parametrize("strategy", [[ALL], [HEAD, ALL]], ids=["first-phase", "later-phase"])
def test_norm_that_needs_two_samples_is_named_before_anything_trains(tune, settings, words, strategy):
    net = tiny_net()
    before = net.head.weight.detach().clone()
    with pytest.raises(tf.UsageError, match=f"norm layer 'first.1'; at {words}, phase 'all'"):
        tune(strategy, model=net, **settings)
    assert torch.equal(net.head.weight, before)


def test_dry_run_leaves_the_module_as_it_was():
    net = tiny_net()
    net.second.eval()
    engine = tf.Engine(data=tiny_data(), model=net, strategy=[HEAD], batch_size=1, page=False)
    engine.dry_run()
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert [module.training for module in (net, net.first, net.second)] == [True, True, False]


def test_one_training_sample_is_refused_too(tune):
    with pytest.raises(tf.UsageError, match="norm layer 'first.1'; at 1 training sample"):
        tune([ALL], data=attrs.evolve(tiny_data(), train=blobs(1, seed=1)))


def test_phase_of_a_generator_is_refused_when_it_begins(tune):
    def strategy(task):
        yield HEAD
        yield ALL

    with pytest.raises(tf.UsageError, match="norm layer 'first.1'"):
        tune(strategy, batch_size=1)


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"micro_batch": 1}])
def test_norms_that_take_one_sample_train(tune, settings):
    frozen_norms = tune([HEAD], **settings)
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Linear(8, 3))
    other_norms = tune([ALL], model=net, data=attrs.evolve(tiny_data(), train=blobs(6, seed=1)), **settings)
    assert [result.strategy_steps[0][1].epochs for result in (frozen_norms, other_norms)] == [1, 1]


def test_last_batch_of_one_joins_the_batch_before(tune):
    result = tune([ALL], data=attrs.evolve(tiny_data(), train=blobs(17, seed=1)))
    assert result.strategy_steps[0][1].steps == 1
