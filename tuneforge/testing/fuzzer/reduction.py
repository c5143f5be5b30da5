"""Reduce a program that breaks a relation to a small one that still breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs

from tuneforge import Phase
from tuneforge.plugin import ComponentSpec
from tuneforge.testing.fuzzer.program import FuzzProgram

_SMALLEST = FuzzProgram(seed=0)
_PLAIN_FIELDS = ("inputs", "source", "loss", "regression", "strategy", "num_val", "position")


def reduce_program(
    program: FuzzProgram, is_broken: Callable[[FuzzProgram], bool], *, max_trials: int = 200
) -> FuzzProgram:
    """Return a program from which no part can be taken without the relation holding again.

    Args:
        program: A program that breaks the relation.
        is_broken: Tells whether another program breaks it too.
        max_trials: The number of programs to try at most.
    """
    trials = 0
    while True:
        for smaller in _simplify(program):
            if trials == max_trials:
                return program
            trials += 1
            if is_broken(smaller):
                program = smaller
                break
        else:
            return program


def _simplify(program: FuzzProgram) -> Iterator[FuzzProgram]:
    """Yield programs with one part less, large parts first."""
    for field in ("blocks", "traits", "callbacks"):
        values = getattr(program, field)
        for index in range(len(values)):
            yield attrs.evolve(program, **{field: values[:index] + values[index + 1 :]})
    if not isinstance(program.strategy, ComponentSpec) and len(program.strategy) > 1:
        for index in range(len(program.strategy)):
            yield attrs.evolve(program, strategy=program.strategy[:index] + program.strategy[index + 1 :])
    for field in _PLAIN_FIELDS:
        if getattr(program, field) != getattr(_SMALLEST, field):
            yield attrs.evolve(program, **{field: getattr(_SMALLEST, field)})
    for key in program.settings:
        if key != "batch_size":
            yield attrs.evolve(program, settings={k: value for k, value in program.settings.items() if k != key})
    yield from _simplify_phases(program)
    if program.num_train > 4:
        yield attrs.evolve(program, num_train=max(4, program.num_train // 2))
    for index, kind in enumerate(program.blocks):
        if kind != "linear":
            yield attrs.evolve(program, blocks=(*program.blocks[:index], "linear", *program.blocks[index + 1 :]))


def _simplify_phases(program: FuzzProgram) -> Iterator[FuzzProgram]:
    if isinstance(program.strategy, ComponentSpec):
        return
    for index, step in enumerate(program.strategy):
        if isinstance(step, Phase):
            plain = Phase(step.name, train=step.train, epochs=step.epochs, steps=step.steps, lr=step.lr)
            options = [
                each.name for each in attrs.fields(Phase) if getattr(step, each.name) != getattr(plain, each.name)
            ]
            for name in options:
                smaller = attrs.evolve(step, **{name: getattr(plain, name)})
                strategy = (*program.strategy[:index], smaller, *program.strategy[index + 1 :])
                yield attrs.evolve(program, strategy=strategy)
