"""Parameter types that commands share: finite numbers, and `--json`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)


class FiniteFloatRange(click.FloatRange):
    """A finite number within bounds; click's own range accepts `nan` and `inf`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or raise a usage error."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def json_option(help: str = "Print one JSON object on standard output at the end.") -> Callable[[Command], Command]:  # noqa: A002
    """Return the flag `--json` that every command has; its parameter is called `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)
