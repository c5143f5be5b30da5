"""The model registry: numbered versions of each model, a pointer to the champion, and an event log.

`REGISTRY/NAME/1/`, `REGISTRY/NAME/2/`, ... are bundles that never change; `champion.json` names one of them and is
replaced atomically; `log.jsonl` only grows. A number is logged before it is used, so none is used twice, even after a
version is deleted. The pointer is switched last: if a promotion is killed before, the old champion stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuneforge.errors import FolderError, TryAgainError, UsageError, suggest_name
from tuneforge.exporting import (
    BUNDLE,
    InferenceModel,
    fsync_path,
    is_run_dir,
    load_bundle,
    publish,
    read_json,
    write_json,
)

CHAMPION = "champion.json"
"""The file that names the champion's version."""

LOG = "log.jsonl"
CHALLENGER_DIR = ".challenger"
"""The directory of a challenger, beside the versions, before it has a number."""

fault_hook: Callable[[str], None] | None = None
"""Called at the points where a promotion may be interrupted; a test sets it to interrupt one there."""

_LOCK = ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NUMBER = re.compile(r"[1-9]\d*")


class ModelRegistry:
    """The versions of one model in a registry.

    Args:
        root: The directory of the registry.
        name: The name of the model.

    Raises:
        UsageError: The name cannot be the name of a directory.
    """

    def __init__(self, root: str | Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"'{name}' cannot be the name of a model",
                where="--name",
                why="the name is part of URLs and paths",
                fix="use letters, digits, '.', '_' and '-', and start with a letter or a digit",
            )
        self.root, self.name = Path(root), name
        self.path = self.root / name

    @property
    def champion(self) -> int | None:
        """The number of the champion; None before the first promotion."""
        if not (self.path / CHAMPION).exists():
            return None
        number: int = read_json(self.path / CHAMPION)["version"]
        return number

    def versions(self) -> list[int]:
        """Return the numbers of the versions, sorted."""
        if not self.path.is_dir():
            return []
        return sorted(int(each.name) for each in self.path.iterdir() if _NUMBER.fullmatch(each.name) and each.is_dir())

    def version_dir(self, number: int | None = None) -> Path:
        """Return the directory of a version, or of the champion.

        Raises:
            FolderError: There is no such version, or no champion.
        """
        number = self.champion if number is None else number
        if number is None or number not in self.versions():
            raise FolderError(
                f"'{self.name}' has no version {number}" if number is not None else f"'{self.name}' has no champion",
                where=str(self.path),
                why=f"its versions are: {', '.join(map(str, self.versions())) or 'none'}",
                fix="list them: tuneforge models list",
            )
        return self.path / str(number)

    def load(self, number: int | None = None, *, backend: str = "auto", device_name: str = "auto") -> InferenceModel:
        """Load a version, or the champion, for inference.

        Raises:
            FolderError: There is no such version, or it is broken.
        """
        version_dir = self.version_dir(number)
        version = version_dir.name
        return load_bundle(version_dir, backend=backend, device_name=device_name, name=self.name, version=version)

    def read_events(self) -> list[dict[str, Any]]:
        """Return the events of the log, without a last line that was cut off when a process was killed."""
        if not (self.path / LOG).exists():
            return []
        events = []
        for line in (self.path / LOG).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
        return events

    def count_uses(self, fingerprint: str) -> int:
        """Return how often the test set with this fingerprint has been used for a decision."""
        decisions = [event["decision"] for event in self.read_events() if "decision" in event]
        test_sets = [test_set for decision in decisions for test_set in decision["test_sets"].values()]
        return sum(test_set["fingerprint"] == fingerprint for test_set in test_sets)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the model for one promotion, and remove what a killed promotion left.

        Raises:
            FolderError: Another process holds the lock, or the directory cannot be written, or it lies inside a run or
                a bundle.
        """
        self._require_separate_dir()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("a+")
        except OSError as error:
            raise FolderError(f"cannot write '{self.path}'", where="--registry", why=error.strerror or "") from error
        with lock:  # closing the file releases the lock, as the kernel does when a process dies
            self._acquire_lock(lock.fileno())
            self._clean_up()
            yield

    def register(self, bundle_dir: Path, about: Mapping[str, Any]) -> int:
        """Make a bundle the next version and the champion. Call it inside `lock`.

        Args:
            bundle_dir: The bundle, on the file system of the registry; it is moved.
            about: What the event contains: the run and the decision.
        """
        known = [*self.versions(), *(event["version"] for event in self.read_events() if "version" in event)]
        number = 1 + max(known, default=0)
        self.log_event("reserved", version=number)
        _pass_fault_point("registry.reserved")
        publish(bundle_dir, self.path / str(number))
        _pass_fault_point("registry.published")
        self._set_champion(number, "promoted", about)
        return number

    def rollback(self, version: int | None = None) -> int:
        """Make an earlier version the champion again; by default the previous champion.

        Returns:
            The number of the version.

        Raises:
            FolderError: There is no such version, or it is broken.
            HaltError: Its outputs differ from the reference outputs.
        """
        with self.lock():
            number = self._previous_champion() if version is None else version
            if number == self.champion:
                raise UsageError(f"version {number} of '{self.name}' is already the champion", where="--version")
            self.load(number).verify()
            self._set_champion(number, "rolled back", {})
        return number

    def log_event(self, event: str, **about: Any) -> None:
        """Append an event to the log durably.

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
        """Check that a new registry does not lie inside a run or a bundle."""
        root = self.root.absolute()
        for each in () if self.path.is_dir() else (root, *root.parents):
            kind = "bundle" if (each / BUNDLE).is_file() else "run" if is_run_dir(each) else None
            if kind is not None:
                raise FolderError(
                    f"'{self.root}' lies inside a {kind}, so it cannot be a registry",
                    where="--registry",
                    why=f"'{each}' is a {kind}, which is moved or deleted as a whole",
                    fix="choose another directory, such as models",
                )

    def _set_champion(self, number: int, event: str, about: Mapping[str, Any]) -> None:
        """Log the event, then switch the pointer."""
        self.log_event(event, version=number, previous_champion=self.champion, **about)
        _pass_fault_point("registry.logged")
        write_json(self.path / CHAMPION, {"version": number, "previous": self.champion})
        fsync_path(self.path)
        _pass_fault_point("registry.switched")

    def _previous_champion(self) -> int:
        previous: int | None = read_json(self.path / CHAMPION)["previous"] if self.champion is not None else None
        if previous is None:
            raise UsageError(
                f"'{self.name}' has no previous champion", where=str(self.path), fix="choose a version with --version"
            )
        return previous

    def _clean_up(self) -> None:
        """Remove what a killed promotion left, and log that it did not take effect."""
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
                f"'{self.path}' is locked", where="--registry", why=f"{holder} is promoting", fix="wait for it"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())


def list_models(root: str | Path) -> list[ModelRegistry]:
    """List the models of a registry, sorted by name.

    Raises:
        FolderError: There is no such directory.
    """
    root = Path(root)
    if not root.is_dir():
        fix = "create it: tuneforge promote RUN"
        raise FolderError(f"there is no model registry '{root}'", where="--registry", fix=fix)
    return [ModelRegistry(root, each.name) for each in sorted(root.iterdir()) if (each / LOG).is_file()]


def find_model(root: str | Path, name: str) -> ModelRegistry:
    """Return a model of a registry.

    Raises:
        FolderError: The registry has no such model.
    """
    known = [each.name for each in list_models(root)]
    if name not in known:
        raise FolderError(f"the registry has no model '{name}'", where=str(root), fix=suggest_name(name, known))
    return ModelRegistry(root, name)


def _pass_fault_point(name: str) -> None:
    if fault_hook is not None:
        fault_hook(name)


def _ends_with_newline(descriptor: int, size: int) -> bool:
    return os.pread(descriptor, 1, size - 1) == b"\n"
