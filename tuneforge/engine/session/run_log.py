"""What a run writes down: the configuration and environment, the model, each epoch, the worst mistakes."""

from __future__ import annotations

import base64
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import tuneforge
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Inputs, Split, Targets, tensors_of
from tuneforge.engine.loop.metric_set import Worst
from tuneforge.engine.session import from_objects as given
from tuneforge.engine.session import messages as story
from tuneforge.engine.storage import run_dir as folder
from tuneforge.engine.storage.run_dir import RunFolder
from tuneforge.plugin import registry
from tuneforge.plugin.component import values_of
from tuneforge.plugin.config import as_table, budget_of
from tuneforge.plugin.hooks import Member
from tuneforge.plugin.hookspecs import hookimpl
from tuneforge.plugin.results import Brief
from tuneforge.plugin.serialization import to_json

MISTAKES_KEPT = 24
SAME_BITS = ("torch", "threads", "machine", "cpu", "device")


class Keeper:
    """Writes each epoch's figures, once; times go into a file of their own, so that figures compare to the bit."""

    def __init__(self, place: RunFolder) -> None:
        self._place = place

    @hookimpl
    def epoch_ended(self, run: Run) -> None:
        """Write and say the epoch's numbers."""
        entry = dict(run.history[-1])
        run.note(story.of_epoch(entry, run.data.targets.headline))
        seconds = entry.pop("seconds")
        self._place.append(folder.METRICS, to_json(entry))
        self._place.append(folder.TIMINGS, to_json({"epoch": entry["epoch"], "seconds": seconds}))


def describe_run(run: Run, members: list[tuple[str, Member]]) -> dict[str, Any]:
    """The content of `run.json`: never changed after it is written."""
    return {
        "tuneforge": tuneforge.__version__,
        "config": as_table(run.config),
        "components": [given.recorded(member, group) for group, member in members],
        "environment": {**describe_environment(run), "command": [Path(sys.argv[0]).name, *sys.argv[1:]]},
    }


def describe_environment(run: Run) -> dict[str, Any]:
    """What the bits of a run depend on beside its configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": str(run.device.torch),
    }


def brief_of(run: Run) -> Brief:
    """What the strategy is told."""
    return Brief(
        groups=run.model.group_infos(),
        classes=run.data.targets.labels,
        num_train=len(run.data.train),
        num_val=len(run.data.val),
        batch_size=run.config.batch_size * run.config.accumulate,
        device=run.device.torch.type,
        seed=run.config.seed,
        monitor=run.data.targets.monitor,
        monitor_mode=run.data.targets.monitor_mode,
        old_classes=run.model.kept,
        pools={name: len(rows) for name, rows in run.data.pools.items()},
        budget=dict([budget_of(run.config.budget)]) if run.config.budget is not None else {},
    )


def describe_model(run: Run) -> dict[str, Any]:
    """What is needed, beside the configuration and the weights, to use the model without its data."""
    example = run.data.train.fetch(torch.tensor([0]))
    return {
        "head": run.model.head,
        "labels": list(run.model.labels),
        "groups": [{"name": info.name, "parameters": info.num_parameters} for info in run.model.group_infos()],
        "changes": list(run.model.changes),
        "inputs": _part_record("inputs", run.data.inputs),
        "targets": _part_record("targets", run.data.targets),
        "stored": {name: [list(tensor.shape[1:]), str(tensor.dtype)] for name, tensor in tensors_of(example).items()},
        "fingerprints": {name: split.fingerprint() for name, split in run.data.splits().items()},
        "notes": list(run.data.notes),
    }


def mistakes(run: Run, split: Split, worst: Worst) -> list[dict[str, Any]]:
    """The worst mistakes for people: what it was, what the model said, and the input as a picture or a line."""
    if worst.outputs is None:
        return []
    out = []
    for row, output, wrongness in zip(worst.rows.tolist(), worst.outputs, worst.wrongness.tolist(), strict=True):
        stored = split.fetch(torch.tensor([row]))
        sample = {name: tensor[0] for name, tensor in tensors_of(stored).items()}
        shown = sample.get("", sample)
        picture = run.data.inputs.picture(shown)
        out.append(
            {
                "id": split.id_of(row),
                "truth": run.data.targets.truth(split.targets[row]),
                "answer": run.data.targets.describe(output),
                "wrongness": wrongness,
                "picture": base64.b64encode(picture).decode() if picture else None,
                "text": None if picture else run.data.inputs.text(shown),
            }
        )
    return out


def _part_record(group: str, instance: Inputs | Targets) -> dict[str, Any]:
    return {"name": registry.entry_for(group, type(instance)).name, "options": values_of(instance)}
