"""The test splits as a strategy sees them: unreadable."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import attrs

from tuneforge.engine.data.dataset import Data, Split
from tuneforge.errors import UsageError


class HiddenSplit:
    """A test split of which every use is an error.

    Args:
        name: The name of the split.
    """

    def __init__(self, name: str) -> None:
        self.hidden_name = name

    def __getattr__(self, attribute: str) -> Any:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(
            f"a strategy reads the test split '{self.hidden_name}'",
            why="a choice that has seen the test split makes its metrics too good",
            fix="decide on the results of the steps, or on run.data.val",
        )


def hide_test_splits(data: Data) -> Data:
    """Return the data with test splits that raise `UsageError` when they are read."""
    hidden = {name: cast("Split", HiddenSplit(name)) for name in ("test", *data.extra_test_splits)}
    return attrs.evolve(data, test=hidden.pop("test"), extra_test_splits=hidden)
