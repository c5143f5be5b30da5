"""Names that users type, derived from class names, and counted nouns. Imports only `re`, so that help stays fast."""

from __future__ import annotations

import re

OBJECT_PREFIX = "object:"
"""How the recorded name of a component begins that was a Python object, which a run directory does not hold."""


def to_kebab_case(name: str) -> str:
    """Return a class name in kebab case: `FreezeThenUnfreeze` -> `freeze-then-unfreeze`, `DigitCNN` -> `digit-cnn`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower().replace("_", "-")


def option_prefix(reference: str) -> str:
    """Return the option prefix of a repeatable component: `ema` for `pkg/ema`, `my-loss` for `module:MyLoss`."""
    return to_kebab_case(reference.rpartition(":")[2]) if ":" in reference else reference.rpartition("/")[2]


def is_object(name: str) -> bool:
    """Return True if a recorded name stands for a Python object, which a run directory does not hold."""
    return name.startswith(OBJECT_PREFIX)


def format_end(reason: str) -> str:
    """Return why something ended early: a callback asked for it, with its reason."""
    return f"asked for by a callback: {reason}"


def format_count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: `1 epoch`, `2,048 samples`; `plural` is for nouns that do not just add an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
