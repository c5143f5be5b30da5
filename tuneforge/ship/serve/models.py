"""Which version of which model answers: loaded, warmed and checked beside the old one, then put in its place.

A request keeps the version that it met first: it is decoded, computed and described by that one, whatever happens to
the model meanwhile. An old version goes when its last answer is out.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Inputable, Inputs, Targets
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import FolderError, HaltError, MissingDependencyError, TuneforgeError
from tuneforge.exporting import atomic_dir as sealed
from tuneforge.exporting.bundle import BUNDLE, CHAMPION, Servable, backends_of, servable_of
from tuneforge.ship.serve.batches import check_rows
from tuneforge.ship.serve.bounds import Refusal
from tuneforge.ship.serve.threads import keep_to_one_core

LOG = logging.getLogger("tuneforge.serve")
_PROBES, _ENOUGH_S = 15, 0.3


@attrs.frozen(eq=False)
class Served:
    """A version that answers.

    Args:
        servable: What computes.
        name: Of the model.
        version: Its number in a store; elsewhere the beginning of a digest of its weights.
    """

    servable: Servable
    name: str
    version: str

    @property
    def inputs(self) -> Inputs:
        """How raw things become tensors."""
        return self.servable.inputs

    @property
    def targets(self) -> Targets:
        """How answers are read."""
        return self.servable.targets

    @property
    def about(self) -> dict[str, str]:
        """Name, version and backend."""
        return {"name": self.name, "version": self.version, "backend": self.servable.backend}

    def outputs(self, stored: Inputable) -> Tensor:
        """Outputs (b, k) of stored inputs (b, ...)."""
        return self.servable.outputs(stored)

    def example(self, rows: int) -> Inputable:
        """Stored inputs of nothing in particular, of the right shapes and types."""
        tensors = {
            name: torch.zeros(rows, *shape, dtype=getattr(torch, dtype))
            for name, (shape, dtype) in self.servable.stored.items()
        }
        return tensors.get("", tensors)


@attrs.frozen
class Source:
    """Where the versions of a model come from.

    Args:
        name: Of the model.
        path: A bundle, a run's folder, or a model of a store.
    """

    name: str
    path: Path

    @property
    def in_store(self) -> bool:
        """True where a pointer says which version is the champion."""
        return (self.path / CHAMPION).is_file()

    def newest(self) -> str:
        """The version that ought to answer; empty where there is only one."""
        return str(names.read_json(self.path / CHAMPION)["version"]) if self.in_store else ""

    def folder(self, version: str) -> Path:
        """The folder of a version."""
        return self.path / version if version else self.path


def sources_of(path: Path) -> list[Source]:
    """What a path offers: one model, or all those of a store.

    Raises:
        FolderError: There is none.
    """
    if any((path / name).is_file() for name in (CHAMPION, BUNDLE, names.STATUS)):
        return [Source(path.absolute().name, path)]
    found = [Source(each.name, each) for each in sorted(path.glob("*")) if (each / CHAMPION).is_file()]
    if not found:
        raise FolderError(
            f"there is nothing to serve in '{path}'",
            why="it is neither a finished run, nor a bundle, nor a store with a champion",
            fix="name a run's folder (tuneforge run), a bundle (tuneforge export) or a store (tuneforge promote)",
        )
    return found


@attrs.define(eq=False)
class _Slot:
    """One model's place: what answers now, what was asked last, and why it is not there."""

    source: Source
    served: Served | None = None
    tried: str | None = None
    reason: str = ""
    unloaded: bool = False
    lock: threading.Lock = attrs.field(factory=threading.Lock)


