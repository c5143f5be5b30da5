"""The study directory: its record, whether two studies are equal, and how to resume one."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tuneforge
from tuneforge.engine.session.components import is_object
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.atomic import nonfinite_to_none
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.errors import FolderError, UsageError
from tuneforge.plugin.config import GROUP_BY_KEY

STUDY = "study.json"
_ARRAYS = "arrays"  # the component of arrays and datasets in memory


def normalize_record(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a study as `study.json` gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(nonfinite_to_none({"tuneforge": tuneforge.__version__, **table})))
    return plain


def resume_command(study_dir: Path, record: Mapping[str, Any]) -> str:
    """Return the command, or a description of the call, that resumes a study."""
    if has_objects(record):
        return f"the same call of compare(...), with out={str(study_dir)!r}"
    return f"tuneforge compare --resume {shlex.quote(str(study_dir))}"


def find_unfinished(record: Mapping[str, Any], runs_dir: Path = Path("runs")) -> Path | None:
    """Return the newest directory under `runs/` of an equal study that is neither done nor running, or None.

    A study that was given Python objects is never found, because whether they are the same is unknown.
    """
    if has_objects(record):
        return None
    for path in sorted(runs_dir.glob(f"*/{STUDY}"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(FolderError), RunDir(path.parent, resume=True):
            same = names.read_json(path) == record
            if same and names.read_json(path.parent / names.STATUS)["state"] != "done":
                return path.parent
    return None


def write_or_verify_record(study_dir: Path, record: Mapping[str, Any]) -> None:
    """Write `study.json`, or check that the one that exists is equal.

    Raises:
        FolderError: The directory holds a run or other files.
        UsageError: The directory holds another study; the message lists what differs.
    """
    if (study_dir / names.RUN).exists():
        raise FolderError(f"'{study_dir}' holds a run, not a study", where="--out", fix="name another directory")
    if not (study_dir / STUDY).exists():
        if any(not each.name.startswith(".") for each in study_dir.iterdir()):
            raise FolderError(f"'{study_dir}' holds other files", where="--out", fix="name a new or an empty directory")
        names.write_json(study_dir / STUDY, record)
        return
    before = names.read_json(study_dir / STUDY)
    there, here = _flatten_settings(before, record), _flatten_settings(record, before)
    lines = [
        f"  {key}: there {there.get(key)}, here {here.get(key)}"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    ]
    if lines:
        raise UsageError(
            "\n".join([f"'{study_dir}' holds another study", *lines]),
            where="--out",
            fix=f"resume that one: {resume_command(study_dir, before)}; or name another directory",
        )


def _flatten_settings(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return what determines a study by dotted keys: candidates, and the options of those that `other` has too."""
    candidates = record["candidates"]
    both = {name: options for name, options in candidates.items() if name in other["candidates"]}
    settings = {key: value for key, value in record.items() if key not in ("tuneforge", "candidates")}
    return _flatten({"candidates": ", ".join(candidates), **both, **settings})


def _flatten(table: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested table as a flat one with dotted keys."""
    if not isinstance(table, Mapping):
        return {prefix: table}
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def has_objects(record: Mapping[str, Any]) -> bool:
    """Return True if a study was given Python objects, which its directory does not hold."""
    parts = [*record["candidates"].values(), *(value for key, value in record["config"].items() if key in GROUP_BY_KEY)]
    entries = [each["name"] for part in parts for each in (part if isinstance(part, list) else [part])]
    return _ARRAYS in entries or any(is_object(name) for name in entries)


def new_study_dir() -> Path:
    """Return a directory under `runs/` that does not exist yet, named by the time."""
    stamp = time.strftime("study-%Y%m%d-%H%M%S")
    tries = (stamp if number == 1 else f"{stamp}-{number}" for number in range(1, 10_000))
    return next(path for path in (Path("runs") / name for name in tries) if not path.exists())
