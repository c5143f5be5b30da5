"""One run of a race: an entrant with a seed, done by whichever process takes it; its folder says what came of it."""

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
"""In a run's folder: what ended the entrant. A race that is asked for again tries anew."""

COMPONENT_KEYS = ("data", "model", "adapt", "loss", "metrics", "schedule", "optimizer", "augment", "callbacks")
_RELEASE_TIMEOUT_S = 5.0
_ERROR_FIELDS = ("what", "where", "why", "fix")


@attrs.frozen(eq=False)
class Trial:
    """A run that a race asks for.

    Args:
        number: Its place among all that the race may ask for; no two have the same.
        candidate: Who runs.
        seed: Of the run.
        budget: What it may spend; None: it runs to its own end.
        run_dir: Its folder.
    """

    number: int
    candidate: Candidate
    seed: int
    budget: str | None
    run_dir: Path

    @property
    def is_settled(self) -> bool:
        """True where it is done, or has failed."""
        return (self.run_dir / FAILURE).exists() or self._is_done()

    @property
    def spent_s(self) -> float:
        """Seconds that it took, as far as it came."""
        known = (self.run_dir / names.STATUS).exists()
        return float(names.read_json(self.run_dir / names.STATUS).get("elapsed_s", 0.0)) if known else 0.0

    def attempt(self, engine_options: Mapping[str, Any], execute: Callable[[Engine], object]) -> None:
        """Do it, or go on with it; whatever goes wrong and is the entrant's fault is written down.

        Args:
            engine_options: What the engine takes besides.
            execute: Runs an engine.

        Raises:
            StoppedError: It was asked to stop.
            TryAgainError: The disk is full, say.
            FolderError: Its folder is in use, or cannot be written.
        """
        if self.is_settled:
            return
        self._wait_for_release()
        try:
            execute(self._build_engine(engine_options))
        except (StoppedError, TryAgainError, FolderError):  # not the entrant's fault
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends an entrant and not the race
            self.run_dir.mkdir(parents=True, exist_ok=True)
            names.write_json(self.run_dir / FAILURE, _error_to_dict(error, self.run_dir))

    def outcome(self) -> FinishedRun | TuneforgeError:
        """What came of it, once it is settled.

        Raises:
            FolderError: It has no figure to judge it by.
        """
        if (self.run_dir / FAILURE).exists():
            told = names.read_json(self.run_dir / FAILURE)
            kind: type[TuneforgeError] = getattr(errors, told["kind"], TuneforgeError)
            return kind(told["what"], **{key: told[key] for key in _ERROR_FIELDS[1:]})
        run = FinishedRun.read(self.run_dir)
        return UsageError(f"its {run.monitor} on validation is no number") if math.isnan(run.value) else run

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
        (self.run_dir / names.RUN).unlink(missing_ok=True)  # killed before anything was done
        own = {"strategy": self.candidate.strategy, "seed": self.seed, "budget": self.budget, "out": self.run_dir}
        return Engine(**{**engine_options, **own})

    def _is_done(self) -> bool:
        begun = (self.run_dir / names.STATUS).exists() and (self.run_dir / names.RUN).exists()
        return begun and bool(names.read_json(self.run_dir / names.STATUS)["state"] == "done")


def _error_to_dict(error: Exception, run_dir: Path) -> dict[str, str]:
    """An error as `outcome` makes it again."""
    if isinstance(error, TuneforgeError):
        return {"kind": type(error).__name__, **{key: getattr(error, key) for key in _ERROR_FIELDS}}
    what = f"{type(error).__name__}: {error}"
    why, fix = "this is a defect of tuneforge or of a plugin", f"see {run_dir / names.LOG}"
    return {"kind": "TuneforgeError", "what": what, "where": "", "why": why, "fix": fix}
