"""The batch size that is chosen for the data depends on the number of samples alone."""

import attrs
import pytest
from tiny import blobs, tiny_data

import tuneforge as tf
from tuneforge.engine.context.distributed import ProcessGroup
from tuneforge.engine.context.run import Run
from tuneforge.engine.model.device import resolve_device
from tuneforge.plugin.config import resolve_config
from tuneforge.plugin.hooks import Hooks


def run_with(num_samples, *, world_size=1, **settings):
    run = Run(
        config=resolve_config(settings),
        run_dir=None,
        device=resolve_device("cpu"),
        hooks=Hooks(),
        process_group=ProcessGroup(world_size=world_size),
    )
    run.set_data(attrs.evolve(tiny_data(), train=blobs(num_samples, seed=1)))
    return run


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize(("num_samples", "expected"), [(30, 8), (319, 8), (320, 16), (639, 16), (640, 32), (5000, 32)])
def test_it_is_the_same_for_any_number_of_processes(num_samples, world_size, expected):
    assert run_with(num_samples, world_size=world_size).batch_size == expected


def test_that_of_the_user_is_used_and_a_refit_keeps_the_one_chosen():
    assert run_with(30, batch_size=24).batch_size == 24
    run = run_with(30)
    run.set_data(attrs.evolve(tiny_data(), train=blobs(5000, seed=1)))
    assert run.batch_size == 8


def test_the_task_of_a_strategy_has_it(tmp_path):
    seen = []

    def strategy(task):
        seen.append(task.batch_size)
        return []

    tf.Engine(data=tiny_data(), model=tf.use("mlp"), strategy=strategy, out=tmp_path / "run", page=False).run()
    assert seen == [8]
