import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuneforge.engine.data.sampler import EpochSampler, Permutation, SampleRNG, derive_seed


@given(st.integers(1, 500), st.integers(0, 2**64 - 1))
def test_permutation_contains_every_element_once(size, key):
    assert sorted(Permutation(size, key)(np.arange(size))) == list(range(size))


def test_permutation_of_a_billion_is_evaluated_at_any_position():
    positions = np.array([0, 1, 999_999_999])
    members = Permutation(10**9, 7)(positions)
    assert len(set(members.tolist())) == 3
    assert np.array_equal(Permutation(10**9, 7)(positions[1:2]), members[1:2])


def test_epoch_order_is_a_pure_function_of_seed_and_epoch():
    whole = EpochSampler(100, 3, 5).indices(0, 100)
    assert torch.equal(EpochSampler(100, 3, 5).indices(40, 60), whole[40:60])
    assert not torch.equal(EpochSampler(100, 3, 6).indices(0, 100), whole)
    assert not torch.equal(EpochSampler(100, 4, 5).indices(0, 100), whole)


def test_epoch_orders_look_random():
    first = torch.stack([EpochSampler(1000, 0, epoch).indices(0, 1)[0] for epoch in range(2000)]).double()
    assert abs(first.mean() - 499.5) < 4 * 288.7 / 2000**0.5
    neighbours = torch.cat([EpochSampler(1000, 0, epoch).indices(0, 1000).diff().eq(1) for epoch in range(50)])
    assert neighbours.sum() < 100  # 50 are expected by chance


def test_weighted_sampling_draws_each_group_as_often_as_asked():
    pools = (torch.arange(2), torch.arange(2, 10))
    rows = EpochSampler(10, 0, 0, (6, 4), pools).indices(0, 10)
    counts = torch.bincount(rows, minlength=10)
    assert counts[:2].tolist() == [3, 3]
    assert counts[2:].sum() == 4
    assert counts[2:].max() == 1
    assert torch.equal(EpochSampler(10, 0, 0, (6, 4), pools).indices(3, 7), rows[3:7])


def test_random_numbers_of_a_sample_do_not_depend_on_its_batch():
    alone = SampleRNG(1, 2, torch.tensor([7])).uniform("flip", 3)
    among = SampleRNG(1, 2, torch.tensor([5, 7, 9])).uniform("flip", 3)
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(SampleRNG(1, 3, torch.tensor([7])).uniform("flip", 3), alone)
    assert not torch.equal(SampleRNG(1, 2, torch.tensor([7])).uniform("turn", 3), alone)


def test_sample_rng_is_uniform_and_normal():
    noise = SampleRNG(0, 0, torch.arange(2000))
    uniform = noise.uniform("u", 50)
    assert uniform.shape == (2000, 50)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.005)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.002)
    normal = noise.normal("n", 50)
    assert normal.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    assert normal.isfinite().all()


def test_derived_seed_depends_on_every_part_and_their_order():
    keys = {derive_seed(1, "a"), derive_seed("a", 1), derive_seed(1, "b"), derive_seed(2, "a"), derive_seed(1, "a", 0)}
    assert len(keys) == 5
    assert derive_seed(0) == derive_seed(0)
