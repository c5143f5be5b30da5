"""The exceptions of tuneforge, with the exit codes of the command line.

::

    TuneforgeError                    1   base class of all errors
    ├── UsageError                    2   the request itself is wrong
    │   ├── UnknownNameError          2   no component, option or key has that name
    │   ├── OptionError               2   an option's value has the wrong type or range
    │   └── SelectorError             2   a selector matches no parameter
    ├── PluginError                   1   a plugin raised an error or violated the plugin API
    │   └── PluginLoadError           2   a plugin could not be imported or does not fit its hook
    ├── DataError                    65   the data cannot be used as it is
    ├── MissingDependencyError       69   an optional package is not installed
    ├── HaltError                    70   the run halted (NaN or Inf, a failed freeze check)
    ├── FolderError                  73   a directory is in use, missing or not writable
    ├── TryAgainError                75   a temporary fault, such as a full disk
    ├── StoppedError            130, 143   Ctrl-C or SIGTERM; a checkpoint is saved for `tuneforge resume`
    └── UnsafeFileError              77   a file that could execute code or has another format than it claims

A message has four parts: what went wrong, where, why, and what to do about it.
"""

from __future__ import annotations

import copyreg
import difflib
import enum
import os
from collections.abc import Iterable
from typing import Any

__all__ = [
    "DataError",
    "ExitCode",
    "FolderError",
    "HaltError",
    "MissingDependencyError",
    "OptionError",
    "PluginError",
    "PluginLoadError",
    "SelectorError",
    "StoppedError",
    "TryAgainError",
    "TuneforgeError",
    "UnknownNameError",
    "UnsafeFileError",
    "UsageError",
    "escape_name",
    "suggest_name",
]


class ExitCode(enum.IntEnum):
    """Exit codes of the command line; those of errors are in the tree above."""

    OK = 0
    DEFECT = 1
    USAGE = 2
    TARGET_MISSED = 3
    """The command completed, but a metric is below its minimum or the gate refused the model."""
    BAD_DATA = 65
    MISSING_DEPENDENCY = 69
    HALTED = 70
    DIRECTORY = 73
    TRY_AGAIN = 75
    UNSAFE_FILE = 77
    INTERRUPTED = 130
    TERMINATED = 143


class TuneforgeError(Exception):
    """Base class of the errors that tuneforge raises.

    Args:
        what: One sentence that quotes the bad value.
        where: The flag, file, key or plugin.
        why: The violated rule or the cause.
        fix: What to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException would call `__init__` with `args` alone, which a keyword without default does not allow.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def __str__(self) -> str:
        """Return all four parts on one line, as tracebacks and logs show them."""
        parts = (self.what, f"at {self.where}" if self.where else "", self.why, self.fix)
        return "; ".join(part for part in parts if part)

    def format_lines(self) -> list[str]:
        """Return the four parts as the terminal shows them, one per line."""
        labelled = (("where", self.where), ("why", self.why), ("do", self.fix))
        return [self.what, *(f"  {label + ':':<7}{text}" for label, text in labelled if text)]


class UsageError(TuneforgeError):
    """The request is wrong: a flag, a file or an argument."""

    exit_code = 2


class UnknownNameError(UsageError):
    """No component, option or key has that name."""


class OptionError(UsageError):
    """The value of an option has the wrong type or range."""


class SelectorError(UsageError):
    """A selector matches no parameter of the model."""


class PluginError(TuneforgeError):
    """A plugin raised an error or violated the plugin API."""


class PluginLoadError(PluginError):
    """A plugin could not be imported, or does not fit its hook."""

    exit_code = 2


class DataError(TuneforgeError):
    """The data cannot be used as it is."""

    exit_code = 65


class MissingDependencyError(TuneforgeError):
    """A required optional package is not installed."""

    exit_code = 69


class HaltError(TuneforgeError):
    """The run halted, because its results would have been wrong."""

    exit_code = 70


class FolderError(TuneforgeError):
    """A directory is in use, missing or not writable."""

    exit_code = 73


class TryAgainError(TuneforgeError):
    """A temporary fault of the machine, such as a full disk."""

    exit_code = 75


class StoppedError(TuneforgeError):
    """The run saved a checkpoint and stopped, because of Ctrl-C or SIGTERM.

    Args:
        what: One sentence.
        exit_code: 130 for Ctrl-C, 143 for SIGTERM.
        fix: How to resume.
    """

    def __init__(self, what: str, *, exit_code: int, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.exit_code = exit_code


class UnsafeFileError(TuneforgeError):
    """A file that could execute code, or that has another format than it claims."""

    exit_code = 77


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the known name nearest to `name`, or lists the known names."""
    names = {each.casefold(): each for each in sorted(set(known))}
    near = difflib.get_close_matches(name.casefold(), names, n=1)
    if near:
        return f"did you mean '{names[near[0]]}'?"
    more = f" and {len(names) - 40} more" if len(names) > 40 else ""
    return f"known: {', '.join(list(names.values())[:40])}{more}" if names else "there are none"


def escape_name(name: str | bytes | os.PathLike[str]) -> str:
    """Return a name with undecodable bytes and control characters escaped, so that it can be printed."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
