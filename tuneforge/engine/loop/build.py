"""The parts that a run or a step asks for by name: schedules, optimizers, augmentations."""

from __future__ import annotations

from typing import Any

import attrs

from tuneforge.plugin import registry
from tuneforge.plugin.component import build
from tuneforge.plugin.config import RunConfig
from tuneforge.plugin.steps import Phase, Use

_DEFAULT_OPTIMIZER, _DEFAULT_SCHEDULE = Use("adamw"), Use("constant")


def part(group: str, use: Use) -> Any:
    """Find, load and build a part.

    Raises:
        UnknownNameError: Nothing of that name is installed.
        PluginLoadError: It could not be loaded.
        OptionError: An option is wrong.
    """
    entry = registry.find(group, use.name)
    return build(registry.load(entry), use.options, where=registry.FLAGS.get(group, group))


@attrs.define(eq=False)
class Parts:
    """Which schedule and optimizer a phase gets: what the user says beats the strategy, which beats the default."""

    config: RunConfig
    present: Use | None = None

    def schedule(self, phase: Phase) -> Any:
        """The phase's schedule: an object with `factor(progress)`."""
        return part("lr_schedule", self.config.schedule or phase.schedule or _DEFAULT_SCHEDULE)

    def optimizer(self, phase: Phase) -> tuple[Any, bool]:
        """The phase's optimizer component, and whether it is the one the phase before used."""
        asked = self._asked(phase)
        same = asked == self.present
        self.present = asked
        return part("optimizer", asked), same

    def part_of(self, phase: Phase) -> Any:
        """The optimizer component that a phase would get; nothing is remembered."""
        return part("optimizer", self._asked(phase))

    def _asked(self, phase: Phase) -> Use:
        return self.config.optimizer or phase.optimizer or self.present or _DEFAULT_OPTIMIZER
