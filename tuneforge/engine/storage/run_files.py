"""The files of a run directory: their names, and how they are read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneforge.errors import FolderError, TuneforgeError, UsageError

RUN, STATUS, STRATEGY_STEPS, METRICS, REPORT = "run.json", "status.json", "steps.jsonl", "metrics.jsonl", "report.json"
MODEL, WEIGHTS, HARDEST_SAMPLES, TIMINGS, LOG, REPORT_HTML = (
    "model.json", "model.safetensors", "hardest_samples.json", "timings.jsonl", "log.txt", "report.html",
)  # fmt: skip

GRAPH, GRAPH_CONSTANTS = "graph.json", "graph.safetensors"


def is_run_dir(path: Path) -> bool:
    """Return True for the directory of a run that has begun; one that died before it wrote its status has not."""
    return (path / RUN).exists() and (path / STATUS).exists()


def read_json(path: Path, *keys: str) -> Any:
    """Read a JSON file of a run directory, which holds an object with these keys, if any are named.

    Raises:
        UsageError: The directory does not exist; the message offers the run with the most similar name.
        FolderError: The file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if keys and not (isinstance(content, dict) and content.keys() >= set(keys)):
            raise ValueError(f"it lacks {', '.join(keys)}")
        return content
    except FileNotFoundError:
        raise _missing_file_error(path) from None
    except (ValueError, OSError) as error:
        raise FolderError(
            f"cannot read '{path.name}'", where=str(path.parent), why=str(error), fix="restore the file, or run again"
        ) from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one JSON object per line; nothing where the file does not exist.

    Raises:
        FolderError: A line is damaged.
    """
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.strip():
                        yield json.loads(line)
                except ValueError as error:
                    where, fix = f"{path.name}, line {number}", "restore the file, or run again"
                    raise FolderError(f"cannot read '{path.name}'", where=where, why=str(error), fix=fix) from None


def _missing_file_error(file: Path) -> TuneforgeError:
    if file.parent.is_dir():
        what = f"'{file.parent}' holds no run" if file.name == RUN else f"'{file.parent}' is not a finished run"
        fix = "name a directory that tuneforge run has written, such as runs/NAME"
        return FolderError(what, where=file.name, why="the file is missing", fix=fix)
    bases = dict.fromkeys((file.parent.parent, Path("runs")))
    runs = {each.parent.name: str(each.parent) for base in bases for each in base.glob(f"*/{RUN}")}
    similar = difflib.get_close_matches(file.parent.name, runs, n=3)
    names = " or ".join(f"'{runs[name]}'" for name in similar)
    what = f"there is no directory '{file.parent}'"
    return UsageError(what, fix=f"did you mean {names}?" if similar else "check its name")
