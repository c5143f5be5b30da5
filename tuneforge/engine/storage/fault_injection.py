"""Named points in the code at which a test can kill the process, raise, or fill the disk; without a test they do
nothing."""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None
"""Set by a test; called with the name of each point that the run passes."""


def point(name: str) -> None:
    """Call the test's hook, if there is one."""
    if hook is not None:
        hook(name)
