"""A changed set of classes: rows of the head are matched by name, so logits of old classes are kept.

Shapes: b samples, k classes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
from torch import nn

import tuneforge as tf
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import ClassTargets
from tuneforge.exporting import load_tensors, save_tensors

TEN = tuple("0123456789")
ELEVEN = (*TEN, "other")
SHUFFLED = ("7", "3", "8", "other", "1", "9", "0", "2", "6", "4", "5")
ONE_DROPPED = (*TEN[:4], "other", *TEN[5:])


def samples(num: int, *, seed: int, width: int = 12) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def data_of_classes(names: tuple[str, ...], *, seed: int = 1) -> tf.Data:
    targets = torch.arange(8 * len(names)) % len(names)
    split = tf.Split(samples(len(targets), seed=seed), targets)
    return tf.Data(split, split, split, inputs=TensorInputs(), targets=ClassTargets(names=names))


def module(num_outputs: int = 10, *, features: int = 32) -> nn.Sequential:
    """Return a network (b, 12) -> (b, k) with BatchNorm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(12, features), nn.BatchNorm1d(features), nn.ReLU())
        return nn.Sequential(OrderedDict(body=body, head=nn.Linear(features, num_outputs)))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    """A finished run of an MLP with ten classes."""
    return tf.Engine(
        data=data_of_classes(TEN),
        model=tf.use("mlp", hidden=(32,)),
        strategy=tf.Phase("all", epochs=2, lr=0.01),
        page=False,
        out=tmp_path_factory.mktemp("ten") / "run",
    ).run()


def run_before_training(names: tuple[str, ...], model) -> tf.Run:
    return tf.Engine(data=data_of_classes(names, seed=2), model=model, page=False).prepare()


def logits(run: tf.Run, inputs: torch.Tensor) -> torch.Tensor:
    """Return logits (b, k)."""
    run.model.module.eval()
    with torch.no_grad():
        return run.forward(run.prepare_inputs(inputs))


