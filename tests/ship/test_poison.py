"""Poisoned feedback: what is promoted after it is no worse than the champion was on the new world's clean truth, and on
the old world's it loses no more than the gate's margin.

TUNEFORGE_POISONS sets how many batches of each kind are tried (1 by default, 20 for the full proof), with -s the table.
"""

import os
import shutil

import numpy as np
import pytest
from clouds import ask, base_run, cloud, right
from scipy import stats

import tuneforge as tf
from tuneforge.ship.champion.gate import Rules
from tuneforge.ship.champion.promote import promote
from tuneforge.ship.champion.store import Store
from tuneforge.ship.circle.records import Records
from tuneforge.ship.circle.retune import retune

POISONS = int(os.environ.get("TUNEFORGE_POISONS", "1"))
APART = 2.5  # where one answer in fifty is wrong, so that there is something to win and to lose
WORLDS = ({}, {"shift": 0.6, "height": 4.0}, {"shift": 1.2, "height": 4.0})
KINDS = ("one class", "0.2", "0.5", "0") if POISONS > 1 else ("one class",)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A store whose champion knows the old world."""
    folder = tmp_path_factory.mktemp("base")
    promote(
        base_run(folder, count=3000, apart=APART).folder, store=folder / "models", name="kinds", to=("safetensors",)
    )
    return folder / "models"


def poisoned(codes, kind, generator):
    """The labels that somebody gives, and which of them are wrong."""
    given = codes.copy()
    if kind == "one class":
        given[codes == 0] = 1
    else:
        hit = generator.random(len(codes)) < float(kind)
        given[hit] = (codes[hit] + generator.integers(1, 3, hit.sum())) % 3
    return given, given != codes


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_promoted_is_no_worse_on_clean_truth(models, tmp_path, kind):
    worse = strictly = promoted = found = false = wrong_total = 0
    for trial in range(POISONS):
        store = Store(shutil.copytree(models, tmp_path / str(trial)), "kinds")
        generator = np.random.default_rng(trial)
        world = WORLDS[trial % len(WORLDS)]
        values, codes = cloud(450, seed=1000 + trial, apart=APART, **world)
        given, wrong = poisoned(codes, kind, generator)
        with Records(tmp_path / f"{trial}.db") as records:
            ask(store, records, values, ["abc"[each] for each in given])
            strategy = tf.use("replay", epochs=4, lr=3e-3)
            done = retune(store.root, records, strategy=strategy, settings={"page": False})
        named = wrong[[each.place for each in done.suspects]]
        found, false, wrong_total = found + named.sum(), false + (~named).sum(), wrong_total + wrong.sum()
        if done.version is None:
            continue
        promoted += 1
        for name, look in (("old", {}), ("new", world)):
            clean = cloud(3000, seed=5000 + trial, apart=APART, **look)
            before, after = (right(store.folder(number), *clean) for number in (1, 2))
            lost, won = int((before & ~after).sum()), int((~before & after).sum())
            surely = lost > won and stats.binomtest(won, won + lost).pvalue < 0.05
            worse += surely and (name == "new" or lost - won > Rules().margin * 3000)
            strictly += surely
            print(f"{kind}, trial {trial}, {name} world: right {before.mean():.4f} -> {after.mean():.4f}")
    print(
        f"\n{kind}: {promoted} of {POISONS} promoted; on clean truth {worse} worse than allowed, {strictly} of "
        f"{2 * promoted} comparisons significantly below the champion at all; "
        f"{found} of {wrong_total} wrong labels named, {false} right ones with them"
    )
    assert worse == 0
