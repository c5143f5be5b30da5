"""Ctrl-C and SIGTERM in a program of Python: the run saves a checkpoint before the signal takes its usual effect."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

from tuneforge.errors import StoppedError

_DEFAULT_HANDLERS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class StopRequest(Protocol):
    """Asks a run to stop, as `Engine.stop` does."""

    def __call__(self, reason: str, *, exit_code: int) -> bool:
        """Make the run raise `StoppedError` once it has saved a checkpoint; False if there is nothing to save yet."""


@contextlib.contextmanager
def save_on_signals(request_stop: StopRequest) -> Iterator[None]:
    """Ask for a stop at the first signal; once the run has stopped, or is done, the signal takes its usual effect.

    Ctrl-C then raises `KeyboardInterrupt`, and SIGTERM ends the process. A second signal, and one before there is
    anything to save, take effect at once. A handler that the program has set stays, and so does everything in a thread
    other than the main one, which gets no signals.

    Args:
        request_stop: Called with the name of the signal.
    """
    in_main = threading.current_thread() is threading.main_thread()
    replaced = [number for number, each in _DEFAULT_HANDLERS.items() if in_main and signal.getsignal(number) == each]
    received: list[int] = []

    def restore() -> None:
        for each in replaced:
            if signal.getsignal(each) is handle:
                signal.signal(each, _DEFAULT_HANDLERS[each])

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        if request_stop("Ctrl-C" if number == signal.SIGINT else "SIGTERM", exit_code=128 + number):
            received.append(number)
        else:
            signal.raise_signal(number)

    message = "Ctrl-C"
    for number in replaced:
        signal.signal(number, handle)
    try:
        yield
    except StoppedError as error:
        if not received:
            raise
        message = str(error)
    finally:
        restore()
    if signal.SIGINT in received:
        raise KeyboardInterrupt(message)
    if received:
        signal.raise_signal(received[0])
