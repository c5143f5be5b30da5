import numpy as np
import pytest
import torch
from torch import nn

import tuneforge as tf
from tuneforge.sklearn import data_from_arrays

SGD = tf.use("sgd", momentum=0.0)
# Squares of small gradients are zero in float16, so AdamW cannot train such weights.
PHASE = [tf.Phase("all", epochs=2, lr=0.1, schedule="constant", optimizer=SGD)]
LABELS = np.arange(60) % 3
FEATURES = np.random.default_rng(0).normal(size=(60, 8)) + 3 * np.eye(8)[LABELS]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def pairs_of(pairs):
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(pairs)

        def __getitem__(self, index):
            return pairs[index]

    return Pairs()


class WithIds(nn.Module):
    """A table of embeddings by index, and counts that a linear layer takes."""

    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(9, 4), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, ids, counts):
        return self.head(torch.cat([self.table(ids), self.body(counts)], 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_inputs_reach_the_module_in_its_dtype(tune, dtype, as_tensor):
    x = torch.tensor(FEATURES).to(dtype) if as_tensor else FEATURES
    seen = set()
    module = net(dtype)
    module.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype) if len(args[0]) > 2 else None)
    result = tune(PHASE, data=(x, LABELS), model=module)
    assert {parameter.dtype for parameter in module.parameters()} == seen == {dtype}
    losses = [entry["train"]["loss"] for entry in result.strategy_steps[0][1].history]
    assert losses[-1] < losses[0]
    predictor = tf.load(result.run_dir, model=net(dtype))
    expected = module(torch.tensor(FEATURES[:4]).to(dtype)).detach().float()
    assert torch.equal(torch.stack(list(predictor.predict_outputs(FEATURES[:4]))), expected)


@pytest.mark.parametrize(("as_dataset", "standardize"), [(False, False), (False, True), (True, False)])
def test_float64_module_gets_float64_features_in_full_precision(tune, as_dataset, standardize):
    features = FEATURES + 1e9  # float32 would round the differences away
    pairs = list(zip(torch.tensor(features), LABELS.tolist(), strict=True))
    data = data_from_arrays(*([pairs_of(pairs)] if as_dataset else [features, LABELS]), standardize=standardize)
    seen = []
    module = net(torch.float64)
    module.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) if len(args[0]) > 2 and module.training else None
    )
    result = tune([tf.Phase("all", epochs=1, lr=1e-12)], data=data, model=module)
    first = torch.cat(seen)[:, 0]
    assert len(first.unique()) == len(first)
    assert first.mean().abs() < 2 if standardize else set(first.tolist()) <= set(features[:, 0].tolist())
    predictor = tf.load(result.run_dir, model=net(torch.float64))
    assert torch.equal(predictor.inputs.decode(features[0].tolist()), torch.tensor(features[0]))
    assert predictor.with_data(data).data.val.fetch(torch.tensor([0])).dtype == torch.float64


def test_regression_trains_a_float64_module(tune):
    module = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    result = tune([tf.Phase("all", epochs=8, lr=0.05)], data=(FEATURES, FEATURES[:, 0]), model=module)
    assert result.report["splits"]["val"]["r2"] > 0.5
    assert module[0].weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.int8, bool])
def test_integer_features_are_floats_where_the_module_takes_floats(tune, dtype):
    integers = (FEATURES > 1.5).astype(dtype)
    lines = []
    one, other = net(), net()
    tune(PHASE, data=(integers, LABELS), model=one, log=lines.append)
    tune(PHASE, data=(integers.astype("float32"), LABELS), model=other)
    assert torch.equal(one[0].weight, other[0].weight)
    assert any("to float32" in line for line in lines) is (dtype is not np.uint8)  # uint8 always becomes float32


def test_only_the_integers_that_are_no_indices_become_floats(tune):
    data = data_from_arrays({"ids": LABELS * 2, "counts": (FEATURES * 9).astype("int64")}, LABELS)
    seen = set()

    def observe(module, args, kwargs):
        seen.update((name, each.dtype) for name, each in kwargs.items() if len(each) > 2)  # not the inspections

    module = WithIds()
    module.register_forward_pre_hook(observe, with_kwargs=True)
    tune(PHASE, data=data, model=module)
    assert seen == {("ids", torch.int64), ("counts", torch.float32)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_head_of_a_module_of_another_dtype_is_found_by_its_dataflow(tune, dtype):
    class LateBody(nn.Module):
        """A network whose head is registered before its body."""

        def __init__(self):
            super().__init__()
            self.output, self.body = nn.Linear(4, 3), nn.Linear(8, 4)

        def forward(self, inputs):
            return self.output(torch.relu(self.body(inputs)))

    integers = (FEATURES > 1.5).astype("int64")
    assert tune(PHASE, data=(integers, LABELS), model=LateBody().to(dtype)).model.head == "output"


def test_module_that_converts_its_inputs_itself_gets_them_unchanged(tune):
    class Converts(nn.Sequential):
        def forward(self, inputs):
            assert inputs.dtype == torch.float32
            return super().forward(inputs.bfloat16())

    tune(PHASE, data=(FEATURES, LABELS), model=Converts(nn.Linear(8, 3)).bfloat16())


def test_data_that_no_dtype_makes_fit_is_refused_with_the_original_reason(tune):
    with pytest.raises(tf.PluginError, match="shapes cannot be multiplied"):
        tune(PHASE, data=(FEATURES[:, :5], LABELS), model=net(torch.float64))
