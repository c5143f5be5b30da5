"""The parts that a run or a step asks for by name: schedules, optimizers, augmentations."""

from __future__ import annotations

from typing import Any

import attrs

from tuneforge.plugin import registry
from tuneforge.plugin.config import RunConfig
from tuneforge.plugin.declaration import build_component
from tuneforge.plugin.steps import ComponentSpec, Phase

_DEFAULT_OPTIMIZER, _DEFAULT_SCHEDULE = ComponentSpec("adamw"), ComponentSpec("constant")


def create_component(group: str, spec: ComponentSpec) -> Any:
    """Find, load and build a part.

    Raises:
        UnknownNameError: Nothing of that name is installed.
        PluginLoadError: It could not be loaded.
        OptionError: An option is wrong.
    """
    entry = registry.find_component(group, spec.name)
    return build_component(registry.load_component(entry), spec.options, where=registry.FLAG_BY_GROUP.get(group, group))


@attrs.define(eq=False)
class PhaseComponents:
    """Which schedule and optimizer a phase gets: what the user says beats the strategy, which beats the default."""

    config: RunConfig
    current_optimizer: ComponentSpec | None = None

    def build_schedule(self, phase: Phase) -> Any:
        """The phase's schedule: an object with `factor(progress)`."""
        return create_component("lr_schedule", self.config.schedule or phase.schedule or _DEFAULT_SCHEDULE)

    def build_optimizer(self, phase: Phase) -> tuple[Any, bool]:
        """The phase's optimizer component, and whether it is the one the phase before used."""
        spec = self._optimizer_spec(phase)
        same = spec == self.current_optimizer
        self.current_optimizer = spec
        return create_component("optimizer", spec), same

    def peek_optimizer(self, phase: Phase) -> Any:
        """The optimizer component that a phase would get; nothing is remembered."""
        return create_component("optimizer", self._optimizer_spec(phase))

    def _optimizer_spec(self, phase: Phase) -> ComponentSpec:
        return self.config.optimizer or phase.optimizer or self.current_optimizer or _DEFAULT_OPTIMIZER
