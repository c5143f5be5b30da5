"""One run of a study: a candidate with a seed, executed in any process; its outcome is read from its directory."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from tuneforge import errors
from tuneforge.comparison.candidates import Candidate
from tuneforge.comparison.ranking import FinishedRun
from tuneforge.engine.session.engine import Engine
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.errors import FolderError, StoppedError, TryAgainError, TuneforgeError, UsageError

FAILURE = "failure.json"
"""File in a run directory: the error of the run. A study that is resumed tries the run again."""

COMPONENT_KEYS = ("data", "model", "adapt", "loss", "metrics", "schedule", "optimizer", "augment", "callbacks")
_RELEASE_TIMEOUT_S = 5.0
_ERROR_FIELDS = ("what", "where", "why", "fix")


@attrs.frozen(eq=False)
class Trial:
    """A run of a study.

    Args:
        number: Its index among all runs of the study.
        candidate: The strategy that it runs.
        seed: The seed of the run.
        budget: The budget of the run; None lets it run to its own end.
        run_dir: The run directory.
    """

    number: int
    candidate: Candidate
    seed: int
    budget: str | None
    run_dir: Path

    @property
    def is_settled(self) -> bool:
        """True if the run is done or has failed."""
        return (self.run_dir / FAILURE).exists() or self._is_done()

    @property
    def spent_s(self) -> float:
        """Seconds that the run has taken so far."""
        known = (self.run_dir / names.STATUS).exists()
        return float(names.read_json(self.run_dir / names.STATUS).get("elapsed_s", 0.0)) if known else 0.0

    def attempt(self, engine_options: Mapping[str, Any], execute: Callable[[Engine], object]) -> None:
        """Execute or resume the run; an error of the candidate is written to `failure.json`.

        Args:
            engine_options: Other keywords of `Engine`.
            execute: Runs an engine.

        Raises:
            StoppedError: The run was asked to stop.
            TryAgainError: A fault of the machine, such as a full disk.
            FolderError: The run directory is in use, or cannot be written.
        """
        if self.is_settled:
            return
        self._wait_for_release()
        try:
            execute(self._build_engine(engine_options))
        except (StoppedError, TryAgainError, FolderError):  # not the candidate's fault
            raise
        except Exception as error:  # noqa: BLE001 - any error ends a candidate and not the study
            self.run_dir.mkdir(parents=True, exist_ok=True)
            names.write_json(self.run_dir / FAILURE, _error_to_dict(error, self.run_dir))

    def outcome(self) -> FinishedRun | TuneforgeError:
        """Return the finished run, or the error that ended it, once it is settled.

        Raises:
            FolderError: The report does not hold the monitored metric.
        """
        if (self.run_dir / FAILURE).exists():
            failure = names.read_json(self.run_dir / FAILURE)
            kind: type[TuneforgeError] = getattr(errors, failure["kind"], TuneforgeError)
            return kind(failure["what"], **{key: failure[key] for key in _ERROR_FIELDS[1:]})
        run = FinishedRun.read(self.run_dir)
        return UsageError(f"its {run.monitor} on validation is NaN") if math.isnan(run.value) else run

    def _wait_for_release(self) -> None:
        """Wait a moment until nobody holds the run's directory: decoder processes outlive a killed run shortly."""
        until = time.monotonic() + _RELEASE_TIMEOUT_S
        while self.run_dir.exists() and time.monotonic() < until:
            with contextlib.suppress(FolderError), RunDir(self.run_dir, resume=True):
                return
            time.sleep(0.2)

    def _build_engine(self, engine_options: Mapping[str, Any]) -> Engine:
        if (self.run_dir / names.STATUS).exists() and (self.run_dir / names.RUN).exists():
            parts = {key: value for key, value in engine_options.items() if key in COMPONENT_KEYS}
            return Engine.resume(self.run_dir, strategy=self.candidate.strategy, **parts)
        (self.run_dir / names.RUN).unlink(missing_ok=True)  # killed before its first checkpoint
        own = {"strategy": self.candidate.strategy, "seed": self.seed, "budget": self.budget, "out": self.run_dir}
        return Engine(**{**engine_options, **own})

    def _is_done(self) -> bool:
        is_started = (self.run_dir / names.STATUS).exists() and (self.run_dir / names.RUN).exists()
        return is_started and bool(names.read_json(self.run_dir / names.STATUS)["state"] == "done")


def _error_to_dict(error: Exception, run_dir: Path) -> dict[str, str]:
    """Return an error as the table that `outcome` reads."""
    if isinstance(error, TuneforgeError):
        return {"kind": type(error).__name__, **{key: getattr(error, key) for key in _ERROR_FIELDS}}
    what = f"{type(error).__name__}: {error}"
    why, fix = "this is a bug in tuneforge or in a plugin", f"see {run_dir / names.LOG}"
    return {"kind": "TuneforgeError", "what": what, "where": "", "why": why, "fix": fix}
