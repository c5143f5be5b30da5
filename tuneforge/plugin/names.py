"""How class names become the names that users type. No imports beyond `re`: listing plugins pays for this file."""

from __future__ import annotations

import re


def kebab(name: str) -> str:
    """`FreezeThenUnfreeze` -> `freeze-then-unfreeze`, `DigitCNN` -> `digit-cnn`, `WiseFT` -> `wise-ft`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower().replace("_", "-")


def prefix_of(reference: str) -> str:
    """What a repeatable component's options begin with: `ema` for `pkg/ema`, `stay-near` for `module:StayNear`."""
    return kebab(reference.rpartition(":")[2]) if ":" in reference else reference.rpartition("/")[2]
