from collections import namedtuple

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.utils.data import Dataset

import tuneforge as tf
from tuneforge.builtin.datasets.tables.raw_tensors import to_tensor
from tuneforge.sklearn import data_from_arrays

LABELS = np.arange(12) % 3
DENSE = np.eye(12, 8)
SPARSE = {
    "csr": scipy.sparse.csr_matrix(DENSE),
    "coo array": scipy.sparse.coo_array(DENSE),
    "coo tensor": torch.tensor(DENSE).to_sparse(),
    "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}
Pair = namedtuple("Pair", "a b")


class Samples(Dataset):
    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.sample, index % 3


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_features_are_refused_by_name(tune, kind):
    with pytest.raises(tf.DataError, match="is sparse; at x;.*toarray"):
        tune(tf.Phase("all", epochs=1), data=(SPARSE[kind], LABELS))


def test_sparse_samples_and_targets_are_refused_by_name(tune):
    with pytest.raises(tf.DataError, match=r"is sparse; at x\[0\]"):
        tune(tf.Phase("all", epochs=1), data=Samples(torch.ones(8).to_sparse()))
    with pytest.raises(tf.DataError, match="is sparse; at y;"):
        tune(tf.Phase("all", epochs=1), data=(DENSE, scipy.sparse.csr_matrix(np.eye(12, 3))))


@pytest.mark.parametrize(
    "sample",
    [
        (np.ones(8), np.ones(8)),
        [torch.ones(8), torch.ones(8)],
        Pair(torch.ones(8), torch.ones(3)),
        (torch.ones(8), 3),
    ],
    ids=["tuple", "list", "namedtuple", "tuple-with-a-number"],
)
def test_samples_of_several_inputs_have_to_be_mappings(tune, sample):
    with pytest.raises(tf.DataError, match=r"inputs of a sample are a \w+ of 2; at x\[0\];.*mapping"):
        tune(tf.Phase("all", epochs=1), data=Samples(sample))


def test_rows_in_a_tuple_and_numbers_in_a_list_are_one_input():
    assert to_tensor(tuple(np.ones((3, 8))), where="x").shape == (3, 8)
    assert data_from_arrays(Samples([1.0, 2.0])).data_prepare  # a sample of two numbers
    assert torch.equal(to_tensor([1.0, 2.0], where="x"), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("given", [np.array([1 + 2j]), torch.tensor([1 + 2j], dtype=torch.complex128)])
def test_complex_features_stay_complex(given):
    assert torch.equal(to_tensor(given, where="x"), torch.tensor([1 + 2j], dtype=torch.complex64))


def test_complex_features_train_a_complex_layer(tune):
    class Magnitude(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(8, 4, dtype=torch.complex64), torch.nn.Linear(4, 3)

        def forward(self, inputs):
            return self.head(self.body(inputs).abs())

    module = Magnitude()
    before = module.body.weight.detach().clone()
    tune([tf.Phase("all", epochs=1)], data=(DENSE * (1 + 2j), LABELS), model=module)
    assert not torch.equal(module.body.weight, before)


def test_integer_beyond_int64_is_refused_rather_than_wrapped():
    with pytest.raises(tf.DataError, match="does not fit into int64"):
        to_tensor(np.array([2**63], dtype=np.uint64), where="x")
