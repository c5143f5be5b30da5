"""The callback that writes the report of a run when the run is done."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from tuneforge.errors import TryAgainError
from tuneforge.plugin.declaration import component
from tuneforge.plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from tuneforge.engine.context.run import Run


@component(api=1)
class HTMLReport:
    """Write `report.html` into the run directory when the run is done."""

    @hookimpl
    def run_ended(self, run: Run) -> None:
        """Write the report; a full disk is logged, because the run is done without it."""
        from tuneforge.report.report import write_report  # imports matplotlib

        if run.run_dir is None:
            return
        try:
            write_report(run.run_dir)
        except TryAgainError as error:
            fix = f"free some space, then: tuneforge report {shlex.quote(str(run.run_dir))}"
            run.log(f"warning: the run is done, but {error.what} ({error.why}); {fix}")
