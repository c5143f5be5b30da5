"""tuneforge on a job: the default run, or another strategy."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from peer_methods import Job, Predictions

import tuneforge as tf
from tuneforge.sklearn import data_from_arrays

DEFAULT = "tuneforge"

STRATEGIES = ("lp-ft", "full", "head-only", "adaptive", "auto")
"""Strategies that can be measured besides the default, as `tuneforge:NAME`."""


def tuneforge_default(job: Job, **settings: Any) -> Predictions:
    """Run the engine with its defaults; the training and validation splits are those that the peers get."""
    (x, y), (x_val, y_val), (x_test, y_test) = (
        job.pairs(rows) for rows in (job.rows.train, job.rows.val, job.rows.test)
    )
    names = [str(each) for each in range(len(job.tensors.classes))]
    data = data_from_arrays(x, y, x_val=x_val, y_val=y_val, x_test=x_test, y_test=y_test, names=names)
    model = tf.Model.from_module(job.network(), head="head")
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        tf.Engine(data=data, model=model, seed=job.seed, page=False, out=out, **settings).run()
        outputs = tf.load(out).predict_outputs(list(x_test))
        return np.array([int(logits.argmax()) for logits in outputs])
