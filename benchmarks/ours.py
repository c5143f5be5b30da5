"""tuneforge's own entry in the tables: a run that measures the time of its strategy steps."""

import os
import statistics
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
from common import Entry
from work import Network, Work

import tuneforge as tf
from tuneforge.plugin import StrategyStep
from tuneforge.sklearn import data_from_arrays

CACHE = "TUNEFORGE_CACHE"


class Clock:
    """Measures a run: seconds from the strategy's first step to its last result, and when each epoch ended."""

    def __init__(self) -> None:
        self.steps_s = 0.0
        self.ends: list[float] = []

    @tf.hookimpl(wrapper=True)
    def finetune_strategy(self) -> Any:
        """Measure the time of the strategy's steps."""
        return self._timed((yield))

    def _timed(self, steps: Any) -> Iterator[StrategyStep]:
        began = time.perf_counter()
        yield from (steps if isinstance(steps, Generator) else (each for each in steps))
        self.steps_s = time.perf_counter() - began

    @tf.hookimpl
    def epoch_ended(self) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())


@attrs.frozen(eq=False)
class Done:
    """A finished run.

    Args:
        result: Its result.
        steps_s: Seconds of its steps, hooks, metrics, freeze check, log and checkpoints included.
        whole_s: Seconds of the whole run, from preparing the data to the model file.
        ends: When each epoch ended.
    """

    result: tf.Result
    steps_s: float
    whole_s: float
    ends: list[float]

    @property
    def further_epoch_s(self) -> float:
        """Return the median seconds of an epoch after the first, with validation and the engine's overhead."""
        return statistics.median(after - before for before, after in pairwise(self.ends))


def tuned(out: Path, **flags: Any) -> Done:
    """Run the engine with these flags, in a folder `out`."""
    clock, began = Clock(), time.perf_counter()
    result = tf.Engine(callbacks=[clock], page=False, out=out, **flags).run()
    return Done(result, clock.steps_s, time.perf_counter() - began, clock.ends)


def on_work(work: Work, network: Network, out: Path, **flags: Any) -> Done:
    """Run one phase, with the learning rate and the optimizer of the other libraries."""
    (x, y), (x_val, y_val) = work.train, work.val
    data = data_from_arrays(x, y, x_val=x_val, y_val=y_val, x_test=x_val[:2], y_test=y_val[:2])
    phase = tf.Phase("work", train="head" if work.frozen else "all", epochs=work.epochs, lr=0.01)
    flags = {"strategy": [phase], "optimizer": tf.use("sgd", momentum=0.9), "batch_size": work.batch} | flags
    return tuned(out, data=data, model=tf.Model.from_module(network, head="head"), **flags)


def entry_of(name: str, **flags: Any) -> Entry:
    """Return an entry with the rows `name` (the steps of a run) and `name, whole run`, on an empty cache on disk."""

    def entry(work: Work, network: Network) -> Mapping[str, float]:
        with empty_cache() as folder:
            done = on_work(work, network, folder / "run", **flags)
        return {name: done.steps_s, f"{name}, whole run": done.whole_s}

    return entry


@contextmanager
def empty_cache() -> Iterator[Path]:
    """Yield a folder for runs with an empty feature cache on disk."""
    before = os.environ.get(CACHE)
    with TemporaryDirectory() as folder:
        os.environ[CACHE] = str(Path(folder) / "cache")
        try:
            yield Path(folder)
        finally:
            del os.environ[CACHE]
            os.environ.update({} if before is None else {CACHE: before})
