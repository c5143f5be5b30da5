"""Lists of names in messages."""

from collections.abc import Sequence


def abbreviate_names(names: Sequence[str]) -> str:
    """Return the names in quotes; of more than five, the first five and the number of the others."""
    listed = ", ".join(f"'{name}'" for name in names[:5])
    return listed if len(names) <= 5 else f"{listed} and {len(names) - 5} more"
