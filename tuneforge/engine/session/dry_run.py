"""The steps of a strategy that are known before any is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import attrs
import torch

from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.build import Parts
from tuneforge.engine.loop.sampling import Draws
from tuneforge.engine.model import device
from tuneforge.engine.model.freezing import select
from tuneforge.engine.model.optimizer import parameter_groups
from tuneforge.engine.session import from_objects as given
from tuneforge.engine.session import messages as story
from tuneforge.engine.session.run_log import brief_of
from tuneforge.plugin.config import RunConfig
from tuneforge.plugin.hooks import Hooks, Member, guarded_steps
from tuneforge.plugin.steps import Phase, Probe, Step


@attrs.frozen
class Plan:
    """What a strategy asks for before it has heard an answer.

    Args:
        steps: In order.
        decides: True where what comes after them is decided from the last one's answer.
    """

    steps: tuple[Step, ...]
    decides: bool


def looked_at(config: RunConfig, members: Iterable[Member], fill_in: Callable[[Run], None]) -> Run:
    """A run with data and model that writes nothing and trains nothing.

    Args:
        config: The run's.
        members: The components that take part.
        fill_in: Adds those that the data asks for.
    """
    run = Run(config=config, folder=None, device=device.choose(config.device), hooks=Hooks())
    for each in members:
        run.hooks.add(each)
    with torch.random.fork_rng(devices=[]):
        run.hooks.provider("data_prepare")
        run.take_data(run.hooks.call.data_prepare(run=run))
        fill_in(run)
        run.reseed()
        run.take_model(given.with_fixed(run.hooks.call.model_adapt(run=run, model=None)))
    return run


def planned(run: Run, checked: Callable[[Any, Member], Step], say: Callable[[str], None]) -> Plan:
    """Ask the run's strategy for its steps: all of a list, of a generator those up to its first `yield`.

    Args:
        run: With data and model.
        checked: Refuses what is no step.
        say: Is told what data and model are.

    Raises:
        SelectorError: A step names parameters that do not exist.
        UnknownNameError: A step names a schedule or an optimizer that is not installed.
    """
    for line in (*story.of_data(run.data), *story.of_model(run.model)):
        say(line)
    member = run.hooks.provider("finetune_strategy")
    asked = run.hooks.call.finetune_strategy(brief=brief_of(run))
    steps = guarded_steps(member, asked)
    listens = hasattr(asked, "send") or inspect.isgeneratorfunction(getattr(type(asked), "__iter__", None))
    known = tuple(checked(step, member) for step in (islice(steps, 1) if listens else steps))
    steps.close()
    for step in known:
        check_ahead(run, step)
    return Plan(known, decides=listens and bool(known))


def check_ahead(run: Run, step: Step) -> None:
    """See that what a step names is there, before an earlier step has cost anything.

    Raises:
        SelectorError: It names parameters that do not exist.
        UnknownNameError: It names a schedule or an optimizer that is not installed.
        OptionError: An option of one of them is wrong.
        DataError: It draws or weighs what the data does not have.
    """
    if isinstance(step, (Phase, Probe)):
        trained = select(run.model, step.train)
    if isinstance(step, Phase):
        Draws.of(run, step)
        parts = Parts(run.config)
        parts.schedule(step)
        parameter_groups(run.model, step, trained, weight_decay=parts.part_of(step).weight_decay)
