"""Poisoned feedback: what is promoted after it is not worse than the champion was on clean truth, old or new.

Clean truth is fresh and labelled right: 5,000 rows of the table's world, or 557 real digits that nobody has seen, in
the old world's look and in the new one's. "Worse" is counted twice: as a lower share of right answers at all, and as a
significantly lower one (McNemar's exact test, p < 0.05). After no poisoned batch may the second be seen.

TUNEFORGE_POISONS sets how many batches of each kind are tried (1 by default, 20 for the full proof, which takes the
digits too), TUNEFORGE_POISON_SEED the seed of the first; with -s the table.
"""

import importlib
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from bundles import kept
from gaussian_clusters import base_run, cloud, rows_of
from scipy import stats
from tuneforge_serve import ModelRegistry, RequestLog, promote, retrain

import tuneforge as tf

POISONS = int(os.environ.get("TUNEFORGE_POISONS", "1"))
FIRST = int(os.environ.get("TUNEFORGE_POISON_SEED", "0"))
KINDS = ("0.2", "0.5", "one class", "none") if POISONS > 1 else ("one class",)
APART = 2.5  # where one answer in fifty is wrong, so that there is something to win and to lose
TURNED = ({}, {"shift": 0.6, "height": 4.0}, {"shift": 1.2, "height": 4.0})
TRUTH = 5000
LABELLED = 300


@attrs.frozen
class World:
    """A batch to label, and clean truth of the old world or of this one: inputs and classes."""

    name: str
    batch: Callable[[], tuple]
    old: Callable[[], tuple]
    new: Callable[[], tuple]


class Table:
    """Three classes of rows; a third of the batches are of the old world, two thirds of changed ones."""

    strategy = tf.use("replay", epochs=4, lr=3e-3)

    def __init__(self, folder):
        self.run = base_run(folder, count=3000, apart=APART).run_dir

    def world(self, trial):
        look = TURNED[trial % len(TURNED)]
        sizes = {"batch": (450, 1000, look), "old": (TRUTH, 5000, {}), "new": (TRUTH, 5000, look)}
        return World(f"{look}", **{name: partial(self.rows, trial, *given) for name, given in sizes.items()})

    def rows(self, trial, count, seed, look):
        values, codes = cloud(count, seed=seed + trial, apart=APART, **look)
        return rows_of(values), codes


class Digits:
    """Real digits in the looks of examples/production_loop.py; a quarter of the batches are of the old world."""

    strategy = tf.use("replay", epochs=8, lr=5e-4)

    def __init__(self, folder):
        data = tf.use("digits", other_share=0, per_class=40, test=0.2, val=0.1)
        strategy = tf.use("full", epochs=8)
        tf.Engine(data=data, model="digit-cnn", strategy=strategy, out=folder / "run", page=False).run()
        self.run = folder / "run"
        self.worlds = importlib.import_module("production.worlds")
        self.production = self.worlds.Production(self.run)
        self.free = self.production.free

    def world(self, trial):
        looks = [getattr(self.worlds, name) for name in ("plain", "inverted", "rotated", "new_pen")]
        look, free = looks[trial % len(looks)], len(self.free)
        self.production.free = np.random.default_rng(trial).permutation(self.free)
        spans = {"batch": (look, 0, LABELLED), "old": (looks[0], LABELLED, free), "new": (look, LABELLED, free)}
        return World(look.__name__, **{name: partial(self.pictures, *span) for name, span in spans.items()})

    def pictures(self, *span):
        raws, names = zip(*self.production.digits(*span), strict=True)
        return raws, np.array(names, int)


@attrs.define
class Tally:
    """What came of batches of one kind."""

    promoted: int = 0
    lower: dict = attrs.field(factory=lambda: {"old": 0, "new": 0})
    worse: dict = attrs.field(factory=lambda: {"old": 0, "new": 0})
    named: int = 0
    wrong: int = 0
    right_named: int = 0
    batches_found: int = 0

    def count(self, done, wrong):
        """The labels that were named."""
        named = wrong[[each.row for each in done.label_issues]]
        self.named, self.right_named = self.named + named.sum(), self.right_named + (~named).sum()
        self.wrong, self.batches_found = self.wrong + wrong.sum(), self.batches_found + (named.sum() > wrong.sum() / 2)

    def compare(self, store, world):
        """Champion and challenger on clean truth."""
        self.promoted += 1
        for name in ("old", "new"):
            raws, codes = getattr(world, name)()
            stored = torch.stack([store.load(1).inputs.decode(raw) for raw in raws])
            answers = (store.load(number).outputs(stored).argmax(1).numpy() for number in (1, 2))
            before, after = (each == codes for each in answers)
            lost, won = int((before & ~after).sum()), int((~before & after).sum())
            self.lower[name] += lost > won
            self.worse[name] += lost > won and stats.binomtest(won, won + lost).pvalue < 0.05
            print(f"{world.name}: on clean truth, {name} world, right {before.mean():.4f} -> {after.mean():.4f}")

    def sentence(self, kind):
        return (
            f"{kind}: {self.promoted} of {POISONS} promoted; on clean truth old/new lower than the champion "
            f"{self.lower['old']}/{self.lower['new']}, significantly {self.worse['old']}/{self.worse['new']}; "
            f"{self.named} of {self.wrong} wrong labels named and {self.right_named} right ones with them; most of the "
            f"wrong ones in {self.batches_found} batches"
        )


def poisoned(codes, kind, trial):
    """The labels that somebody gives, and which of them are wrong."""
    given, generator, size = codes.copy(), np.random.default_rng(trial), codes.max() + 1
    if kind == "one class":
        given[codes == trial % size] = (trial + 1) % size
    elif kind != "none":
        hit = generator.random(len(codes)) < float(kind)
        given[hit] = (codes[hit] + generator.integers(1, size, hit.sum())) % size
    return given, given != codes


@pytest.fixture(scope="module")
def setting(request, tmp_path_factory):
    """Where batches come from, with a store whose champion knows the old world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
        made = request.param(tmp_path_factory.mktemp("base"))
    made.store = made.run.parent / "models"
    promote(made.run, registry=made.store, name="kinds", formats=("safetensors",))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", [Table, Digits] if POISONS > 1 else [Table], indirect=True)
def test_what_is_promoted_is_no_worse_on_clean_truth(setting, tmp_path, kind):
    tally = Tally()
    for trial in range(FIRST, FIRST + POISONS):
        store = ModelRegistry(shutil.copytree(setting.store, tmp_path / str(trial)), "kinds")
        world = setting.world(trial)
        raws, codes = world.batch()
        given, wrong = poisoned(codes, kind, trial)
        labels = store.load().targets.labels
        with RequestLog(tmp_path / f"{trial}.db") as request_log:
            kept(store, request_log, raws, [labels[code] for code in given])
            done = retrain(store.root, request_log, strategy=setting.strategy, run_settings={"page": False})
        tally.count(done, wrong)
        if done.new_version is not None:
            tally.compare(store, world)
        shutil.rmtree(store.root)
    print(f"\n{type(setting).__name__}, {tally.sentence(kind)}")
    assert kind == "none" or not any(tally.worse.values())
