"""One rank of `engine/model/test_fsdp.py`: `python one_shard.py FOLDER PLANS` executes one plan after the other.

PLANS is JSON, plans by name: `settings` of the engine; `optimizer` and its `arguments`; `callbacks` by name; `strategy`
by name, or `steps` between the two phases; `net`, of this file; `stop`, the optimizer step after which the run ends as
if it had been killed, or `kill`, after which the process is; `resume`; `spoil` and `full`, the steps at which the loss
of the last rank is NaN, and its memory runs out.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import blobs
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tuneforge as tf
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import ClassTargets
from tuneforge.engine.context.distributed import ProcessGroup
from tuneforge.engine.model.fsdp import gather_state, local_shard
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.exporting import save_tensors


class Block(nn.Module):
    """A residual block with a norm: (b, 12) -> (b, 12)."""

    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.back = nn.LayerNorm(12), nn.Linear(12, 21), nn.Linear(21, 12)

    def forward(self, x):
        return x + self.back(nn.functional.gelu(self.wide(self.norm(x))))


class Net(nn.Module):
    """Residual blocks, a scalar parameter, and a branch that is never used: (b, 8) -> (b, 3)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(12, 3)

    def forward(self, inputs):
        x = self.stem(inputs)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)


class Tied(Net):
    """The two blocks share a matrix."""

    def __init__(self):
        super().__init__()
        self.blocks[1].wide.weight = self.blocks[0].wide.weight


class Borrowing(Net):
    """The stem's weights are used without calling the stem."""

    def forward(self, inputs):
        x = inputs @ self.stem.weight.T
        return self.head(self.blocks[1](self.blocks[0](x)) * self.scale)


class Normed(Net):
    """BatchNorm after the stem."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12))


NETS = {"net": Net, "tied": Tied, "borrowing": Borrowing, "normed": Normed}


class Killed(BaseException):
    """Ends the run as a kill does."""


@tf.component(api=1)
class Notes:
    """Records the full weights after each optimizer step, and how much this rank holds at the end of each phase."""

    folder: str = tf.option(help="Where.")
    spoil: int = tf.option(default=-1, help="Step whose loss is NaN, on the last rank.")
    full: int = tf.option(default=-1, help="Step at which the last rank's memory runs out.")

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        loss, outputs = yield
        last = run.process_group.rank == run.process_group.world_size - 1
        if last and run.step == self.full:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return loss * float("nan") if last and run.step == self.spoil else loss, outputs

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run):
        result = yield
        weights = gather_state(run.model.module.state_dict(), keep=run.process_group.is_main)
        if run.process_group.is_main:
            save_tensors(weights, Path(self.folder) / f"{run.step + 1:03d}.safetensors", metadata={})
        return result

    @tf.hookimpl
    def phase_ended(self, run):
        tensors = [*run.model.module.parameters()]
        tensors += [each for kept in run.optimization.optimizer.state.values() for each in kept.values() if each.ndim]
        held = sum(local_shard(each).numel() for each in tensors)
        whole = sum(each.numel() for each in tensors)
        (Path(self.folder) / f"held-{run.phase.name}-{run.process_group.rank}.json").write_text(
            json.dumps([held, whole])
        )


def strategy(plan):
    if "strategy" in plan:
        return plan["strategy"]
    optimizer = tf.use(plan.get("optimizer", "adamw"), **plan.get("arguments", {}))
    between = {
        "fit": tf.HeadFit("fit"),
        "blend": tf.WeightAverage("blend", snapshots=("start", "head")),
        "gradients": tf.Diagnosis("gradients", measure="gradients", train="all"),
        "rates": tf.Diagnosis("rates", measure="lrs", train="head"),
        "features": tf.Diagnosis("features", measure="features"),
    }
    return [
        tf.Phase("head", train="head", epochs=1, lr=0.02, optimizer=optimizer),
        *(between[name] for name in plan.get("steps", ())),
        tf.Phase("all", train="all", epochs=2, lr=0.02, optimizer=optimizer, lr_scales={"stem": 0.5, "scale": 0.1},
                 layer_decay=0.8, weight_decay=0.05, restore_best=True),
    ]  # fmt: skip


def objects(folder, plan):
    torch.manual_seed(0)
    data = tf.Data(
        train=blobs(194, seed=1), val=blobs(31, seed=2), test=blobs(31, seed=3), inputs=TensorInputs(),
        targets=ClassTargets(names=("a", "b", "c")),
    )  # fmt: skip
    labels = ("a", "b", "c") if "strategy" in plan else ()
    model = tf.Model.from_module(NETS[plan.get("net", "net")](), head="head", labels=labels)
    notes = Notes(folder=str(folder), spoil=plan.get("spoil", -1), full=plan.get("full", -1))
    return {
        "data": data,
        "model": model,
        "strategy": strategy(plan),
        "callbacks": [notes, *plan.get("callbacks", ())],
    }


def work(folder, plan):
    """Execute one plan in its directory; write the error that ends the run, if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    end = plan.get("stop") or plan.get("kill")
    steps = 0
    plain = faults.point

    def point(name):
        nonlocal steps
        steps += name == "step-saved"
        if name == "step-saved" and steps == end:
            if "kill" in plan:
                os._exit(9)
            raise Killed

    faults.point = point if end else plain
    try:
        if plan.get("resume"):
            tf.Engine.resume(folder / "run", **objects(folder, plan)).run()
        else:
            settings = {"batch_size": 96, "checkpoint_s": 0.0 if end else 60.0, "page": False, "shard": True}
            tf.Engine(**objects(folder, plan), **settings | plan.get("settings", {}), out=folder / "run").run()
    except (tf.TuneforgeError, Killed) as error:
        (folder / f"error-{os.environ.get('RANK', '0')}.txt").write_text(str(error))
    finally:
        faults.point = plain


def reductions():
    """Return what FSDP2 makes of a gradient of 1 on each rank, by default and with the engine's settings."""
    ProcessGroup.from_env()
    found = []
    for sums in (False, True):
        unit = fully_shard(nn.Linear(1, 4, bias=False), mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
        if sums:
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
        unit(torch.ones(1, 1)).sum().backward()
        found.append(unit.weight.grad.full_tensor().unique().tolist())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ["WORLD_SIZE"] != "1":
        (Path(sys.argv[1]) / f"reductions-{os.environ['RANK']}.json").write_text(json.dumps(reductions()))
    for name, plan in json.loads(sys.argv[2]).items():
        work(Path(sys.argv[1]) / name, plan)
