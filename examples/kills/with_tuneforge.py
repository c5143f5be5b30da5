"""tuneforge: `checkpoint_steps` and `Engine.resume`."""

import json
from pathlib import Path
from typing import Any

from world import BATCH, DECAY, EPOCHS, LR, Ended, Job, Net, samples

import tuneforge as tf
from tuneforge.sklearn import data_from_arrays


class Kept:
    """Keeps the optimizer's state at the end of the run."""

    state: Any = None

    @tf.hookimpl
    def run_ended(self, run: tf.Run) -> None:
        """Keep the state."""
        self.state = run.optimization.state(run.model)


class Tuneforge:
    """Its engine from Python, with the feature cache off, so that every step runs the whole network."""

    name, each_step, freezes, log = "tuneforge", True, True, "epoch"
    records: tuple[str, ...] = ()

    def version(self) -> str:
        """Return the version of the package."""
        return tf.__version__

    def fit(self, net: Net, folder: Path, job: Job, *, resume: bool) -> Ended:
        """Train one phase, or two."""
        kept, (x, y), (x_val, y_val) = Kept(), samples(), samples(24, seed=2)
        common = {"schedule": "cosine", "optimizer": "adamw", "weight_decay": DECAY}
        steps = [tf.Phase("all", epochs=EPOCHS, lr=LR, **common)]
        if job.phases:
            steps = [tf.Phase("head", train="head", epochs=EPOCHS // 2, lr=LR, **common)]
            steps += [tf.Phase("all", epochs=EPOCHS // 2, lr=LR / 2, **common)]
        objects = {
            "data": data_from_arrays(x, y, x_val=x_val, y_val=y_val, x_test=x_val, y_test=y_val),
            "model": tf.Model.from_module(net, head="head"), "strategy": steps, "callbacks": [kept],
        }  # fmt: skip
        if resume:
            engine = tf.Engine.resume(folder, **objects)
        else:
            saving = {"checkpoint_steps": job.interval, "checkpoint_s": 1e9, "keep": job.keep}
            engine = tf.Engine(**objects, **saving, batch_size=BATCH, seed=0, cache="off", page=False, out=folder)
        engine.run()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return Ended(kept.state, [json.loads(line)["epoch"] for line in lines])

    def newest(self, folder: Path) -> Path | None:
        """Return the last checkpoint."""
        return max((folder / "checkpoints").iterdir(), default=None)


def tools() -> list[Tuneforge]:
    """Return the library, if it can be imported."""
    return [Tuneforge()]
