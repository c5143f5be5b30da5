"""A DataLoader as data: its sampler, batch size, drop_last and collate_fn are used, or refused by name."""

import itertools
import random

import numpy as np
import pytest
import torch
from tiny import StubRun
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import tuneforge as tf
from tuneforge.engine.data.sample_seeds import draw_epoch
from tuneforge.sklearn import data_from_arrays

SIZE = 100
LABELS = torch.arange(SIZE) % 10 // 9  # one row in ten is of class 1
ROWS = TensorDataset(torch.arange(SIZE).float()[:, None].repeat(1, 8), LABELS)
WEIGHTS = torch.where(LABELS == 1, 9.0, 1.0)
PHASE = tf.Phase("all", train="all", epochs=2)


class Recorder(nn.Module):
    """Writes down the rows of each batch that it is trained on; a row's number is each of its features."""

    def __init__(self):
        super().__init__()
        self.head, self.batches = nn.Linear(8, 2), []

    def forward(self, x):
        if self.training and torch.is_grad_enabled() and type(x) is torch.Tensor:
            self.batches.append(x[:, 0].round().long().tolist())
        return self.head(x / SIZE)

    @property
    def rows(self):
        return list(itertools.chain(*self.batches))


def prepared(loader, **options):
    return data_from_arrays(loader, **options).data_prepare(StubRun)


def trained(tune, loader, strategy=PHASE, *, batch_size=10, **settings):
    model = Recorder()
    return model, tune([strategy], data=loader, model=model, batch_size=batch_size, **settings)


class Balanced(Sampler):
    """Draws rows by weight, as samplers for unbalanced data do."""

    def __init__(self, draw):
        self.draw = draw

    def __iter__(self):
        return iter(self.draw())

    def __len__(self):
        return SIZE


