"""Rows 17 to 20: damaged checkpoints, rotation, the record of metrics, two runs in one folder; see `../kills`."""

import importlib
import sys
import time
from pathlib import Path
from typing import Any

from case import Fails, NotThereError, PassesWithNote

sys.path.append(str(Path(__file__).parent.parent / "kills"))
table: Any = importlib.import_module("kills")
trial: Any = importlib.import_module("trial")
world: Any = importlib.import_module("world")
FEW = 6


def _tool(peer: Any) -> tuple[Any, Any, Any]:
    """Return the library as in `../kills`, its job, and its uninterrupted run."""
    found = [each for each in table.tools() if each.name == peer.name]
    if not found:
        raise NotThereError("not among the kills")
    job = world.Job(phases=getattr(found[0], "only_phases", False))
    return found[0], job, trial.whole(found[0], job)


def row_17(peer: Any) -> None:
    """A truncated file or a flipped bit in the newest checkpoint is detected, and the one before is used."""
    tool, job, expected = _tool(peer)
    lines = table.damaged(tool, job, expected)
    stops = [line for line in lines if "stops with" in line]
    unsaid = [line for line in lines if "TAKEN" in line]
    anew = [line for line in lines if "starts from scratch" in line]
    said = [f"{len(unsaid)} are used without an error and the run ends differently"] if unsaid else []
    said += [f"{len(stops)} stop the resume with an error"] if stops else []
    said += [f"{len(anew)} start from scratch"] if anew else []
    if said:
        raise Fails(f"of {len(lines)} damages {', '.join(said)}")


def row_18(peer: Any) -> None:
    """With one checkpoint kept and kills at each file operation of a save, a complete one always exists."""
    tool, _, expected = _tool(peer)
    if not getattr(tool, "deletes", True):
        raise NotThereError("deletes none")
    count, resumed, there = table.rotation(tool, expected)
    if there < count:
        raise Fails(f"after {count - there} of {count} kills there is none to go on from")
    if resumed < count:
        raise PassesWithNote(
            f"but after {count - resumed} of {count} kills a resume stops at the incomplete newest one"
        )


def row_19(peer: Any) -> None:
    """After a kill and a resume, the record of metrics has each step, or epoch, once."""
    tool, job, expected = _tool(peer)
    if not tool.log:
        raise NotThereError("keeps no record by itself")
    outcomes = [trial.interrupted(tool, job, kill, expected) for kill in table.kills(FEW, 1)]
    stopped = [each for each in outcomes if each.error]
    wrong = [each for each in outcomes if not each.error and not each.log]
    if wrong:
        raise Fails(f"after {len(wrong)} of {FEW} kills there are {tool.log}s twice or not at all")
    if stopped:
        raise PassesWithNote(f"in the {FEW - len(stopped)} of {FEW} runs that could be resumed")


def row_20(peer: Any) -> None:
    """A second run in the folder of a running one is refused."""
    tool, job, expected = _tool(peer)
    with trial.begun(tool, job) as here:
        go = here.place / "go"
        first = here.begin(pause=go)
        seen = here.place / "seen-0.txt"
        while not seen.exists() or len(seen.read_text().splitlines()) < world.Witness.pause_at:
            time.sleep(0.05)
        before = _written(here.folder)
        second = here.wait(here.begin())
        after = _written(here.folder)
        go.touch()
        ended = here.wait(first)
    lost = [name for name, mark in before.items() if after.get(name) != mark]
    right = bool(ended.ended) and ended.ended["weights"] == expected.ended["weights"]
    if second.error and right and not lost:
        return
    told = f"; {len(lost)} files of the first are overwritten or deleted meanwhile" if lost else ""
    if second.error:
        raise Fails(f"stops late with {second.error.partition('/')[0]}{told}")
    if not right:
        raise Fails(f"the second run trains into it{told}; the first then ends otherwise: {ended.error[:80]}")
    if lost:
        raise Fails(f"the second run trains into it{told}")
    raise PassesWithNote("not refused, but it writes files of its own beside the first's")


def _written(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and modification time of each file, because both runs would write the same content."""
    found = {name: (folder / name).stat() for name, _ in world.sizes(folder)}
    return {name: (each.st_ino, each.st_mtime_ns) for name, each in found.items()}
