import copy
import pickle  # noqa: TID251 - as multiprocessing sends objects

import numpy as np
import pytest
import torch
from tiny import TinyNet, tiny_data, tiny_net

import tuneforge as tf

INPUTS = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    phase = tf.Phase("all", epochs=1)
    return tf.Engine(data=tiny_data(), model=tiny_net(), strategy=phase, page=False, out=out).run().run_dir


@pytest.mark.parametrize("make_copy", [lambda each: pickle.loads(pickle.dumps(each)), copy.deepcopy])
def test_copy_of_a_predictor_predicts_and_evaluates_alike(run_dir, make_copy):
    predictor = tf.load(run_dir, model=tiny_net())
    again = make_copy(predictor)
    assert again.model.module is not predictor.model.module
    assert all(map(torch.equal, predictor.predict_outputs(INPUTS), again.predict_outputs(INPUTS)))
    assert list(predictor.predict(INPUTS)) == list(again.predict(INPUTS))
    again.with_data(tiny_data())
    assert len(pickle.loads(pickle.dumps(again)).run.data.train) == 2  # data is not sent


def test_predictor_whose_module_cannot_be_pickled_says_to_load_it_in_the_other_process(run_dir):
    class Local(TinyNet):
        pass

    with pytest.raises(tf.UsageError, match="load it there: tuneforge.load"):
        pickle.dumps(tf.load(run_dir, model=Local()))


def test_gradient_mode_of_the_caller_is_untouched_between_predictions(run_dir):
    outputs = tf.load(run_dir, model=tiny_net()).predict_outputs(INPUTS)
    next(outputs)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
