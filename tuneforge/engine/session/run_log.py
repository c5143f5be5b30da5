"""Records of a run: its configuration and environment, the model, each epoch, and the hardest samples."""

from __future__ import annotations

import base64
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tuneforge
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Data, Inputs, Split, Targets, named_tensors
from tuneforge.engine.data.fingerprint import describe_split, hash_tensors
from tuneforge.engine.loop.evaluation import evaluate
from tuneforge.engine.loop.head_fit import can_fit_head
from tuneforge.engine.loop.metric_set import HardestSamples
from tuneforge.engine.loop.train_phase import planned_epochs
from tuneforge.engine.model import fsdp
from tuneforge.engine.model.numerics import describe_numerics
from tuneforge.engine.model.weights_file import write_weights
from tuneforge.engine.session import messages
from tuneforge.engine.session.components import describe_member
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.engine.storage.run_files import HARDEST_SAMPLES, METRICS, REPORT, TIMINGS, WEIGHTS
from tuneforge.engine.storage.safetensors_io import get_state_dict
from tuneforge.plugin import registry
from tuneforge.plugin.config import config_to_dict, parse_budget
from tuneforge.plugin.declaration import get_option_values
from tuneforge.plugin.hooks import RegisteredComponent
from tuneforge.plugin.hookspecs import hookimpl
from tuneforge.plugin.results import TaskInfo
from tuneforge.plugin.serialization import to_json

NUM_HARDEST_SAMPLES = 24
_MAX_PROBABILITIES = 100  # classes whose probability is recorded for a hardest sample


class RunLogger:
    """Writes the metrics of each epoch. Times go into a file of their own, so that files of metrics are comparable."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir

    @hookimpl
    def epoch_ended(self, run: Run) -> None:
        """Log the metrics of the epoch and append them to the run directory."""
        entry = dict(run.history[-1])
        if run.engine_state.is_refit:
            run.log(f"  epoch {entry['epoch']}  {entry['seconds']:.1f} s  train loss {entry['train']['loss']:.4f}")
            return
        run.log(messages.format_epoch(entry, planned_epochs(run), run.data.targets.primary_metrics))
        seconds = entry.pop("seconds")
        self._run_dir.append(METRICS, to_json(entry))
        self._run_dir.append(TIMINGS, to_json({"epoch": entry["epoch"], "seconds": seconds}))


def describe_run(run: Run, members: list[tuple[str, RegisteredComponent]]) -> dict[str, Any]:
    """Return the content of `run.json`, which is written once."""
    return {
        "tuneforge": tuneforge.__version__,
        "config": config_to_dict(run.config),
        "components": [describe_member(member, hook) for hook, member in members],
        "environment": {
            "python": platform.python_version(),
            **describe_numerics(run.device.torch),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        },
    }


def build_task_info(run: Run) -> TaskInfo:
    """Return what the strategy is given."""
    return TaskInfo(
        groups=run.model.group_infos(),
        classes=run.data.targets.labels,
        num_train=len(run.data.train),
        num_val=len(run.data.val),
        batch_size=run.batch_size * run.config.grad_accum_steps,
        device=run.device.torch.type,
        seed=run.config.seed,
        monitor=run.data.targets.monitor,
        monitor_mode=run.data.targets.monitor_mode,
        old_classes=run.model.pretrained_labels,
        pretrained=run.model.pretrained,
        can_fit_head=can_fit_head(run),
        sample_groups={name: len(indices) for name, indices in run.data.sample_groups.items()},
        budget=dict([parse_budget(run.config.budget)]) if run.config.budget is not None else {},
    )


def describe_model(run: Run) -> dict[str, Any]:
    """Return what is needed, besides configuration and weights, to use the model without its data."""
    example = run.data.train.fetch(torch.tensor([0]))
    return {
        "head": run.model.head,
        "labels": list(run.model.labels),
        "groups": [{"name": info.name, "parameters": info.num_parameters} for info in run.model.group_infos()],
        "changes": list(run.model.changes),
        "pretrained": run.model.pretrained,
        "frozen_by_user": sorted(run.model.user_frozen),
        "modules": None if run.sharded else describe_modules(run.model.module),
        **describe_data(run.data),
        "input_specs": {
            name: [list(tensor.shape[1:]), str(tensor.dtype)] for name, tensor in named_tensors(example).items()
        },
        "fingerprints": {name: split.fingerprint() for name, split in run.data.splits().items()},
        "notes": list(run.data.notes),
    }


def describe_modules(module: nn.Module) -> list[str]:
    """Return a line for each module: its path, class and options as PyTorch prints them, without addresses in memory.

    Lines are sorted by path, because the order in which modules were registered changes nothing that they compute.
    """
    lines = [f"{path or 'the model'}: {_describe_layer(each)}" for path, each in module.named_modules()]
    return sorted(re.sub(r" at 0x[0-9a-f]+", "", line) for line in lines)


def _describe_layer(module: nn.Module) -> str:
    if type(module).__repr__ is nn.Module.__repr__:
        return f"{type(module).__name__}({module.extra_repr()})"
    return repr(module)


def describe_data(data: Data) -> dict[str, Any]:
    """Return what identifies the data: its two contracts with their options, and hashes of its samples."""
    return {
        "inputs": _describe_component("inputs", data.inputs),
        "targets": _describe_component("targets", data.targets),
        "splits": {name: describe_split(split) for name, split in data.splits().items()},
        "sample_groups": {name: hash_tensors({name: rows}) for name, rows in data.sample_groups.items()},
    }


def write_results(
    run: Run,
    run_dir: RunDir,
    stop_reason: str,
    check_weights: Callable[[str], None],
    refit: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Evaluate every split but the training split; write the weights, `report.json` and the hardest samples.

    `check_weights` is called after the evaluations with a phrase that says so, and raises if a weight has changed.
    `refit` is called after the evaluation of the validation split, on which it trains; it replaces the weights, and
    returns what the report says about it.
    """
    hardest = HardestSamples(NUM_HARDEST_SAMPLES)
    splits, refit_record = {"val": evaluate(run, run.data.val, "val")}, {}
    if refit is not None:
        check_weights("the final evaluation")
        refit_record["refit"] = refit()
    splits["test"] = evaluate(run, run.data.test, "test", hardest=hardest)
    splits |= {name: evaluate(run, split, name) for name, split in run.data.extra_test_splits.items()}
    check_weights("the final evaluation")
    weights = fsdp.gather_state(get_state_dict(run.model.module), keep=run_dir.writable)
    if run_dir.writable:
        write_weights(run_dir.path / WEIGHTS, weights, run.model.module, labels=run.model.labels)
    report: dict[str, Any] = {
        "strategy": run.hooks.get_provider("finetune_strategy").name,
        "stop_reason": stop_reason,
        "monitor": run.data.targets.monitor,
        "primary_metrics": list(run.data.targets.primary_metrics),
        "num_samples": {name: len(split) for name, split in run.data.splits().items()},
        "splits": splits,
        **refit_record,
    }
    if (exhausted_at := run.engine_state.budget.exhausted_at) is not None:
        report["stopped_by_budget"] = exhausted_at[0]
    run_dir.write(REPORT, report)
    run_dir.write(HARDEST_SAMPLES, describe_hardest_samples(run, run.data.test, hardest))
    if refit is not None:
        run.log("note: val metrics are from before the refit, which has trained on val; test metrics are from after it")
    messages.log_lines(run, messages.format_metrics(splits, run.data.targets.primary_metrics))
    return report


