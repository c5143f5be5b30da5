"""The model store: numbered versions of each name, a pointer to the champion, and a log of how it came to be.

`STORE/NAME/1/`, `STORE/NAME/2/`, ... are bundles, never changed; `champion.json` names one of them and is replaced as
a whole; `log.jsonl` only grows. A number is written to the log before it is used, so none is used twice, whatever is
deleted. The pointer is switched last: whatever is killed before, the old champion answers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.run_dir import RUN, STATUS
from tuneforge.errors import FolderError, TryAgainError, UsageError, suggest_name
from tuneforge.exporting import fsync_path, publish, read_json, write_json
from tuneforge.exporting.bundle import BUNDLE, CHAMPION, InferenceModel, load_bundle

LOG = "log.jsonl"
CHALLENGER_DIR = ".challenger"
"""Where a challenger is written, in the folder of its name, before it has a number."""

_LOCK = ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NUMBER = re.compile(r"[1-9]\d*")


class ModelRegistry:
    """The versions of one name in a store.

    Args:
        root: The store's folder.
        name: Of the model.

    Raises:
        UsageError: The name cannot be a folder's.
    """

    def __init__(self, root: str | Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"'{name}' cannot be a model's name",
                where="--name",
                why="it is part of addresses and of paths",
                fix="use letters, digits, '.', '_' and '-', and begin with a letter or a digit",
            )
        self.root, self.name = Path(root), name
        self.path = self.root / name

    @property
    def champion(self) -> int | None:
        """The number of the version that answers; None before the first."""
        if not (self.path / CHAMPION).exists():
            return None
        number: int = read_json(self.path / CHAMPION)["version"]
        return number

    def versions(self) -> list[int]:
        """The numbers of the versions that are there, rising."""
        if not self.path.is_dir():
            return []
        return sorted(int(each.name) for each in self.path.iterdir() if _NUMBER.fullmatch(each.name) and each.is_dir())

    def version_dir(self, number: int | None = None) -> Path:
        """The folder of a version, or of the champion.

        Raises:
            FolderError: There is none.
        """
        number = self.champion if number is None else number
        if number is None or number not in self.versions():
            raise FolderError(
                f"'{self.name}' has no version {number}" if number is not None else f"'{self.name}' has no champion",
                where=str(self.path),
                why=f"there are: {', '.join(map(str, self.versions())) or 'none'}",
                fix="see them: tuneforge models list",
            )
        return self.path / str(number)

    def load(self, number: int | None = None, *, backend: str = "auto", device_name: str = "auto") -> InferenceModel:
        """A version, or the champion, ready to answer.

        Raises:
            FolderError: There is none, or it is broken.
        """
        folder = self.version_dir(number)
        return load_bundle(folder, backend=backend, device_name=device_name, name=self.name, version=folder.name)

    def read_events(self) -> list[dict[str, Any]]:
        """Every line of the log; one that a kill cut off is passed over."""
        if not (self.path / LOG).exists():
            return []
        events = []
        for line in (self.path / LOG).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
        return events

    def count_uses(self, fingerprint: str) -> int:
        """How often the test set of that fingerprint has been used to decide."""
        decisions = [event["decision"] for event in self.read_events() if "decision" in event]
        test_sets = [test_set for decision in decisions for test_set in decision["test_sets"].values()]
        return sum(test_set["fingerprint"] == fingerprint for test_set in test_sets)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one promotion; what a killed one left is cleared away.

        Raises:
            FolderError: Another process holds it, or the place cannot be written, or it lies in the folder of a run or
                of a bundle.
        """
        self._require_separate_dir()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("a+")
        except OSError as error:
            raise FolderError(f"cannot write '{self.path}'", where="--store", why=error.strerror or "") from error
        with lock:  # closing it releases it; the kernel does so for a process that died
            self._acquire_lock(lock.fileno())
            self._clean_up()
            yield

    def register(self, bundle_dir: Path, about: Mapping[str, Any]) -> int:
        """Make a sealed bundle the next version and the champion; the store is locked.

        Args:
            bundle_dir: The bundle, on the store's file system; it is moved.
            about: What the log keeps of it: the run, the decision.
        """
        known = [*self.versions(), *(event["version"] for event in self.read_events() if "version" in event)]
        number = 1 + max(known, default=0)
        self.log_event("reserved", version=number)
        faults.point("store.reserved")
        publish(bundle_dir, self.path / str(number))
        faults.point("store.placed")
        self._set_champion(number, "promoted", about)
        return number

    def rollback(self, to: int | None = None) -> int:
        """Make an earlier version the champion again: by default the one before.

        Raises:
            FolderError: There is no such version, or it is broken.
            HaltError: It no longer answers as it did.
        """
        with self.lock():
            number = self._previous_champion() if to is None else to
            if number == self.champion:
                raise UsageError(f"version {number} of '{self.name}' is the champion already", where="--to")
            self.load(number).verify()
            self._set_champion(number, "rolled back", {})
        return number

    def log_event(self, event: str, **about: Any) -> None:
        """Add a line to the log, and see it on the disk.

        Raises:
            TryAgainError: The disk is full.
        """
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **about})
        try:
            with (self.path / LOG).open("ab+") as file:
                if file.tell() and not _ends_with_newline(file.fileno(), file.tell()):
                    line = "\n" + line
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            fsync_path(self.path)
        except OSError as error:
            raise TryAgainError(
                f"cannot write '{self.path / LOG}'", why=error.strerror or str(error), fix="free some space"
            ) from error

    def _require_separate_dir(self) -> None:
        """See that a new store is not made where a run's or a bundle's own files are."""
        place = self.root.absolute()
        for each in () if self.path.is_dir() else (place, *place.parents):
            kinds = {"bundle": (BUNDLE,), "run": (RUN, STATUS)}
            found = [kind for kind, files in kinds.items() if all((each / file).is_file() for file in files)]
            if found:
                raise FolderError(
                    f"'{self.root}' lies in the folder of a {found[0]}, so it cannot be a store",
                    where="--store",
                    why=f"'{each}' holds a {found[0]}, which is moved, sealed or deleted as a whole",
                    fix="name a folder of its own, such as models",
                )

    def _set_champion(self, number: int, event: str, about: Mapping[str, Any]) -> None:
        """Log it, then switch the pointer."""
        self.log_event(event, version=number, previous_champion=self.champion, **about)
        faults.point("store.logged")
        write_json(self.path / CHAMPION, {"version": number, "previous": self.champion})
        fsync_path(self.path)
        faults.point("store.pointed")

    def _previous_champion(self) -> int:
        previous: int | None = read_json(self.path / CHAMPION)["previous"] if self.champion is not None else None
        if previous is None:
            raise UsageError(
                f"'{self.name}' has no champion before the present one", where=str(self.path), fix="name one with --to"
            )
        return previous

    def _clean_up(self) -> None:
        """Clear away what a killed promotion left, and say in the log that it did not take effect."""
        for each in self.path.glob(".*"):
            if each.is_dir():
                shutil.rmtree(each)
        switched = [
            event for event in self.read_events() if event["event"] in ("promoted", "rolled back", "interrupted")
        ]
        if switched and switched[-1]["event"] != "interrupted" and switched[-1]["version"] != self.champion:
            self.log_event("interrupted", version=switched[-1]["version"])

    def _acquire_lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 100, 0).decode(errors="replace") or "another process"
            raise FolderError(
                f"'{self.path}' is in use", where="--store", why=f"{holder} is promoting", fix="wait for it"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())


def list_models(root: str | Path) -> list[ModelRegistry]:
    """The models of a store, sorted by name.

    Raises:
        FolderError: There is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FolderError(f"there is no store '{root}'", where="--store", fix="tuneforge promote RUN makes one")
    return [ModelRegistry(root, each.name) for each in sorted(root.iterdir()) if (each / LOG).is_file()]


def find_model(root: str | Path, name: str) -> ModelRegistry:
    """The versions of a name that a store has.

    Raises:
        FolderError: The store has no such name.
    """
    known = [store.name for store in list_models(root)]
    if name not in known:
        raise FolderError(f"the store has no model '{name}'", where=str(root), fix=suggest_name(name, known))
    return ModelRegistry(root, name)


def _ends_with_newline(descriptor: int, size: int) -> bool:
    return os.pread(descriptor, 1, size - 1) == b"\n"
