"""Out-of-memory errors: the pass that failed is repeated with half the samples, on all ranks alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import attrs

from tuneforge.engine.context.run import Run
from tuneforge.engine.model.device import is_out_of_memory, root_cause
from tuneforge.engine.model.fsdp import out_of_memory_error
from tuneforge.errors import PluginError


@attrs.define
class MemoryStatus:
    """Whether a pass ran out of memory.

    Args:
        exhausted: True if it did.
        message: The first line of the error; "" if there was none.
    """

    exhausted: bool = False
    message: str = ""


@contextlib.contextmanager
def catch_out_of_memory(run: Run, *, where: str, flag: str, can_halve: bool = True) -> Iterator[MemoryStatus]:
    """Record an out-of-memory error of the `with` block instead of raising it.

    Args:
        run: The run; if its model is sharded the error is raised, because the other ranks wait in a collective.
        where: What failed, for the message.
        flag: The flag that limits the samples of a pass, for the message.
        can_halve: False if the pass has a single sample; then the error is raised.

    Raises:
        HaltError: The model is sharded.
    """
    status = MemoryStatus()
    try:
        yield status
    except (RuntimeError, MemoryError, PluginError) as error:
        if not is_out_of_memory(error) or not can_halve:
            raise
        if run.sharded:
            raise out_of_memory_error(root_cause(error), where=where, flag=flag) from None
        status.exhausted, status.message = True, str(root_cause(error)).partition("\n")[0]


def halve(run: Run, size: int, *, minimum: int = 1) -> int:
    """Return half of `size`, rounded up, but at least `minimum`; free unused memory of the device first."""
    run.device.empty_cache()
    return max(minimum, -(-size // 2))
