"""The strategy loop: a strategy that is closed early costs no report, and it cannot read the test splits."""

import pytest
from tiny import tiny_data

import tuneforge as tf


def phase(name):
    return tf.Phase(name, train="head", epochs=1)


def yields_in_finally(task):
    try:
        yield phase("a")
        yield phase("b")
    finally:
        yield phase("c")
        yield phase("d")


def yields_when_closed(task):
    while True:
        try:
            yield phase("a")
        except GeneratorExit:
            yield phase("c")


def raises_in_finally(task):
    try:
        yield phase("a")
        yield phase("b")
    finally:
        raise ValueError("cannot clean up")


@pytest.mark.parametrize("strategy", [yields_in_finally, yields_when_closed, raises_in_finally])
def test_strategy_that_does_not_end_cleanly_keeps_its_report(tune, strategy):
    result = tune(strategy, budget="1epoch")
    assert [step.name for step, _ in result.strategy_steps] == ["a"]
    assert (result.run_dir / "report.json").exists()
    log = (result.run_dir / "log.txt").read_text()
    assert "cannot clean up" in log if strategy is raises_in_finally else "another step while it is closed" in log


class Peeks:
    """Keeps the run and reads splits before it decides."""

    def __init__(self, read):
        self.read = read

    @tf.hookimpl
    def run_started(self, run):
        self.run = run

    @tf.hookimpl
    def finetune_strategy(self, task):
        yield phase("a")
        self.size = len(self.run.data.val.targets)
        self.read(self.run.data)


READS = [
    lambda data: data.test.targets,
    lambda data: len(data.test),
    lambda data: data.splits()["test"].fetch(0),
    lambda data: data.extra_test_splits["other"].targets,
]


@pytest.mark.parametrize("read", READS)
def test_strategy_cannot_read_a_test_split_through_the_run(tune, read):
    data = tiny_data()
    data = tf.Data(data.train, data.val, data.test, data.inputs, data.targets, {"other": data.test})
    strategy = Peeks(read)
    with pytest.raises(tf.TuneforgeError, match="a strategy reads the test split '(test|other)'"):
        tune(strategy, data=data)
    assert strategy.size == 30


def test_test_split_is_readable_between_the_decisions_of_a_strategy(tune):
    class Reads:
        @tf.hookimpl
        def phase_ended(self, run):
            self.size = len(run.data.test.targets)

    reads = Reads()
    tune([phase("a")], callbacks=[reads])
    assert reads.size == 30
