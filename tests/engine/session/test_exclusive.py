import contextlib
import random
import threading

import numpy as np
import pytest
import torch
from tiny import tiny_data, tiny_net

import tuneforge as tf

STRATEGY = [tf.Phase("head", train="head", epochs=1), tf.Phase("all", epochs=1)]


class During:
    """A callback that calls a function once, while the first phase trains."""

    def __init__(self, function):
        self.function = function

    @tf.hookimpl
    def phase_started(self, run):
        function, self.function = self.function, lambda: None
        function()


def weights(result):
    return (result.run_dir / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    engine = tf.Engine(data=tiny_data(), model=tiny_net(), strategy=STRATEGY, batch_size=16, page=False, out=run_dir)
    return weights(engine.run())


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext],
    ids=["no_grad", "inference_mode", "autocast", "none"],
)
def test_run_is_independent_of_the_callers_gradient_mode_and_autocast(tune, undisturbed, context):
    net = tiny_net()
    with context():
        assert weights(tune(STRATEGY, model=net)) == undisturbed


def test_run_in_a_second_thread_is_refused_and_leaves_the_first_undisturbed(tune, undisturbed, tmp_path):
    errors = []
    second = tf.Engine(data=tiny_data(), model=tiny_net(), strategy=STRATEGY, page=False, out=tmp_path / "second")

    def run_second(method):
        try:
            method()
        except tf.UsageError as error:
            errors.append(str(error))

    def start_threads():
        for method in (second.run, second.prepare):
            thread = threading.Thread(target=run_second, args=(method,))
            thread.start()
            thread.join()

    assert weights(tune(STRATEGY, callbacks=[During(start_threads)])) == undisturbed
    assert len(errors) == 2
    assert all("another run is under way in another thread" in error for error in errors)
    assert not (tmp_path / "second").exists()
    assert second.run().run_dir.exists()  # a refused engine can run later


def test_run_within_a_run_leaves_the_outer_one_undisturbed(tune, undisturbed):
    assert weights(tune(STRATEGY, callbacks=[During(lambda: tune(STRATEGY, seed=7))])) == undisturbed


def test_run_seeds_the_generators_of_python_and_numpy_and_restores_them(tmp_path):
    draws = []
    for number, seed in enumerate((5, 5, 6)):
        random.seed(number)
        np.random.seed(number)
        before = random.getstate(), np.random.get_state()[1].tolist()
        callback = During(lambda: draws.append((random.random(), np.random.rand())))
        tf.Engine(
            data=tiny_data(), model=tiny_net(), strategy=STRATEGY, callbacks=[callback], batch_size=16, page=False,
            seed=seed, out=tmp_path / str(number),
        ).run()  # fmt: skip
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert draws[0] == draws[1] != draws[2]
