"""Another set of classes: rows of the head go by name, and before the first step the old classes answer as they did.

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
    """(b, 12) -> (b, k), with statistics that training moves."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(12, features), nn.BatchNorm1d(features), nn.ReLU())
        return nn.Sequential(OrderedDict(body=body, head=nn.Linear(features, num_outputs)))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    """A finished run of an mlp on ten classes."""
    return tf.Engine(
        data=data_of_classes(TEN),
        model=tf.use("mlp", hidden=(32,)),
        strategy=tf.Phase("all", epochs=2, lr=0.01),
        page=False,
        out=tmp_path_factory.mktemp("ten") / "run",
    ).run()


def before_the_first_step(names: tuple[str, ...], model) -> tf.Run:
    return tf.Engine(data=data_of_classes(names, seed=2), model=model, page=False).prepare()


def answers(run: tf.Run, inputs: torch.Tensor) -> torch.Tensor:
    """Logits (b, k)."""
    run.model.module.eval()
    with torch.no_grad():
        return run.forward(run.prepare_inputs(inputs))


def places(names: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Where the classes that both know stand among `names`, and among the ten."""
    kept = [name for name in names if name in TEN]
    return [names.index(name) for name in kept], [TEN.index(name) for name in kept]


NEW_SETS = pytest.mark.parametrize("names", [ELEVEN, SHUFFLED, ONE_DROPPED, TEN[::-1], TEN[:5]], ids=",".join)


@pytest.fixture(scope="module")
def exact(start, tmp_path_factory: pytest.TempPathFactory):
    """Its weights as multiples of 1/64: with inputs that are whole numbers no sum rounds, whatever the kernel."""
    tensors, metadata = load_tensors(start.run_dir / "model.safetensors")
    path = tmp_path_factory.mktemp("exact") / "weights.safetensors"
    save_tensors({name: (64 * each).round() / 64 for name, each in tensors.items()}, path, metadata=metadata)
    return path


@NEW_SETS
@pytest.mark.parametrize("num", [1, 7, 64])
def test_old_classes_answer_as_before_to_the_bit(exact, names, num):
    inputs = (2 * samples(num, seed=3)).round()
    weights = tf.use("mlp", hidden=(32,), weights=exact)
    before, after = (answers(before_the_first_step(each, weights), inputs) for each in (TEN, names))
    new, old = places(names)
    assert after.shape == (num, len(names))
    assert torch.equal(after[:, new], before[:, old])
    chances, restricted = after.double().softmax(1)[:, new], before.double()[:, old].softmax(1)
    torch.testing.assert_close(chances / chances.sum(1, keepdim=True), restricted, rtol=1e-12, atol=1e-15)


@NEW_SETS
def test_the_weights_of_a_finished_run_are_a_start_whose_answers_differ_by_rounding_alone(start, names):
    # Each row's weights are the same bits, but a matrix product rounds a column by where it stands in the matrix.
    inputs = samples(64, seed=3)
    grown = before_the_first_step(names, tf.use("mlp", hidden=(32,), weights=start.run_dir / "model.safetensors"))
    tuned = tf.load(start.run_dir).run
    new, old = places(names)
    assert torch.equal(grown.model.head_module().weight[new], tuned.model.head_module().weight[old])
    before = answers(tuned, inputs)[:, old]
    assert (answers(grown, inputs)[:, new] - before).abs().max() <= 1e-6 * before.abs().max()


@tf.component(api=1)
class Looks:
    """Keeps the head with which the last phase started."""

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
        callbacks=[Looks()],
        page=False,
        out=folder,
    ).run()
    return result, told


def test_a_run_starts_from_the_ten_rows_and_tells_the_strategy_which_they_are(start, tmp_path):
    weights = start.run_dir / "model.safetensors"
    result, told = grow(tf.use("mlp", hidden=(32,), weights=weights), SHUFFLED, tmp_path / "run")
    old = tf.load(start.run_dir).model.head_module()
    new, kept = places(SHUFFLED)
    assert torch.equal(Looks.seen["weight"][new], old.weight[kept])
    assert torch.equal(Looks.seen["bias"][new], old.bias[kept])
    assert told[0].old_classes == tuple(SHUFFLED[place] for place in new)
    assert told[0].classes == SHUFFLED
    assert result.model.labels == SHUFFLED
    assert "randomly initialized: 'other'" in " ".join(result.model.changes)


def test_the_fresh_row_does_not_speak_first(start):
    inputs = samples(64, seed=3)
    grown = before_the_first_step(ELEVEN, tf.use("mlp", hidden=(32,), weights=start.run_dir / "model.safetensors"))
    after = answers(grown, inputs)
    assert after[:, 10].abs().max() < after[:, :10].abs().max() / 4
    assert grown.model.head_module().bias[10] == 0


def test_a_module_whose_labels_are_named_keeps_its_rows_and_one_without_names_does_not():
    named = before_the_first_step(ELEVEN, tf.Model.from_module(module(), labels=TEN)).model
    nameless = before_the_first_step(ELEVEN, module()).model
    old = module().head.weight
    assert torch.equal(named.head_module().weight[:10], old)
    assert not (nameless.head_module().weight[:10] == old).any()
    assert nameless.changes[-1] == "head: 10 -> 11 outputs, all randomly initialized"


def test_the_model_of_a_loaded_run_is_a_start_whose_every_row_is_known(tmp_path):
    first, _ = grow(module(), TEN, tmp_path / "first", strategy=[tf.Phase("all", epochs=1)])
    loaded = tf.load(first.run_dir, model=module(3)).model
    assert loaded.pretrained_labels == TEN
    before = loaded.head_module().weight.detach().clone()
    _, told = grow(loaded, ELEVEN, tmp_path / "second")
    assert torch.equal(Looks.seen["weight"][:10], before)
    assert told[0].old_classes == TEN


def test_a_model_that_began_with_fresh_weights_is_pretrained_once_it_is_loaded(start):
    assert tf.load(start.run_dir).model.pretrained
    assert tf.load(start.run_dir).model.pretrained_labels == TEN


def test_growing_twice_keeps_the_rows_of_both(start, tmp_path):
    weights = start.run_dir / "model.safetensors"
    first, _ = grow(tf.use("mlp", hidden=(32,), weights=weights), ELEVEN, tmp_path / "first")
    twelve = ("another", *ELEVEN)
    inputs = samples(16, seed=4)
    again = tf.use("mlp", hidden=(32,), weights=first.run_dir / "model.safetensors")
    after = answers(before_the_first_step(twelve, again), inputs)
    torch.testing.assert_close(after[:, 1:], answers(tf.load(first.run_dir).run, inputs), rtol=1e-5, atol=1e-6)


def test_the_digit_network_grows_from_the_weights_of_a_run(tmp_path):
    pictures = torch.rand(22, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def data(names):
        split = tf.Split(pictures, torch.arange(22) % len(names))
        return tf.Data(split, split, split, inputs=TensorInputs(), targets=ClassTargets(names=names))

    common = {"page": False, "cache": "off"}
    steps = [tf.Phase("head", train="head", steps=2, lr=0.01)]
    first = tf.Engine(data=data(TEN), strategy=steps, out=tmp_path / "run", **common).run()
    start = tf.use("digit-cnn", weights=first.run_dir / "model.safetensors")
    grown = tf.Engine(data=data(SHUFFLED), model=start, **common).prepare()
    new, old = places(SHUFFLED)
    after, before = answers(grown, pictures), answers(tf.load(first.run_dir).run, pictures)
    assert torch.equal(grown.model.head_module().weight[new], tf.load(first.run_dir).model.head_module().weight[old])
    torch.testing.assert_close(after[:, new], before[:, old], rtol=1e-5, atol=1e-5)