class Models:
    """The models of a server by name.

    Args:
        sources: Where they come from.
        backend: `auto` opens every form that a version has, and keeps the one that answers a lone row fastest.
        device_name: Where torch computes.
        batch_rows: Rows of the largest batch, for warming up.
        swapped: Is called after each attempt to load, with the model's name and whether it answers now.
        look: Gives the sources that there are now; those with a new name are served too.
        compute: Calls something in the thread that computes answers; a new version is warmed there.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        backend: str = "auto",
        device_name: str = "auto",
        batch_rows: int = 32,
        swapped: Callable[[str, bool], None] = lambda name, done: None,
        look: Callable[[], Sequence[Source]] = lambda: (),
        compute: Callable[[Callable[[], float]], float] = lambda work: work(),
    ) -> None:
        self._compute = compute
        self._slots = {each.name: _Slot(each) for each in sources}
        self._backend, self._device_name, self._batch_rows, self._swapped = backend, device_name, batch_rows, swapped
        self._look, self._looking = look, threading.Lock()
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def first(self) -> str:
        """The name that `/predict` takes where none is given."""
        return next(iter(self._slots))

    def current(self, name: str, version: str | None = None) -> Served:
        """The version that answers now.

        Raises:
            Refusal: There is no such model, or it answers in another version.
        """
        slot = self._slot(name)
        served = slot.served
        if served is None:
            raise Refusal(404, f"model '{name}' is not loaded" + (f": {slot.reason}" if slot.reason else ""))
        if version is not None and version != served.version:
            raise Refusal(404, f"model '{name}' answers in version '{served.version}', not '{version[:80]}'")
        return served

    def all_current(self) -> list[Served]:
        """Every version that answers now."""
        return [slot.served for slot in self._slots.values() if slot.served is not None]

    def index(self) -> list[dict[str, str]]:
        """Each model with its version, state and reason, as the protocol lists them."""
        rows = []
        for name, slot in self._slots.items():
            version = {} if slot.served is None else {"version": slot.served.version}
            state = "UNAVAILABLE" if slot.served is None else "READY"
            rows.append({"name": name, **version, "state": state, "reason": slot.reason})
        return rows

    def reason(self, name: str) -> str:
        """Why the newest version of a model does not answer; empty where it does."""
        return self._slot(name).reason

    def load(self, name: str) -> Served:
        """Load the newest version beside the old one and let it take over.

        Raises:
            TuneforgeError: It cannot be loaded, or disagrees with its own recorded answers; the old one goes on.
        """
        if name not in self._slots:
            self._find()
        slot = self._slot(name)
        with slot.lock:
            slot.unloaded = False
            return self._load(slot)

    def unload(self, name: str) -> None:
        """Let a model answer no more."""
        slot = self._slot(name)
        with slot.lock:
            slot.served, slot.unloaded, slot.reason = None, True, "unloaded"
        LOG.info("model '%s' is unloaded", name)

    def watch(self, every_s: float) -> None:
        """Follow the champions' pointers in a thread, until `close`."""
        self._watcher = threading.Thread(target=self._watch, args=(every_s,), name="watch", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Stop watching; a load that is going on ends first."""
        self._over.set()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self, every_s: float) -> None:
        keep_to_one_core()
        while not self._over.wait(every_s):
            self._find()
            for slot in self._slots.values():
                self._follow(slot)

    def _find(self) -> None:
        """Give every name that was promoted first while the server runs its place; the mapping is replaced whole."""
        with self._looking:
            try:
                new = {each.name: _Slot(each) for each in self._look() if each.name not in self._slots}
            except (TuneforgeError, OSError):  # a store that cannot be read now is read again
                return
            self._slots = {**self._slots, **new}
        for name in new:
            LOG.info("model '%s' is new in the store", name)

    def _follow(self, slot: _Slot) -> None:
        """Load what the pointer names, where that is new. What was refused is tried again only when it is asked for."""
        try:
            newest = slot.source.newest()
            if newest == slot.tried:
                return
            with slot.lock:
                if not (slot.unloaded or newest == slot.tried or self._over.is_set()):
                    self._load(slot)
        except Exception:  # noqa: BLE001 - logged where it was refused; a pointer that cannot be read is read again
            return

    def _load(self, slot: _Slot) -> Served:
        name, old = slot.source.name, slot.served
        version = slot.source.newest()
        slot.tried = version
        began = time.perf_counter()
        try:
            served = self._ready(slot.source, version)
        except Exception as error:
            slot.reason = f"version '{version or 'new'}' was refused: {_for_all(error)}"
            going_on = "nothing answers" if old is None else f"version '{old.version}' goes on"
            LOG.error("model '%s': %s; %s (%s)", name, slot.reason, going_on, error, exc_info=_is_strange(error))
            self._swapped(name, False)
            raise
        slot.served, slot.reason = served, ""
        before = "" if old is None else f" in place of '{old.version}'"
        took = time.perf_counter() - began
        LOG.info("model '%s' answers in version '%s'%s (%s, %.1f s)", name, served.version, before, _via(served), took)
        self._swapped(name, True)
        return served

    def _ready(self, source: Source, version: str) -> Served:
        """A version that is loaded, warm, and agrees with its recorded answers."""
        folder = source.folder(version)
        best: tuple[float, Served] | None = None
        for backend in self._backends(folder):
            try:
                servable = servable_of(folder, backend=backend, device_name=self._device_name)
            except MissingDependencyError:
                if best is None and backend == self._backends(folder)[-1]:
                    raise
                continue
            served = Served(servable, source.name, servable.version or digest_of(folder))
            servable.check()
            speed = self._warm(served)
            if best is None or speed < best[0]:
                best = (speed, served)
        assert best is not None
        return best[1]

    def _warm(self, served: Served) -> float:
        """Seconds that a lone row takes, after every kernel has been used once, also at the largest batch."""

        def seconds(rows: int) -> float:
            example, began = served.example(rows), time.perf_counter()
            check_rows(served.outputs(example), rows)
            return time.perf_counter() - began

        for rows in dict.fromkeys((self._batch_rows, 2, 1)):
            self._compute(partial(seconds, rows))
        times: list[float] = []
        while len(times) < _PROBES and sum(times) < _ENOUGH_S:
            times.append(self._compute(partial(seconds, 1)))
        return median(times)

    def _backends(self, folder: Path) -> list[str]:
        return list(dict.fromkeys(backends_of(folder))) if self._backend == "auto" else [self._backend]

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            raise Refusal(404, f"there is no model '{name[:80]}'")
        return self._slots[name]


def digest_of(folder: Path) -> str:
    """Eight hexadecimal digits that stand for a bundle's or a run's content."""
    found = (folder / name for name in (sealed.MANIFEST, names.WEIGHTS))
    content = next(path for path in found if path.is_file())
    return hashlib.sha256(content.read_bytes()).hexdigest()[:8]


def _via(served: Served) -> str:
    return f"by {served.servable.backend}"


def _for_all(error: Exception) -> str:
    """Why a version was refused, as any client may read it: the log alone has paths."""
    if isinstance(error, HaltError):
        return "it disagrees with its own recorded answers"
    if isinstance(error, MissingDependencyError):
        return error.what
    return "its files are missing, damaged or unreadable"


def _is_strange(error: Exception) -> bool:
    return not isinstance(error, TuneforgeError)