def describe_hardest_samples(run: Run, split: Split, hardest: HardestSamples) -> list[dict[str, Any]]:
    """Return the hardest samples for display: id, label, prediction, loss, and the input as an image or as text."""
    if hardest.outputs is None:
        return []
    out = []
    for index, output, loss in zip(hardest.indices.tolist(), hardest.outputs, hardest.losses.tolist(), strict=True):
        stored = split.fetch(torch.tensor([index]))
        sample = {name: tensor[0] for name, tensor in named_tensors(stored).items()}
        shown = sample.get("", sample)
        image = run.data.inputs.render_image(shown)
        label = run.data.targets.describe_label(split.targets[index])
        out.append(
            {
                "id": split.id_of(index),
                "label": label,
                "prediction": _keep_most_probable(run.data.targets.describe(output), label),
                "loss": loss,
                "image": base64.b64encode(image).decode() if image else None,
                "text": None if image else run.data.inputs.render_text(shown),
            }
        )
    return out


def _keep_most_probable(prediction: dict[str, Any], label: str) -> dict[str, Any]:
    """Return a prediction with the probabilities of a few classes only, the label among them, where there are many."""
    probabilities = prediction.get("probabilities")
    if not isinstance(probabilities, Mapping) or len(probabilities) <= _MAX_PROBABILITIES:
        return prediction
    ranked = sorted(probabilities, key=lambda name: probabilities[name] or 0.0, reverse=True)
    kept = dict.fromkeys([*ranked[:_MAX_PROBABILITIES], *([label] if label in probabilities else [])])
    return {**prediction, "probabilities": {name: probabilities[name] for name in kept}}


def _describe_component(group: str, instance: Inputs | Targets) -> dict[str, Any]:
    return {"name": registry.find_entry_of_class(group, type(instance)).name, "options": get_option_values(instance)}
