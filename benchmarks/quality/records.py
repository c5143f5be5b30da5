"""Results, one JSON line for each (cell, split, method), so that a stopped run goes on where it was."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

Key = tuple[str, int, str]
"""Cell, split and method."""


@attrs.frozen
class Record:
    """One result.

    Args:
        cell: The cell, as text.
        split: Number of the split.
        method: What trained the model.
        accuracy: On the test samples of the split; None where the method failed.
        macro_f1: The same.
        seconds: CPU seconds of training and prediction, without reading the data and building the network.
        version: Version of the method's library, or the commit of tuneforge.
        error: What failed, or an empty text.
    """

    cell: str
    split: int
    method: str
    accuracy: float | None
    macro_f1: float | None
    seconds: float
    version: str = ""
    error: str = ""

    @property
    def key(self) -> Key:
        """Return what makes it unique."""
        return self.cell, self.split, self.method


def read(path: Path) -> dict[Key, Record]:
    """Read the records of a file; of two with the same key the later one counts.

    A last line without its end, which a killed run leaves, is ignored.
    """
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return {record.key: record for record in (Record(**json.loads(line)) for line in whole.splitlines() if line)}


def append(path: Path, record: Record) -> None:
    """Write one line, on a line of its own even if a killed run left half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else b""
    if before and not before.endswith(b"\n"):
        path.write_bytes(before[: before.rfind(b"\n") + 1])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(attrs.asdict(record)) + "\n")


def pending(wanted: Iterable[Key], done: Iterable[Key]) -> Iterator[Key]:
    """Yield the keys that have no record yet, in their order."""
    finished = set(done)
    return (key for key in wanted if key not in finished)
