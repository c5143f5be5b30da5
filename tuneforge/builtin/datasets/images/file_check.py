"""What a run does about files before it trains: those that cannot be used, and copies on both sides of a split."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import numpy as np
import torch

from tuneforge import Data, DataError, FolderError, Split
from tuneforge.builtin.datasets.images.image_files import Found, Listing
from tuneforge.builtin.datasets.images.image_inputs import Images
from tuneforge.builtin.datasets.images.sample_names import shown
from tuneforge.builtin.datasets.images.scan import Verdict, scan

if TYPE_CHECKING:
    from tuneforge import Run

Policy = Literal["stop", "skip", "quarantine"]

VETTED = "vetted.json"
"""In a run's folder: what was left out, and which files are the same; a run that is resumed reads it again."""

QUARANTINE, MOVED = ".quarantine", "moved.jsonl"
"""Below the data: the folder of files that were set aside, and where each came from."""

_WITHOUT = "test without copies"


@attrs.frozen
class Vetted:
    """What the scan of all files gave.

    Args:
        left_out: By the name of a file that cannot be used, why.
        same: Names of files with the same bytes, a list for each such set.
        folder: The run's, also on ranks that do not write into it; None where nothing is written.
    """

    left_out: dict[str, str] = attrs.field(factory=dict)
    same: list[list[str]] = attrs.field(factory=list)
    folder: Path | None = None


def vetted(found: Found, inputs: Images, run: Run, *, policy: Policy, memory_mb: int) -> tuple[Found, Vetted]:
    """What is left of the pictures that were found, once each file has been looked at in a process with limits.

    Of several ranks the first one looks, and all take its word. What was found is kept in the run's folder, so that a
    resumed run has the very same samples.

    Args:
        found: As folders or a CSV file list them.
        inputs: How they will be decoded; what its operations make too large is left out too.
        run: That asks.
        policy: What is done about files that cannot be used: end here, leave them out, or move them away too.
        memory_mb: Memory for looking at a file.

    Raises:
        DataError: Some cannot be used, and the policy is `stop`; or none is left of a split.
    """
    told: dict[str, Any] = {}
    if run.ranks.leads:
        try:
            result = _vetted_here(found, inputs, policy, memory_mb, run.folder)
            told = {"left_out": result.left_out, "same": result.same}
            told["folder"] = None if run.folder is None else os.path.abspath(run.folder)
        finally:
            if not told:
                run.ranks.heard(None)
    told = run.ranks.heard(told)[0]
    if told is None:
        raise DataError("rank 0 could not use the data", fix="see what rank 0 says")
    folder = told.pop("folder")
    result = Vetted(**told, folder=None if folder is None else Path(folder))
    return _without(found, result.left_out, moved=policy == "quarantine"), result


def _vetted_here(found: Found, inputs: Images, policy: Policy, memory_mb: int, folder: Path | None) -> Vetted:
    kept = None if folder is None else folder / VETTED
    if kept is not None and kept.exists():
        return Vetted(**json.loads(kept.read_text(encoding="utf-8")))
    result = _looked_at(found, inputs, memory_mb)
    if result.left_out and policy == "stop":
        raise _unusable(found, result.left_out)
    if kept is not None:
        content = {"left_out": result.left_out, "same": result.same}
        part = kept.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(kept)
    if policy == "quarantine":
        quarantine(found.root, result.left_out)
    return result


def quarantine(root: Path, unusable: dict[str, str]) -> None:
    """Move files into the hidden folder `.quarantine` below the data; `release` moves them back.

    Args:
        root: What names start from.
        unusable: By name, why.

    Raises:
        FolderError: They cannot be moved.
    """
    place = root / QUARANTINE
    for name, why in unusable.items():
        path = root / name
        if not os.path.lexists(path):
            continue
        key = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
        line = json.dumps({"from": name, "to": key + os.path.splitext(name)[1], "why": why})
        try:
            place.mkdir(exist_ok=True)
            with (place / MOVED).open("a", encoding="utf-8") as file:  # before the move, so that each can be undone
                file.write(line + "\n")
            path.rename(place / (key + os.path.splitext(name)[1]))
        except OSError as error:
            raise FolderError(
                f"cannot move '{shown(name)}' away",
                where=shown(place),
                why=error.strerror or "",
                fix="use --data.broken skip, which moves nothing",
            ) from None


def release(root: Path) -> list[str]:
    """Move what was set aside below `root` back to where it was; the names of what came back.

    A file that is in the way stays, and what would replace it stays set aside.
    """
    place, back, left = root / QUARANTINE, [], []
    if not (place / MOVED).exists():
        return []
    for line in (place / MOVED).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        source, target = place / Path(entry["to"]).name, root / entry["from"]
        if not os.path.lexists(source):
            continue
        if os.path.lexists(target):
            left.append(line)
            continue
        source.rename(target)
        back.append(entry["from"])
    (place / MOVED).write_text("".join(line + "\n" for line in left), encoding="utf-8")
    if not left:
        (place / MOVED).unlink()
        with contextlib.suppress(OSError):  # what else lies there stays
            place.rmdir()
    return back


