"""Named points at which a test can kill, raise or fill the disk; in production they do nothing."""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None
"""What a test sets; it is called with the name of each point that is passed."""


def point(name: str) -> None:
    """Pass a point."""
    if hook is not None:
        hook(name)
