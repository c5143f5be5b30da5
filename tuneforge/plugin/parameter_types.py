"""Parameters that verbs of the command line share: finite numbers, and `--json`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)


class FiniteFloatRange(click.FloatRange):
    """A finite number within bounds; click's own range lets `nan` and `inf` pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a usage error."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def json_option(help: str = "End with one JSON object on standard output.") -> Callable[[Command], Command]:  # noqa: A002
    """The flag `--json`, which every verb has; the function is given it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)
