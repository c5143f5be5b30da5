"""One rank of `engine/context/test_distributed.py`: `python one_rank.py FOLDER OUT PLAN`.

PLAN is JSON: `stop` is the optimizer step after which the process dies, 0 for never; `resume` resumes; `spoil` is a
step whose loss is NaN on the last rank; `full` is a step at which the last rank's memory runs out.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import blobs
from torch import nn

import tuneforge as tf
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import ClassTargets
from tuneforge.engine.feature_cache import build as feature_cache_build
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.exporting import save_tensors

torch.set_num_threads(1)
feature_cache_build.MIN_MACS_PER_BYTE = feature_cache_build.MIN_MACS_PER_BYTE_ON_DISK = 0.0
feature_cache_build.MACS_PER_TRACED_MODULE = dict.fromkeys(feature_cache_build.MACS_PER_TRACED_MODULE, 0.0)

STRATEGY = [
    tf.Phase("head", train="head", epochs=2, lr=0.02, optimizer=tf.use("sgd", momentum=0.9)),
    tf.HeadFit("fit"),
    tf.Phase("all", train="all", epochs=2, lr=0.02, optimizer=tf.use("sgd", momentum=0.9), restore_best=True),
]


class Net(nn.Module):
    """A network without norm and dropout, and with an unused branch, as auxiliary heads are: (b, 8) -> (b, 3)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs))


@tf.component(api=1)
class Notes:
    """Records the samples of each step, and the weights at the end of each phase."""

    folder: str = tf.option(help="Where.")

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        seen = {"step": run.step, "rank": run.process_group.rank, "rows": batch.indices.tolist()}
        loss, outputs = yield
        with (Path(self.folder) / f"seen-{run.process_group.rank}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")
        plan = PLAN if run.process_group.rank == run.process_group.world_size - 1 else {}
        if plan.get("spoil") == run.step:
            return loss * float("nan"), outputs
        if plan.get("full") == run.step and len(batch.indices) > 20:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return loss, outputs

    @tf.hookimpl
    def phase_ended(self, run):
        if run.process_group.is_main:
            path = Path(self.folder) / f"{run.phase.name}.safetensors"
            save_tensors(dict(run.model.module.state_dict()), path, metadata={})


def objects(folder):
    torch.manual_seed(0)
    data = tf.Data(
        train=blobs(290, seed=1), val=blobs(31, seed=2), test=blobs(31, seed=3), inputs=TensorInputs(),
        targets=ClassTargets(names=("a", "b", "c")),
    )  # fmt: skip
    return {"data": data, "model": Net(), "strategy": STRATEGY, "callbacks": [Notes(folder=folder)]}


def main():
    folder, out = sys.argv[1:3]
    if PLAN.get("stop"):

        def die(point):
            if point == "step-saved" and die.left == 1:
                os._exit(9)
            die.left -= point == "step-saved"

        die.left = PLAN["stop"]
        faults.point = die
    if PLAN.get("resume"):
        engine = tf.Engine.resume(out, **objects(folder))
    else:
        settings = {"batch_size": 96, "checkpoint_s": 0.0, "page": False, "on_nan": PLAN.get("on_nan", "halt")}
        engine = tf.Engine(**objects(folder), **settings, out=out)
    engine.run()


PLAN = json.loads(sys.argv[3])
main()
