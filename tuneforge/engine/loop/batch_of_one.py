"""Training passes of a single sample, which a norm layer that needs batch statistics cannot take."""

from __future__ import annotations

import torch
from torch import nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.loader import batch_sizes
from tuneforge.engine.data.tensor_tree import map_inputs
from tuneforge.engine.model.freezing import compute_modes, freeze
from tuneforge.engine.model.inspection import preserve_state
from tuneforge.engine.model.model import NORMS, call_module
from tuneforge.engine.model.modes import Modes, set_modes
from tuneforge.errors import UsageError
from tuneforge.plugin.steps import Phase


def check_batch_of_one(run: Run, phase: Phase, trainable: list[str]) -> None:
    """Check that a phase can train the model on a single sample, if the run has passes of one.

    Args:
        run: A run with data and model.
        phase: The phase.
        trainable: Names of the parameters that it trains.

    Raises:
        UsageError: A norm layer needs more than one sample.
    """
    setting = _setting_of_one(run)
    if not setting:
        return
    with preserve_state(run.model.module):
        freeze(run.model, trainable)
        modes = compute_modes(run.model, run.example, batchnorm_stats=phase.batchnorm_stats)
        failed = _failed_norm(run, modes)
    if failed:
        path, error = failed
        raise UsageError(
            f"a batch of one sample cannot train the norm layer '{path}'",
            where=f"{setting}, phase '{phase.name}'",
            why=error,
            fix="use a larger batch size and micro-batch (2 or more), freeze the norm layer, or use GroupNorm",
        )


def _setting_of_one(run: Run) -> str:
    """Return the setting that leads to training passes of one sample, or ""."""
    count, world_size, micro_batch = len(run.data.train), run.process_group.world_size, run.config.micro_batch
    sizes = batch_sizes(count, run.batch_size)
    smallest = max(1, min(sizes[0], sizes[-1]) // world_size)
    if smallest == 1:
        setting = f"--batch-size {run.batch_size}"
        return f"{setting}, {world_size} processes" if world_size > 1 else setting if count > 1 else "1 training sample"
    return "--micro-batch 1" if micro_batch == 1 else ""


def _failed_norm(run: Run, modes: Modes) -> tuple[str, str] | None:
    """Return the norm layer at which a pass of one sample fails, with the error; None if it does not."""
    module, entered = run.model.module, [""]
    names: dict[nn.Module, str] = {each: name for name, each in module.named_modules() if isinstance(each, NORMS)}

    def enter(norm: nn.Module, args: object) -> None:
        entered.append(names[norm])

    handles = [norm.register_forward_pre_hook(enter) for norm in names]
    try:
        with preserve_state(module), torch.no_grad():
            set_modes(modes)
            call_module(module, map_inputs(run.example, lambda tensor: tensor[:1]))
    except ValueError as error:
        if str(error).startswith("Expected more than 1 "):  # from functional.batch_norm and instance_norm
            return entered[-1] or "of a function", str(error).partition("\n")[0]
        return None
    except Exception:  # noqa: BLE001 - in training the model may need more than inputs; training itself will tell
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None
