"""Out-of-memory errors: the pass that failed is repeated with half the samples, on all ranks alike."""

from __future__ import annotations

from typing import Self

import attrs

from tuneforge.engine.context.run import Run
from tuneforge.engine.model.device import is_out_of_memory, root_cause
from tuneforge.engine.model.fsdp import out_of_memory_error
from tuneforge.errors import PluginError


@attrs.define(eq=False)
class CatchOutOfMemory:
    """A `with` block whose out-of-memory error is recorded instead of raised.

    It is entered once per optimizer step, where a generator as context manager costs twice the time of a class.

    Args:
        run: The run; if its model is sharded the error is raised, because the other ranks wait in a collective.
        where: What failed, for the message.
        flag: The flag that limits the samples of a pass, for the message.
        can_halve: False if the pass has a single sample; then the error is raised.
        exhausted: True once the block ran out of memory.
        message: The first line of the error; "" if there was none.

    Raises:
        HaltError: The model is sharded.
    """

    run: Run
    where: str
    flag: str
    can_halve: bool = True
    exhausted: bool = attrs.field(default=False, init=False)
    message: str = attrs.field(default="", init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, (RuntimeError, MemoryError, PluginError)):
            return False
        if not is_out_of_memory(error) or not self.can_halve:
            return False
        if self.run.sharded:
            raise out_of_memory_error(root_cause(error), where=self.where, flag=self.flag) from None
        self.exhausted, self.message = True, str(root_cause(error)).partition("\n")[0]
        return True


def halve(run: Run, size: int, *, minimum: int = 1) -> int:
    """Return half of `size`, rounded up, but at least `minimum`; free unused memory of the device first."""
    run.device.empty_cache()
    return max(minimum, -(-size // 2))
