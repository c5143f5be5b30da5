"""Splits and their fingerprints, and the batches of an epoch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tuneforge as tf
from tuneforge.engine.data.loader import batch_sizes, iter_sampled, iter_sequential
from tuneforge.engine.data.sampler import EpochSampler

INPUTS, TARGETS = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 0, 1])


class OnDemandSource:
    """A source that is not in memory."""

    def __init__(self, name):
        self.name = name

    def __len__(self):
        return 4

    def fetch(self, indices):
        return INPUTS[indices]

    def fingerprint(self):
        return self.name


class SourceWithoutFingerprint:
    """A source that cannot tell what it holds."""

    def __len__(self):
        return 4

    def fetch(self, indices):
        return INPUTS[indices]


def test_fingerprint_of_inputs_depends_on_their_values_alone():
    print_of = tf.Split(INPUTS, TARGETS).inputs_fingerprint()
    assert len(print_of) == 64
    assert tf.Split(INPUTS.clone(), 1 - TARGETS, ids=list("abcd")).inputs_fingerprint() == print_of
    others = [INPUTS + 1, INPUTS.double(), INPUTS.reshape(4, 3, 1), INPUTS[[1, 0, 2, 3]], {"x": INPUTS}]
    assert len({print_of, *(tf.Split(each, TARGETS).inputs_fingerprint() for each in others)}) == 6


def test_order_of_a_mapping_does_not_change_its_fingerprint():
    one, other = {"a": INPUTS, "b": INPUTS + 1}, {"b": INPUTS + 1, "a": INPUTS}
    swapped = {"a": INPUTS + 1, "b": INPUTS}
    prints = [tf.Split(each, TARGETS).inputs_fingerprint() for each in (one, other, swapped)]
    assert prints[0] == prints[1] != prints[2]


def test_fingerprint_of_a_split_covers_inputs_targets_and_ids():
    ids = list("abcd")
    splits = [
        tf.Split(INPUTS, TARGETS, ids=ids),
        tf.Split(INPUTS + 1, TARGETS, ids=ids),
        tf.Split(INPUTS, 1 - TARGETS, ids=ids),
        tf.Split(INPUTS, TARGETS, ids=list("abce")),
        tf.Split(OnDemandSource("one"), TARGETS, ids=ids),
        tf.Split(OnDemandSource("two"), TARGETS, ids=ids),
        tf.Split(SourceWithoutFingerprint(), TARGETS, ids=ids),
    ]
    assert len({split.fingerprint() for split in splits}) == len(splits)
    assert tf.Split(OnDemandSource("one"), TARGETS, ids=ids).fingerprint() == splits[4].fingerprint()


def test_fingerprint_of_a_subset_covers_its_rows():
    whole = tf.Split(OnDemandSource("one"), TARGETS)
    first, again, other = (whole.subset(torch.tensor(rows)) for rows in ([0, 2], [0, 2], [2, 0]))
    assert first.inputs_fingerprint() == again.inputs_fingerprint() != other.inputs_fingerprint()


def test_source_without_fingerprint_gives_none():
    split = tf.Split(SourceWithoutFingerprint(), TARGETS)
    assert split.inputs_fingerprint() is None
    assert split.subset(torch.tensor([0])).inputs_fingerprint() is None


@pytest.mark.parametrize(
    ("size", "batch_size", "sizes"),
    [
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (9, 4, [4, 5]),
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_single_remaining_sample_joins_the_batch_before(size, batch_size, sizes):
    assert list(batch_sizes(size, batch_size)) == sizes


@given(st.integers(1, 400), st.integers(1, 50), st.data())
def test_epoch_can_begin_at_any_batch(size, batch_size, data):
    order, sizes = EpochSampler(size, 1, 2), batch_sizes(size, batch_size)
    start = data.draw(st.integers(0, len(sizes)))
    rows = list(iter_sampled(order, batch_size, start=start))
    assert [len(each) for each in rows] == sizes[start:]
    assert torch.equal(torch.cat([*rows, torch.empty(0, dtype=torch.int64)]), order.indices(sum(sizes[:start]), size))


def test_batches_of_a_billion_samples_need_no_list():
    sizes = batch_sizes(10**9 + 1, 32)
    assert (len(sizes), sizes[0], sizes[-1]) == (31_250_000, 32, 33)
    assert next(iter_sequential(10**9, 4)).tolist() == [0, 1, 2, 3]
    assert len(next(iter_sampled(EpochSampler(10**9, 0, 0), 32, start=31_249_999))) == 32
