"""State that changes while a run goes on: what hooks read of the training, and what the engine alone needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor

from tuneforge.engine.context.budget import Budget
from tuneforge.engine.data.workers import Workers
from tuneforge.engine.model.forward_writes import ForwardWrites
from tuneforge.engine.model.freeze_check import FreezeCheck
from tuneforge.plugin.config import RunConfig
from tuneforge.plugin.steps import ComponentSpec, Phase

DEFAULT_EVAL_BATCH_SIZE = 256


@attrs.define(eq=False)
class TrainerState:
    """How far training is. Hooks read these as attributes of `Run`; only the engine changes them.

    Args:
        phase: The phase that trains; None between phases.
        step: Optimizer steps so far, over the whole run.
        epoch: Epochs so far, over the whole run.
        progress: Share of the phase's optimizer steps taken, 0 to 1.
        total_steps: Optimizer steps that the phase may take.
        steps_done: Optimizer steps that the phase has taken.
        history: One entry per epoch: step, epoch, phase, learning rate, training loss and validation metrics.
        eval_split: Name of the split that is being evaluated; None while nothing is evaluated.
    """

    phase: Phase | None = None
    step: int = 0
    epoch: int = 0
    progress: float = 0.0
    total_steps: int = 0
    steps_done: int = 0
    history: list[dict[str, Any]] = attrs.field(factory=list)
    eval_split: str | None = None


@attrs.define(eq=False)
class EngineState:
    """What the engine keeps for itself between steps; no hook needs it.

    Args:
        micro_batch_size: Samples of a training pass; None trains on whole batches. Running out of memory reduces it.
        eval_batch_size: Samples of an evaluation pass. Running out of memory reduces it.
        augmentations: Random transforms of training batches, in the order in which they are applied.
        augment_specs: The name and the options of each of them.
        budget: What the run may spend.
        save: Called with the phase's progress after each step; saves a checkpoint when one is due.
        component_states: State of each component, by its position and name; saved with checkpoints.
        forward_writes: The tensors that the model's forward pass writes to.
        nonfinite_at_start: Names of the tensors that were NaN or Inf when the run began.
        refits: True where the run is refitted at its end.
        is_refit: True while the steps are repeated on training and validation samples.
        strategy_decides: True while code of the strategy runs, from which the test splits are hidden.
        freeze_check: Verifies which tensors the current phase changes; None between phases.
        is_cached: Whether the phase trains on cached features; None until that is decided.
        next_phases: The phases that are known to follow the current strategy step.
        later_features: Features for later phases, by cache key, extracted during the pass of an earlier phase.
        workers: Processes that decode samples; None until the first batch needs them.
        end_requests: What a component asked to end early, `epoch`, `phase` or `run`, with its reason.
    """

    micro_batch_size: int | None
    eval_batch_size: int
    augmentations: tuple[Any, ...] = ()
    augment_specs: tuple[ComponentSpec, ...] = ()
    budget: Budget = attrs.field(factory=Budget)
    save: Callable[[Any], None] = lambda progress: None
    component_states: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    forward_writes: ForwardWrites = ForwardWrites()
    nonfinite_at_start: frozenset[str] = frozenset()
    is_refit: bool = False
    refits: bool = False
    strategy_decides: bool = False
    freeze_check: FreezeCheck | None = None
    is_cached: bool | None = None
    next_phases: tuple[Phase, ...] = ()
    later_features: dict[str, tuple[Tensor, ...]] = attrs.field(factory=dict)
    workers: Workers | None = None
    end_requests: dict[str, str] = attrs.field(factory=dict)

    @classmethod
    def from_config(cls, config: RunConfig) -> EngineState:
        """Return the state of a run that has not begun."""
        return cls(config.micro_batch, config.eval_batch_size or max(DEFAULT_EVAL_BATCH_SIZE, config.batch_size or 0))
