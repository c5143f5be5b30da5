"""One run of a race: an entrant with a seed, done by whichever process takes it; its folder says what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from tuneforge import errors
from tuneforge.comparison.candidates import Entrant
from tuneforge.comparison.ranking import Finished
from tuneforge.engine.session.engine import Engine
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import FolderError, StoppedError, TryAgainError, TuneforgeError, UsageError

FAILURE = "failure.json"
"""In a run's folder: what ended the entrant. A race that is asked for again tries anew."""

PARTS = ("data", "model", "adapt", "step", "evaluate", "schedule", "optimizer", "augment", "extensions")
_TOLD = ("what", "where", "why", "fix")


@attrs.frozen(eq=False)
class Trial:
    """A run that a race asks for.

    Args:
        number: Its place among all that the race may ask for; no two have the same.
        entrant: Who runs.
        seed: Of the run.
        budget: What it may spend; None: it runs to its own end.
        path: Its folder.
    """

    number: int
    entrant: Entrant
    seed: int
    budget: str | None
    path: Path

    @property
    def settled(self) -> bool:
        """True where it is done, or has failed."""
        return (self.path / FAILURE).exists() or self._done()

    @property
    def spent_s(self) -> float:
        """Seconds that it took, as far as it came."""
        known = (self.path / names.STATUS).exists()
        return float(names.read_json(self.path / names.STATUS).get("spent_s", 0.0)) if known else 0.0

    def attempt(self, given: Mapping[str, Any], execute: Callable[[Engine], object]) -> None:
        """Do it, or go on with it; whatever goes wrong and is the entrant's fault is written down.

        Args:
            given: What the engine takes besides.
            execute: Runs an engine.

        Raises:
            StoppedError: It was asked to stop.
            TryAgainError: The disk is full, say.
            FolderError: Its folder is in use, or cannot be written.
        """
        try:
            execute(self._engine(given))
        except (StoppedError, TryAgainError, FolderError):  # not the entrant's fault
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends an entrant and not the race
            self.path.mkdir(parents=True, exist_ok=True)
            names.write_json(self.path / FAILURE, _told(error, self.path))

    def outcome(self) -> Finished | TuneforgeError:
        """What came of it, once it is settled.

        Raises:
            FolderError: It has no figure to judge it by.
        """
        if (self.path / FAILURE).exists():
            told = names.read_json(self.path / FAILURE)
            kind: type[TuneforgeError] = getattr(errors, told["kind"], TuneforgeError)
            return kind(told["what"], **{key: told[key] for key in _TOLD[1:]})
        run = Finished.read(self.path)
        return UsageError(f"its {run.monitor} on validation is no number") if math.isnan(run.value) else run

    def _engine(self, given: Mapping[str, Any]) -> Engine:
        if (self.path / names.STATUS).exists() and (self.path / names.RUN).exists():
            parts = {key: value for key, value in given.items() if key in PARTS}
            return Engine.resume(self.path, strategy=self.entrant.strategy, **parts)
        (self.path / names.RUN).unlink(missing_ok=True)  # killed before anything was done
        own = {"strategy": self.entrant.strategy, "seed": self.seed, "budget": self.budget, "out": self.path}
        return Engine(**{**given, **own})

    def _done(self) -> bool:
        begun = (self.path / names.STATUS).exists() and (self.path / names.RUN).exists()
        return begun and bool(names.read_json(self.path / names.STATUS)["state"] == "done")


def _told(error: Exception, path: Path) -> dict[str, str]:
    """An error as `outcome` makes it again."""
    if isinstance(error, TuneforgeError):
        return {"kind": type(error).__name__, **{key: getattr(error, key) for key in _TOLD}}
    what = f"{type(error).__name__}: {error}"
    why, fix = "this is a defect of tuneforge or of a plugin", f"see {path / names.LOG}"
    return {"kind": "TuneforgeError", "what": what, "where": "", "why": why, "fix": fix}