class Counting(Sampler):
    """Another order in each pass, from a counter that no seed reaches."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(torch.arange(SIZE).roll(self.passes).tolist())

    def __len__(self):
        return SIZE


class ByEpoch(Counting):
    """The same, told the epoch."""

    def __iter__(self):
        return iter(torch.arange(SIZE).roll(self.passes).tolist())

    def set_epoch(self, epoch):
        self.passes = epoch


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler(WEIGHTS, SIZE),
        WeightedRandomSampler(WEIGHTS, SIZE, generator=torch.Generator().manual_seed(3)),
        Balanced(lambda: torch.multinomial(WEIGHTS, SIZE, replacement=True).tolist()),
        Balanced(lambda: random.choices(range(SIZE), WEIGHTS.tolist(), k=SIZE)),
        Balanced(lambda: np.random.choice(SIZE, SIZE, p=(WEIGHTS / WEIGHTS.sum()).numpy())),
        BatchSampler(WeightedRandomSampler(WEIGHTS, SIZE), 10, drop_last=True),
    ],
    ids=["weighted", "generator", "torch", "python", "numpy", "batches"],
)
def test_a_weighted_sampler_balances_training_and_repeats_by_seed(tune, sampler):
    batches = isinstance(sampler, BatchSampler)
    loader = DataLoader(ROWS, batch_sampler=sampler) if batches else DataLoader(ROWS, batch_size=10, sampler=sampler)
    phase = tf.Phase("all", train="all", epochs=10)
    model, result = trained(tune, loader, phase)
    share = LABELS[model.rows].float().mean()
    assert 0.4 < share < 0.6
    again, other = (trained(tune, loader, phase, seed=seed)[0] for seed in (0, 1))
    assert again.batches == model.batches
    assert other.batches != model.batches
    assert result.report["num_samples"]["train"] == 60


def test_rows_of_weight_zero_are_in_no_split():
    weights = torch.where(torch.arange(SIZE) < 50, 1.0, 0.0)
    data = prepared(DataLoader(ROWS, sampler=WeightedRandomSampler(weights, 30)))
    assert sorted(int(each) for split in data.splits().values() for each in split.ids) == list(range(50))
    assert data.train_sampler.num_draws == round(30 * len(data.train) / 50)


@pytest.mark.parametrize("sampler", [SubsetRandomSampler(range(60)), range(60), list(range(60))])
def test_the_indices_of_samplers_decide_the_splits(tune, sampler):
    rest = DataLoader(ROWS, batch_size=5, sampler=SubsetRandomSampler(range(60, SIZE)))
    source = data_from_arrays(DataLoader(ROWS, batch_size=10, sampler=sampler), x_val=rest, x_test=rest)
    data = source.data_prepare(StubRun)
    assert [len(split) for split in data.splits().values()] == [60, 40, 40]
    assert data.val.fetch(torch.arange(40))[:, 0].tolist() == list(range(60, SIZE))
    model = Recorder()
    tune([PHASE], data=source, model=model, batch_size=10)
    assert sorted(model.rows) == sorted([*range(60)] * 2)
    assert data.train.id_of(3) == "3"


def test_shuffle_gives_each_epoch_another_order_and_no_shuffle_none(tune):
    options = {"val": 0.2, "test": 0.2}
    shuffled, ordered = (DataLoader(ROWS, batch_size=10, shuffle=shuffle) for shuffle in (True, False))
    model, _ = trained(tune, data_from_arrays(shuffled, **options))
    assert sorted(model.rows[:60]) == sorted(model.rows[60:])
    assert model.rows[:60] != model.rows[60:]
    model, result = trained(tune, data_from_arrays(ordered, **options))
    assert model.rows[:60] == sorted(model.rows[60:])
    assert "in the order of the dataset" in (result.run_dir / "log.txt").read_text()


def test_the_generator_of_a_loader_is_part_of_the_seed():
    orders = [
        prepared(DataLoader(ROWS, shuffle=True, generator=torch.Generator().manual_seed(seed))).train_sampler
        for seed in (1, 1, 2)
    ]
    first, again, other = (draw_epoch(each, 0, 0) for each in orders)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, draw_epoch(orders[0], 0, 1))
    assert torch.equal(first.sort().values, torch.arange(60))


def test_a_sampler_with_an_epoch_is_told_it_and_one_with_a_hidden_counter_is_refused(tune):
    model, _ = trained(tune, DataLoader(ROWS, batch_size=10, sampler=ByEpoch()))
    assert model.rows[:60] != model.rows[60:]
    with pytest.raises(tf.DataError, match="sampler of the data gives another order"):
        trained(tune, DataLoader(ROWS, batch_size=10, sampler=Counting()))


def test_drop_last_leaves_out_the_incomplete_batch(tune):
    loader = DataLoader(ROWS, batch_size=16, shuffle=True, drop_last=True)
    model, _ = trained(tune, loader, batch_size=16)
    assert [len(batch) for batch in model.batches] == [16] * 6
    with pytest.raises(tf.DataError, match="leaves no batch of 64 from 60"):
        prepared(DataLoader(ROWS, batch_size=64, drop_last=True))


def test_the_batch_size_of_a_loader_is_that_of_the_run(tmp_path):
    settings = {"model": Recorder(), "strategy": [PHASE], "out": tmp_path / "run"}
    loader = DataLoader(ROWS, batch_size=10, num_workers=2)
    engine = tf.Engine(data=loader, **settings)
    assert (engine.config.batch_size, engine.config.num_workers) == (10, 2)
    assert tf.Engine(data=loader, batch_size=10, num_workers=1, **settings).config.num_workers == 1
    with pytest.raises(tf.UsageError, match="batch_size is 32 for the run, and 10"):
        tf.Engine(data=loader, batch_size=32, **settings)


class Buckets(BatchSampler):
    pass


class OwnLoader(DataLoader):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: DataLoader(ROWS, batch_sampler=Buckets(SequentialSampler(ROWS), 4, drop_last=False)), "batch_sampler"),
        (lambda: DataLoader(ROWS, batch_sampler=[[0, 1], [2, 3]]), "batch_sampler"),
        (lambda: DataLoader(ROWS, batch_size=None), "batch_size=None"),
        (lambda: DataLoader(ROWS, worker_init_fn=print), "worker_init_fn"),
        (lambda: OwnLoader(ROWS), "OwnLoader"),
        (lambda: DataLoader(ROWS, sampler=DistributedSampler(ROWS, 2, 0)), "DistributedSampler"),
        (lambda: DataLoader(ROWS, sampler=[0, SIZE]), "sampler list"),
        (lambda: DataLoader(ROWS, sampler=[]), "sampler list"),
        (lambda: DataLoader(ROWS, sampler=["a"]), "sampler list"),
        (lambda: DataLoader(ROWS, sampler=itertools.count()), "sampler count"),
    ],
)
def test_what_cannot_be_honored_is_refused_by_name(make, name):
    with pytest.raises(tf.DataError, match=name):
        prepared(make())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler": WeightedRandomSampler(WEIGHTS, SIZE)}, "WeightedRandomSampler"),
        ({"sampler": RandomSampler(ROWS, num_samples=10)}, "RandomSampler"),
        ({"drop_last": True}, "drop_last"),
    ],
)
def test_an_evaluation_that_would_repeat_or_skip_samples_is_refused(options, name):
    with pytest.raises(tf.DataError, match=name):
        prepared(DataLoader(ROWS), x_val=DataLoader(ROWS, **options))


@pytest.mark.parametrize(
    "step", [tf.Phase("all", train="all", epochs=1, sampling="balanced"), tf.HeadFit("head")], ids=["sampling", "fit"]
)
def test_a_step_that_would_ignore_the_sampler_is_refused(tune, step):
    loader = DataLoader(ROWS, batch_size=10, sampler=WeightedRandomSampler(WEIGHTS, SIZE))
    with pytest.raises(tf.TuneforgeError, match="sampler"):
        trained(tune, loader, step)


class Sequences(Dataset):
    """Sequences of unequal length, of one token, which is the class."""

    def __len__(self):
        return 90

    def __getitem__(self, row):
        return torch.full((2 + row % 5,), 1 + row % 3), row % 3


def pad(items):
    ids = nn.utils.rnn.pad_sequence([each for each, _ in items], batch_first=True)
    return ids, torch.tensor([label for _, label in items])


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids).sum(1) / (ids > 0).sum(1, keepdim=True))


def test_batches_of_collate_fn_are_trained_on_evaluated_and_predicted(tune):
    loader = DataLoader(Sequences(), batch_size=10, collate_fn=pad)
    lines = []

    def run(**settings):
        torch.manual_seed(0)
        phases = [tf.Phase("head", train="head", epochs=1), tf.Phase("all", train="all", epochs=5, lr=5e-2)]
        return tune(phases, data=loader, model=Bag(), batch_size=10, log=lines.append, **settings)

    result = run(num_workers=2)
    assert result.report["splits"]["test"]["accuracy"] > 0.9
    assert any("cache: off" in line and "collate_fn" in line for line in lines)
    assert torch.equal(run().model.module.head.weight, result.model.module.head.weight)
    inputs = [[2, 2, 2], [1], [3, 3]]
    probabilities = [each["probabilities"] for each in tf.predict(result.run_dir, inputs, model=Bag())]
    alone = [next(iter(tf.predict(result.run_dir, [each], model=Bag())))["probabilities"] for each in inputs]
    assert probabilities == alone


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda items: {"x": 1}, "collate_fn returns dict"),
        (lambda items: (torch.zeros(1, 2), [0]), r"makes \[1\] inputs and targets"),
        (lambda items: (torch.zeros(len(items), 2), [len(items) % 3] * len(items)), "collate_fn mixes"),
        (lambda items: (torch.zeros(len(items), 2), [random.randrange(3) for _ in items]), "collate_fn mixes"),
    ],
)
def test_a_collate_fn_that_cannot_be_used_is_refused_before_training(collate, message):
    with pytest.raises(tf.DataError, match=message):
        prepared(DataLoader(Sequences(), collate_fn=collate))


def test_items_of_any_kind_reach_collate_fn():
    class Records(Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, row):
            return {"text": "x" * (row % 4 + 1), "label": "ab"[row % 2]}

    def collate(records):
        return {"length": torch.tensor([len(each["text"]) for each in records])[:, None]}, [
            each["label"] for each in records
        ]

    data = prepared(DataLoader(Records(), collate_fn=collate))
    assert data.targets.labels == ("a", "b")
    assert data.train.fetch(torch.arange(3))["length"].shape == (3, 1)
