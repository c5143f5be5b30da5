"""The strategy loop: execute the steps that a strategy yields, and send it their results."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from typing import Any

from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.diagnosis import diagnose
from tuneforge.engine.loop.head_fit import fit_head
from tuneforge.engine.loop.nonfinite import check_finite_weights
from tuneforge.engine.loop.train_phase import train_phase
from tuneforge.engine.loop.weight_average import average_weights
from tuneforge.engine.model.modes import ModuleFlags
from tuneforge.engine.model.module_state import full_state
from tuneforge.engine.session import messages
from tuneforge.engine.session.dry_run import validate_step
from tuneforge.engine.session.resume import ResumeState
from tuneforge.errors import PluginError, TuneforgeError, UsageError
from tuneforge.plugin.hooks import RegisteredComponent, iterate_strategy
from tuneforge.plugin.names import format_end
from tuneforge.plugin.results import AnyStrategyStepResult
from tuneforge.plugin.steps import Diagnosis, HeadFit, Phase, StrategyStep, WeightAverage

_STEP_TYPES = (Phase, HeadFit, Diagnosis, WeightAverage)


def run_strategy(run: Run, resume_state: ResumeState) -> str:
    """Execute the strategy's steps one after the other, and send each result back to the strategy.

    In a resumed run the steps that were completed before are replayed: the strategy gets their logged results, and
    must ask for the same steps again.

    Returns:
        The reason why it ended, if the strategy or the budget gives one; else "".
    """
    member, budget = run.hooks.get_provider("finetune_strategy"), run.engine_state.budget
    assert resume_state.task is not None
    with _hidden_test_splits(run):
        steps_or_generator = run.hooks.call.finetune_strategy(task=resume_state.task)
    planned = steps_or_generator if isinstance(steps_or_generator, (list, tuple)) else ()
    for number, step in enumerate(planned, start=1):
        validate_step(run, check_step_type(step, member))
        _check_names(step, ("start", *(each.name for each in planned[: number - 1])), member)
        run.log(f"plan: {messages.format_step(step, f'{number}/{len(planned)}')}")
    if planned:
        resume_state.check_plan(tuple(planned))
    steps = iterate_strategy(member, steps_or_generator)
    result: AnyStrategyStepResult | None = None
    number = 0
    while True:
        num_completed = budget.completed_steps = len(resume_state.completed_steps)
        is_next = number == num_completed and resume_state.phase_state is None
        if is_next and (exhausted := budget.check_exhausted(run)):
            run.log(f"stopping: {exhausted}")
            _close(run, steps, member)
            return "the budget was spent"
        if is_next and (reason := run.agree_on_ends().get("run")):
            run.log(f"stopping: {format_end(reason)}")
            _close(run, steps, member)
            return format_end(reason)
        try:
            with _hidden_test_splits(run):
                step = check_step_type(steps.send(result), member)
        except StopIteration as end:
            resume_state.check_next_step(number, None)
            if end.value:
                run.log(f"strategy ended: {end.value}")
            return str(end.value or "")
        number += 1
        if number <= num_completed:
            result = resume_state.replay_step(number - 1, step)
            continue
        resume_state.check_next_step(number - 1, step)
        _check_names(step, resume_state.snapshot_names, member)
        run.log(messages.format_step(step, f"{number}/{len(planned)}" if planned else ""))
        if step.why:
            run.log(f"  reason: {step.why}")
        later_phases = itertools.takewhile(lambda each: isinstance(each, Phase), planned[number:])
        run.engine_state.next_phases = tuple(later_phases)
        run.hooks.call.strategy_step_started(run=run, step=step)
        result = _execute_step(run, step, resume_state)
        check_finite_weights(run, f"the end of step '{step.name}'")
        run.process_group.broadcast(list(full_state(run.model.module).values()))
        messages.log_lines(run, messages.format_step_result(result))
        resume_state.add_step_result(step, result)
        run.hooks.call.strategy_step_ended(run=run, step=step, result=result)


@contextlib.contextmanager
def _hidden_test_splits(run: Run) -> Iterator[None]:
    run.engine_state.strategy_decides = True
    try:
        yield
    finally:
        run.engine_state.strategy_decides = False


def _close(run: Run, steps: Generator[Any, Any, str], member: RegisteredComponent) -> None:
    """End a strategy early; what its cleanup asks for or raises must not cost the run its report."""
    try:
        with _hidden_test_splits(run):
            steps.close()
    except TuneforgeError as error:
        why = error.why or str(error)
        run.log(f"warning: {member.label} did not end cleanly: {why}; its further steps are not executed")


def _execute_step(run: Run, step: StrategyStep, resume_state: ResumeState) -> AnyStrategyStepResult:
    """Execute a step; afterwards `requires_grad` is as it was before.

    A matrix product rounds otherwise where a weight requires a gradient, even under `no_grad`, so an evaluation after a
    phase must not depend on whether this process has trained it or has resumed after it.
    """
    flags = ModuleFlags.capture(run.model.module)
    result = _dispatch_step(run, step, resume_state)
    flags.restore(with_modes=False)
    return result


def _dispatch_step(run: Run, step: StrategyStep, resume_state: ResumeState) -> AnyStrategyStepResult:
    phase_state, resume_state.phase_state = resume_state.phase_state, None
    if isinstance(step, Phase):
        return train_phase(run, step, resume_state.components, phase_state)
    if isinstance(step, HeadFit):
        return fit_head(run, step)
    if isinstance(step, Diagnosis):
        return diagnose(run, step, resume_state.components)
    return average_weights(run, step, resume_state.snapshots)


def check_step_type(step: Any, member: RegisteredComponent) -> StrategyStep:
    """Return `step`, or raise `PluginError` if it is not a strategy step."""
    if type(step) not in _STEP_TYPES:
        raise PluginError(
            f"{member.label} asked for {step!r:.80}, which is no step",
            why=f"steps are {', '.join(kind.__name__ for kind in _STEP_TYPES)}",
            fix="yield each step by itself" if isinstance(step, (list, tuple)) else "",
        )
    return step  # type: ignore[no-any-return]  # just checked


def _check_names(step: StrategyStep, earlier: tuple[str, ...], member: RegisteredComponent) -> None:
    """Check that the name of a step is new, and that the snapshots that it asks for are among the earlier ones."""
    if step.name in earlier:
        raise PluginError(
            f"{member.label} names two steps '{step.name}'",
            why="reports and WeightAverage refer to a step by its name; 'start' is taken",
            fix="give each step its own name",
        )
    for name in step.snapshots if isinstance(step, WeightAverage) else ():
        if name not in earlier:
            raise UsageError(
                f"there is no snapshot '{name}'", where=f"step '{step.name}'", fix=f"known: {', '.join(earlier)}"
            )
