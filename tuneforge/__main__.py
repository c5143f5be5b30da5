"""Entry point of the command line: `tuneforge` and `python -m tuneforge`. `errors.py` documents the exit codes."""

from __future__ import annotations

import errno
import signal
import sys
from types import FrameType

import click

from tuneforge.cli import cli
from tuneforge.errors import TryAgainError, TuneforgeError


class TerminatedError(BaseException):
    """SIGTERM arrived; it derives from BaseException, as KeyboardInterrupt does."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = cli.main([each for each in given if each != "--debug"], prog_name="tuneforge", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return _failed("stopped by Ctrl-C", 130)
    except TerminatedError:
        return _failed("stopped by SIGTERM", 143)
    except Exception as error:  # the last handler: everything becomes a message and a code
        if debug:
            raise
        return _report(error)


def _stop(number: int, frame: FrameType | None) -> None:
    raise TerminatedError


def _report(error: Exception) -> int:
    if isinstance(error, TuneforgeError):
        return _failed("\n".join(error.format_lines()), error.exit_code)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):  # a group alone: its message is its help
        click.echo(error.format_message(), err=True)
        return error.exit_code
    if isinstance(error, click.UsageError):
        return _failed(error.format_message() + _help_hint(error.ctx), 2)
    if isinstance(error, click.ClickException):
        return _failed(error.format_message(), error.exit_code)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        return 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f"'{error.filename}'" if error.filename else "standard output or a temporary file"
        again = "free some space, then repeat the command; a run is resumed with: tuneforge resume RUN"
        return _failed(f"cannot write {place}\n  why:   {error.strerror}\n  do:    {again}", TryAgainError.exit_code)
    return _failed(
        f"{type(error).__name__}: {error}\n  why:   this is a bug in tuneforge or in a plugin\n"
        "  do:    repeat the command with --debug for the traceback, and report it",
        1,
    )


def _help_hint(ctx: click.Context | None) -> str:
    if ctx is None:
        return ""
    chosen = ctx.meta.get("tuneforge.chosen", ())
    return "\n  do:    " + " ".join([ctx.command_path, *(f"--{each.key} {each.name}" for each in chosen), "--help"])


def _failed(message: str, code: int) -> int:
    click.echo(f"error: {message}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
