import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuneforge import OptionError
from tuneforge.builtin.schedules import Constant, Cosine, OneCycle, SlantedTriangular, StepDecay

SHARES = st.floats(0, 1)
DIVISORS = st.floats(1, 1e6)
SCHEDULES = st.one_of(
    st.builds(Constant),
    st.builds(StepDecay, gamma=SHARES),
    st.builds(Cosine, warmup=SHARES, floor=SHARES),
    st.builds(OneCycle, pct_start=SHARES, div=DIVISORS, final_div=DIVISORS),
    st.builds(SlantedTriangular, cut=SHARES, ratio=DIVISORS),
)
CONTINUOUS = [
    Constant(),
    Cosine(),
    Cosine(warmup=0.0, floor=0.2),
    OneCycle(),
    OneCycle(pct_start=0.99, div=5.0),
    SlantedTriangular(),
]


def rates(optimizer, scheduler, steps):
    """The rate that each of `steps` optimizer steps takes."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def sgd():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


@given(SCHEDULES, SHARES)
def test_factor_lies_within_zero_and_one_and_is_pure(schedule, progress):
    factor = schedule.factor(progress)
    schedule.factor(1 - progress)
    assert 0 <= factor <= 1
    assert schedule.factor(progress) == factor


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=repr)
def test_continuous_schedules_have_no_jump(schedule):
    factors = [schedule.factor(step / 100_000) for step in range(100_001)]
    assert max(abs(a - b) for a, b in itertools.pairwise(factors)) < 2e-3


def test_constant_stays_at_the_peak():
    assert [Constant().factor(progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_step_drops_at_each_milestone_and_not_before():
    factors = [StepDecay().factor(progress) for progress in (0.0, 0.4999, 0.5, 0.7499, 0.75, 1.0)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_is_exact_at_its_corners():
    schedule = Cosine(warmup=0.1, floor=0.2)
    assert [schedule.factor(p) for p in (0.0, 0.05, 0.1, 1.0)] == [0.0, 0.5, 1.0, 0.2]
    assert schedule.factor(0.55) == pytest.approx(0.6)


def test_one_cycle_is_exact_at_its_corners():
    assert [OneCycle().factor(p) for p in (0.0, 0.3, 1.0)] == [1 / 25, 1.0, 1e-5]
    assert OneCycle().factor(0.15) == pytest.approx((1 + 1 / 25) / 2)
    assert OneCycle().factor(0.65) == pytest.approx((1 + 1e-5) / 2)


def test_slanted_triangle_is_exact_at_its_corners():
    assert [SlantedTriangular().factor(p) for p in (0.0, 0.1, 1.0)] == [1 / 32, 1.0, 1 / 32]
    assert SlantedTriangular().factor(0.05) == pytest.approx((1 + 1 / 32) / 2)
    assert SlantedTriangular().factor(0.55) == pytest.approx((1 + 1 / 32) / 2)


def test_slanted_triangle_follows_equation_three_of_ulmfit():
    total, cut_share, ratio = 1000, 0.1, 32
    cut = math.floor(total * cut_share)

    def published(step):
        part = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / cut_share - 1))
        return (1 + part * (ratio - 1)) / ratio

    ours = [SlantedTriangular().factor(step / total) for step in range(total + 1)]
    assert ours == pytest.approx([published(step) for step in range(total + 1)])


def test_cosine_without_warmup_is_torchs_cosine_annealing():
    optimizer = sgd()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    ours = [Cosine(warmup=0.0, floor=0.1).factor(step / 50) for step in range(50)]
    assert ours == pytest.approx(rates(optimizer, scheduler, 50))


def test_one_cycle_is_torchs_one_cycle_where_the_peaks_meet():
    # torch counts a phase of N steps from 0 to N - 1 and puts the peak at step 0.25 * N - 1.
    steps, optimizer = 101, sgd()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, pct_start=26 / 101, div_factor=25, final_div_factor=4000
    )
    ours = [OneCycle(pct_start=0.25).factor(step / 100) for step in range(steps)]
    assert ours == pytest.approx(rates(optimizer, scheduler, steps))


@pytest.mark.parametrize(
    "make",
    [
        lambda: StepDecay(milestones=(0.7, 0.2)),
        lambda: StepDecay(milestones=(0.5, 1.5)),
        lambda: Cosine(warmup=1.1),
        lambda: OneCycle(div=0.5),
        lambda: SlantedTriangular(ratio=0.0),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(OptionError, match="out of range"):
        make()


@pytest.mark.parametrize(
    "schedule", [Cosine(warmup=1.0), OneCycle(pct_start=1.0), OneCycle(pct_start=0.0), SlantedTriangular(cut=1.0)]
)
def test_a_stretch_of_no_length_ends_at_the_peak(schedule):
    assert max(schedule.factor(progress) for progress in (0.0, 1.0)) == 1.0
