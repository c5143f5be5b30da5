"""Move files back that a run with `--data.on-error quarantine` has set aside."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

QUARANTINE_DIR, QUARANTINE_LOG = ".quarantine", "quarantined.jsonl"
"""The hidden folder in the data's root that a run moves unusable files to, and its list of where each came from."""


def restore_quarantined_files(root: Path) -> list[str]:
    """Move the files that a run has set aside in `root` back to where they were.

    A file that now has the old name is not overwritten, and the one that would replace it stays set aside.

    Returns:
        Names of the files that were moved back, relative to `root`.
    """
    folder, restored, remaining = root / QUARANTINE_DIR, [], []
    log = folder / QUARANTINE_LOG
    if not log.exists():
        return []
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        source, target = folder / Path(entry["to"]).name, root / entry["from"]
        if not os.path.lexists(source):
            continue
        if os.path.lexists(target):
            remaining.append(line)
            continue
        source.rename(target)
        restored.append(entry["from"])
    log.write_text("".join(line + "\n" for line in remaining), encoding="utf-8")
    if not remaining:
        log.unlink()
        with contextlib.suppress(OSError):  # the folder is not empty: somebody has put other files there
            folder.rmdir()
    return restored
