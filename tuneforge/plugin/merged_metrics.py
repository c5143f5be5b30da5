"""The metrics of all components of a run as one accumulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuneforge.errors import PluginError
from tuneforge.plugin.names import to_kebab_case


class MergedMetrics:
    """The metrics of all components as one, each figure once.

    Args:
        owned: Each accumulator with the label of the component that gave it.

    Raises:
        PluginError: A component gave something that is no accumulator.
    """

    def __init__(self, owned: list[tuple[str, Any]]) -> None:
        for owner, metrics in owned:
            if not (hasattr(metrics, "update") and hasattr(metrics, "compute")):
                raise PluginError(
                    f"{owner} gave {type(metrics).__name__}, which is no accumulator of figures",
                    why="evaluate(run) must return an object with update(outputs, targets) and compute()",
                )
        self._owned = owned

    def update(self, outputs: Any, targets: Any) -> None:
        """Pass a batch to every accumulator."""
        for _, metrics in self._owned:
            metrics.update(outputs, targets)

    def compute(self) -> dict[str, Any]:
        """All figures as plain data.

        Raises:
            PluginError: Two components give the same figure.
        """
        figures: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for owner, metrics in self._owned:
            for name, value in _named_metrics(metrics).items():
                if name in figures:
                    raise PluginError(
                        f"the figure '{name}' comes from two components",
                        where=f"{owners[name]} and {owner}",
                        why="a report can hold it only once",
                        fix="name one of the two with --metrics",
                    )
                figures[name], owners[name] = to_plain(value), owner
        return figures


def to_plain(value: Any) -> Any:
    """Tensors and numpy values as plain numbers and lists; everything else as it is."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _named_metrics(metrics: Any) -> dict[str, Any]:
    computed = metrics.compute()
    return (
        dict(computed)
        if isinstance(computed, Mapping)
        else {to_kebab_case(type(metrics).__name__).replace("-", "_"): computed}
    )
