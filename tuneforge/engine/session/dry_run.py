"""The steps of a strategy that are known before any is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import islice
from typing import Any

import attrs

from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.phase_components import PhaseComponents
from tuneforge.engine.loop.sampling import SamplingWeights
from tuneforge.engine.model.freezing import select
from tuneforge.engine.model.optimizer import parameter_groups
from tuneforge.engine.session import messages
from tuneforge.engine.session.run_log import build_task_info
from tuneforge.plugin.hooks import RegisteredComponent, iterate_strategy
from tuneforge.plugin.steps import Diagnosis, Phase, StrategyStep


@attrs.frozen
class DryRun:
    """What a strategy asks for before it has heard an answer.

    Args:
        strategy_steps: In order.
        depends_on_results: True where what comes after them is decided from the last one's answer.
    """

    strategy_steps: tuple[StrategyStep, ...]
    depends_on_results: bool


def collect_known_steps(
    run: Run, check_step_type: Callable[[Any, RegisteredComponent], StrategyStep], log: Callable[[str], None]
) -> DryRun:
    """Ask the run's strategy for its steps: all of a list, of a generator those up to its first `yield`.

    Args:
        run: With data and model.
        check_step_type: Refuses what is no step.
        log: Is told what data and model are.

    Raises:
        SelectorError: A step names parameters that do not exist.
        UnknownNameError: A step names a schedule or an optimizer that is not installed.
    """
    for line in (*messages.format_data(run.data), *messages.format_model(run.model)):
        log(line)
    member = run.hooks.get_provider("finetune_strategy")
    steps_or_generator = run.hooks.call.finetune_strategy(task=build_task_info(run))
    steps = iterate_strategy(member, steps_or_generator)
    listens = hasattr(steps_or_generator, "send") or inspect.isgeneratorfunction(
        getattr(type(steps_or_generator), "__iter__", None)
    )
    known = tuple(check_step_type(step, member) for step in (islice(steps, 1) if listens else steps))
    steps.close()
    for step in known:
        validate_step(run, step)
    return DryRun(known, depends_on_results=listens and bool(known))


def validate_step(run: Run, step: StrategyStep) -> None:
    """See that what a step names is there, before an earlier step has cost anything.

    Raises:
        SelectorError: It names parameters that do not exist.
        UnknownNameError: It names a schedule or an optimizer that is not installed.
        OptionError: An option of one of them is wrong.
        DataError: It draws or weighs what the data does not have.
    """
    if isinstance(step, (Phase, Diagnosis)):
        trainable = select(run.model, step.train)
    if isinstance(step, Phase):
        SamplingWeights.from_phase(run, step)
        components = PhaseComponents(run.config)
        components.build_schedule(step)
        parameter_groups(run.model, step, trainable, weight_decay=components.peek_optimizer(step).weight_decay)
