"""The metrics of all components of a run as one metric object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuneforge.errors import PluginError
from tuneforge.plugin.names import to_kebab_case

_PLAIN_TYPES = frozenset({int, float, str, bool, type(None)})


class MergedMetrics:
    """The metrics of several components as one metric object, each name once.

    Args:
        owned: Each metric object with the label of the component that returned it.

    Raises:
        PluginError: A component returned something else than a metric object.
    """

    def __init__(self, owned: list[tuple[str, Any]]) -> None:
        for owner, metrics in owned:
            if not (hasattr(metrics, "update") and hasattr(metrics, "compute")):
                raise PluginError(
                    f"{owner} returned {type(metrics).__name__}, which is not a metric object",
                    why="evaluate(run) must return an object with update(outputs, targets) and compute()",
                )
        self._owned = owned

    def update(self, outputs: Any, targets: Any) -> None:
        """Pass a batch to every metric object."""
        for _, metrics in self._owned:
            metrics.update(outputs, targets)

    def compute(self) -> dict[str, Any]:
        """Return all metrics as plain data.

        Raises:
            PluginError: Two components compute a metric of the same name.
        """
        values: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for owner, metrics in self._owned:
            for name, value in _named_metrics(metrics).items():
                if name in values:
                    raise PluginError(
                        f"the metric '{name}' comes from two components",
                        where=f"{owners[name]} and {owner}",
                        why="a report can hold a metric only once",
                        fix="name one of the two with --metrics",
                    )
                values[name], owners[name] = to_plain(value), owner
        return values


def to_plain(value: Any) -> Any:
    """Convert tensors and numpy values to plain numbers and lists; return everything else unchanged."""
    if type(value) in _PLAIN_TYPES:  # the fast way out: with thousands of classes there are tens of thousands of these
        return value
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