def class_positions(names: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Return the positions of the classes known to both, among `names` and among the ten."""
    kept = [name for name in names if name in TEN]
    return [names.index(name) for name in kept], [TEN.index(name) for name in kept]


NEW_SETS = pytest.mark.parametrize("names", [ELEVEN, SHUFFLED, ONE_DROPPED, TEN[::-1], TEN[:5]], ids=",".join)


@pytest.fixture(scope="module")
def rounded_start(start, tmp_path_factory: pytest.TempPathFactory):
    """The run with weights rounded to multiples of 1/64: with integer inputs no kernel rounds a sum."""
    tensors, metadata = load_tensors(start.run_dir / "model.safetensors")
    path = tmp_path_factory.mktemp("exact") / "weights.safetensors"
    save_tensors({name: (64 * each).round() / 64 for name, each in tensors.items()}, path, metadata=metadata)
    return path


@NEW_SETS
@pytest.mark.parametrize("num", [1, 7, 64])
def test_logits_of_old_classes_are_bit_identical(rounded_start, names, num):
    inputs = (2 * samples(num, seed=3)).round()
    weights = tf.use("mlp", hidden=(32,), weights=rounded_start)
    before, after = (logits(run_before_training(each, weights), inputs) for each in (TEN, names))
    new, old = class_positions(names)
    assert after.shape == (num, len(names))
    assert torch.equal(after[:, new], before[:, old])
    chances, restricted = after.double().softmax(1)[:, new], before.double()[:, old].softmax(1)
    torch.testing.assert_close(chances / chances.sum(1, keepdim=True), restricted, rtol=1e-12, atol=1e-15)


@NEW_SETS
def test_logits_of_old_classes_differ_only_by_rounding(start, names):
    # The weights of each row are bit-identical, but how a matrix product rounds depends on the row's position.
    inputs = samples(64, seed=3)
    grown = run_before_training(names, tf.use("mlp", hidden=(32,), weights=start.run_dir / "model.safetensors"))
    tuned = tf.load(start.run_dir).run
    new, old = class_positions(names)
    assert torch.equal(grown.model.head_module().weight[new], tuned.model.head_module().weight[old])
    before = logits(tuned, inputs)[:, old]
    assert (logits(grown, inputs)[:, new] - before).abs().max() <= 1e-6 * before.abs().max()


@tf.component(api=1)
class HeadRecorder:
    """Stores the head with which the last phase started."""

    seen: ClassVar[dict[str, torch.Tensor]] = {}

    @tf.hookimpl
    def phase_started(self, run: tf.Run) -> None:
        self.seen.update({name: each.detach().clone() for name, each in run.model.head_module().named_parameters()})


def grow(model, names, folder, *, strategy=None):
    told: list[tf.TaskInfo] = []

    def plain(task: tf.TaskInfo):
        told.append(task)
        return [tf.Phase("all", epochs=1, lr=0.01)]

    result = tf.Engine(
        data=data_of_classes(names, seed=2),
        model=model,
        strategy=strategy or plain,
        callbacks=[HeadRecorder()],
        page=False,
        out=folder,
    ).run()
    return result, told


def test_run_starts_from_the_old_rows_and_names_them_to_the_strategy(start, tmp_path):
    weights = start.run_dir / "model.safetensors"
    result, told = grow(tf.use("mlp", hidden=(32,), weights=weights), SHUFFLED, tmp_path / "run")
    old = tf.load(start.run_dir).model.head_module()
    new, kept = class_positions(SHUFFLED)
    assert torch.equal(HeadRecorder.seen["weight"][new], old.weight[kept])
    assert torch.equal(HeadRecorder.seen["bias"][new], old.bias[kept])
    assert told[0].old_classes == tuple(SHUFFLED[place] for place in new)
    assert told[0].classes == SHUFFLED
    assert result.model.labels == SHUFFLED
    assert "randomly initialized: 'other'" in " ".join(result.model.changes)


def test_randomly_initialized_row_never_predicts_first(start):
    inputs = samples(64, seed=3)
    grown = run_before_training(ELEVEN, tf.use("mlp", hidden=(32,), weights=start.run_dir / "model.safetensors"))
    after = logits(grown, inputs)
    assert after[:, 10].abs().max() < after[:, :10].abs().max() / 4
    assert grown.model.head_module().bias[10] == 0


def test_module_keeps_its_rows_only_if_its_labels_are_named():
    named = run_before_training(ELEVEN, tf.Model.from_module(module(), labels=TEN)).model
    nameless = run_before_training(ELEVEN, module()).model
    old = module().head.weight
    assert torch.equal(named.head_module().weight[:10], old)
    assert not (nameless.head_module().weight[:10] == old).any()
    assert nameless.changes[-1] == "head: 10 -> 11 outputs, all randomly initialized"


def test_model_of_a_loaded_run_has_all_rows_pretrained(tmp_path):
    first, _ = grow(module(), TEN, tmp_path / "first", strategy=[tf.Phase("all", epochs=1)])
    loaded = tf.load(first.run_dir, model=module(3)).model
    assert loaded.pretrained_labels == TEN
    before = loaded.head_module().weight.detach().clone()
    _, told = grow(loaded, ELEVEN, tmp_path / "second")
    assert torch.equal(HeadRecorder.seen["weight"][:10], before)
    assert told[0].old_classes == TEN


def test_model_trained_from_scratch_is_pretrained_once_it_is_loaded(start):
    assert tf.load(start.run_dir).model.pretrained
    assert tf.load(start.run_dir).model.pretrained_labels == TEN


def test_growing_twice_keeps_the_rows_of_both(start, tmp_path):
    weights = start.run_dir / "model.safetensors"
    first, _ = grow(tf.use("mlp", hidden=(32,), weights=weights), ELEVEN, tmp_path / "first")
    twelve = ("another", *ELEVEN)
    inputs = samples(16, seed=4)
    again = tf.use("mlp", hidden=(32,), weights=first.run_dir / "model.safetensors")
    after = logits(run_before_training(twelve, again), inputs)
    torch.testing.assert_close(after[:, 1:], logits(tf.load(first.run_dir).run, inputs), rtol=1e-5, atol=1e-6)


def test_digit_cnn_grows_from_the_weights_of_a_run(tmp_path):
    pictures = torch.rand(22, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def data(names):
        split = tf.Split(pictures, torch.arange(22) % len(names))
        return tf.Data(split, split, split, inputs=TensorInputs(), targets=ClassTargets(names=names))

    common = {"page": False, "cache": "off"}
    steps = [tf.Phase("head", train="head", steps=2, lr=0.01)]
    first = tf.Engine(data=data(TEN), strategy=steps, out=tmp_path / "run", **common).run()
    start = tf.use("digit-cnn", weights=first.run_dir / "model.safetensors")
    grown = tf.Engine(data=data(SHUFFLED), model=start, **common).prepare()
    new, old = class_positions(SHUFFLED)
    after, before = logits(grown, pictures), logits(tf.load(first.run_dir).run, pictures)
    assert torch.equal(grown.model.head_module().weight[new], tf.load(first.run_dir).model.head_module().weight[old])
    torch.testing.assert_close(after[:, new], before[:, old], rtol=1e-5, atol=1e-5)
