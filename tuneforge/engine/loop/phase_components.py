"""Components without hooks: schedules, optimizers and augmentations; and which of them a phase uses."""

from __future__ import annotations

from typing import Any

import attrs

from tuneforge.plugin import registry
from tuneforge.plugin.config import RunConfig
from tuneforge.plugin.declaration import build_component
from tuneforge.plugin.steps import ComponentSpec, Phase

_DEFAULT_OPTIMIZER, _DEFAULT_SCHEDULE = ComponentSpec("adamw"), ComponentSpec("constant")


def create_component(group: str, spec: ComponentSpec) -> Any:
    """Find, load and build a component that implements no hooks.

    Args:
        group: The entry-point group after `tuneforge.`, such as `optimizer`.
        spec: Its name and options.

    Raises:
        UnknownNameError: No component of that name is installed.
        PluginLoadError: The component could not be loaded.
        OptionError: An option is wrong.
    """
    entry = registry.find_component(group, spec.name)
    return build_component(registry.load_component(entry), spec.options, where=registry.FLAG_BY_GROUP.get(group, group))


@attrs.define(eq=False)
class PhaseComponents:
    """Builds the schedule and the optimizer of each phase: the user's choice, else the strategy's, else the default.

    Args:
        config: The configuration of the run.
        current_optimizer: The optimizer of the previous phase; None before the first.
    """

    config: RunConfig
    current_optimizer: ComponentSpec | None = None

    def build_schedule(self, phase: Phase) -> Any:
        """Return the schedule of a phase: an object with `factor(progress)`."""
        return create_component("lr_schedule", self.config.schedule or phase.schedule or _DEFAULT_SCHEDULE)

    def build_optimizer(self, phase: Phase) -> tuple[Any, bool]:
        """Return the optimizer component of a phase, and whether it is that of the previous phase."""
        spec = self._optimizer_spec(phase)
        same = spec == self.current_optimizer
        self.current_optimizer = spec
        return create_component("optimizer", spec), same

    def peek_optimizer(self, phase: Phase) -> Any:
        """Return the optimizer component that a phase would use, without recording it as the current one."""
        return create_component("optimizer", self._optimizer_spec(phase))

    def _optimizer_spec(self, phase: Phase) -> ComponentSpec:
        return self.config.optimizer or phase.optimizer or self.current_optimizer or _DEFAULT_OPTIMIZER