def with_copies_marked(data: Data, same: Sequence[Iterable[str]], *, by: str) -> Data:
    """The data with a note, and a row of its own in the report, where test pictures have copies that were learnt from.

    Args:
        data: With the names of files as ids.
        same: Sets of ids whose pictures are the same, or nearly so.
        by: Who found them, for the note.
    """
    group = {each: number for number, members in enumerate(same) for each in members}
    if not group:
        return data
    train, val, test = (_groups(split, group) for split in (data.train, data.val, data.test))
    known = np.unique(np.concatenate([train, val]))
    notes = []
    if leaked := int(np.isin(val[val >= 0], train).sum()):
        notes.append(f"val: {leaked} of {len(val)} pictures have a copy in train ({by}), so its figures are too good")
    copies = (test >= 0) & np.isin(test, known)
    further = {}
    if count := int(copies.sum()):
        rest = np.flatnonzero(~copies)
        also = f"; the row '{_WITHOUT}' leaves them out" if len(rest) else ""
        notes.append(
            f"test: {count} of {len(test)} pictures have a copy in train or val ({by}), "
            f"so its figures are too good{also}"
        )
        further = {_WITHOUT: data.test.take(torch.from_numpy(rest))} if len(rest) else {}
    return attrs.evolve(data, further={**data.further, **further}, notes=(*data.notes, *notes))


def copies_in(path: Path, data: Data) -> list[list[str]]:
    """Sets of ids that `tuneforge data check` has found to be copies, exact or near.

    Raises:
        DataError: The file is not what that command writes, or is about other data.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        root = str(content["root"])
        sets = [[str(each) for each in members] for members in content["copies"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read '{shown(path)}'",
            where="--data.checked",
            why=str(error),
            fix="name the issues.json that tuneforge data check has written",
        ) from None
    for members in sets:  # a cleaned list has whole paths
        members += [os.path.join(root, each) for each in members]
    known = {id_ for split in data.splits().values() for id_ in (split.ids or ())}
    if sets and not any(each in known for members in sets for each in members):
        raise DataError(
            f"'{shown(path)}' is about other data",
            where="--data.checked",
            why="none of the pictures that it names is here",
            fix="run tuneforge data check on this data",
        )
    return sets


def _groups(split: Split, group: dict[str, int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The set that each sample belongs to, int64 (n,); -1 where it has no copy."""
    return np.array([group.get(split.id_of(row), -1) for row in range(len(split))], dtype=np.int64)


def _looked_at(found: Found, inputs: Images, memory_mb: int) -> Vetted:
    result = Vetted()
    first: dict[bytes, str] = {}
    more: dict[bytes, list[str]] = {}
    for listing in found.parts.values():
        for name, verdict in zip(listing.names, scan(listing.paths, memory_mb=memory_mb), strict=True):
            why = verdict.why or _too_large(inputs, verdict)
            if why:
                result.left_out[name] = why
                continue
            digest = bytes.fromhex(verdict.digest)
            if digest in first:
                more.setdefault(digest, [first[digest]]).append(name)
            first.setdefault(digest, name)
    result.same.extend([shown(name) for name in names] for names in more.values())
    return result


def _too_large(inputs: Images, verdict: Verdict) -> str:
    try:
        inputs.bound(verdict.size[1], verdict.size[0], "it")
    except DataError as error:
        return error.what
    return ""


def _unusable(found: Found, left_out: dict[str, str]) -> DataError:
    name, why = next(iter(left_out.items()))
    others = f", and {len(left_out) - 1:,} more" if len(left_out) > 1 else ""
    return DataError(
        f"cannot use '{shown(name)}'{others}",
        where=shown(found.root),
        why=why,
        fix="repair or remove what tuneforge data check lists, or leave it out: --data.broken skip",
    )


def _without(found: Found, left_out: dict[str, str], *, moved: bool) -> Found:
    if not left_out:
        return found
    parts = {split: _kept(listing, left_out) for split, listing in found.parts.items()}
    for split, listing in parts.items():
        if not len(listing):
            raise DataError(f"no picture of {split} can be used", why=next(iter(left_out.values())))
    name, why = next(iter(left_out.items()))
    done = f"moved to {QUARANTINE}" if moved else "left out"
    note = f"{done}, because it cannot be used: {len(left_out):,} of {sum(map(len, found.parts.values())):,} pictures"
    return Found(parts, (*found.notes, f"{note}, the first '{shown(name)}' ({why}); all are in {VETTED}"))


def _kept(listing: Listing, left_out: dict[str, str]) -> Listing:
    names = list(listing.classes)
    kept = Listing(listing.root)
    for name, code in zip(listing.names, listing.codes, strict=True):
        if name not in left_out:
            kept.append(name, names[code])
    return kept
