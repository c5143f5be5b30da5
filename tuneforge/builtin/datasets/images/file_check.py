"""What a run does about files before it trains: those that cannot be used, and copies on both sides of a split."""

from __future__ import annotations

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
from tuneforge.builtin.datasets.images.image_files import ImageIndex, ImageList
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.errors import escape_name
from tuneforge.plugin import ImageScan, scan_images

if TYPE_CHECKING:
    from tuneforge import Run

OnError = Literal["raise", "skip", "quarantine"]

FILE_CHECK_FILE = "file_check.json"
"""In a run's folder: what was left out, and which files are the same; a run that is resumed reads it again."""

QUARANTINE_DIR, QUARANTINE_LOG = ".quarantine", "quarantined.jsonl"
"""Below the data: the folder of files that were set aside, and where each came from."""

_DEDUPLICATED_TEST = "test without copies"


@attrs.frozen
class FileCheck:
    """What the scan of all files gave.

    Args:
        unusable: By the name of a file that cannot be used, why.
        duplicate_sets: Names of files with the same bytes, a list for each such set.
        run_dir: The run's, also on ranks that do not write into it; None where nothing is written.
    """

    unusable: dict[str, str] = attrs.field(factory=dict)
    duplicate_sets: list[list[str]] = attrs.field(factory=list)
    run_dir: Path | None = None


def check_files(
    found: ImageIndex, inputs: ImageInputs, run: Run, *, on_error: OnError, memory_mb: int
) -> tuple[ImageIndex, FileCheck]:
    """What is left of the pictures that were found, once each file has been looked at in a process with limits.

    Of several ranks the first one looks, and all take its word. What was found is kept in the run's folder, so that a
    resumed run has the very same samples.

    Args:
        found: As folders or a CSV file list them.
        inputs: How they will be decoded; what its operations make too large is left out too.
        run: That asks.
        on_error: What is done about files that cannot be used: end here, leave them out, or move them away too.
        memory_mb: Memory for looking at a file.

    Raises:
        DataError: Some cannot be used, and `on_error` is `raise`; or none is left of a split.
    """
    told: dict[str, Any] = {}
    if run.process_group.is_main:
        try:
            result = _check_files_locally(found, inputs, on_error, memory_mb, run.run_dir)
            told = {"unusable": result.unusable, "duplicate_sets": result.duplicate_sets}
            told["folder"] = None if run.run_dir is None else os.path.abspath(run.run_dir)
        finally:
            if not told:
                run.process_group.all_gather_object(None)
    told = run.process_group.all_gather_object(told)[0]
    if told is None:
        raise DataError("rank 0 could not use the data", fix="see what rank 0 says")
    folder = told.pop("folder")
    result = FileCheck(**told, run_dir=None if folder is None else Path(folder))
    return _drop_unusable(found, result.unusable, moved=on_error == "quarantine"), result


def _check_files_locally(
    found: ImageIndex, inputs: ImageInputs, on_error: OnError, memory_mb: int, folder: Path | None
) -> FileCheck:
    kept = None if folder is None else folder / FILE_CHECK_FILE
    if kept is not None and kept.exists():
        return FileCheck(**json.loads(kept.read_text(encoding="utf-8")))
    result = _scan_files(found, inputs, memory_mb)
    if result.unusable and on_error == "raise":
        raise _unusable_files_error(found, result.unusable)
    if kept is not None:
        content = {"unusable": result.unusable, "duplicate_sets": result.duplicate_sets}
        part = kept.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(kept)
    if on_error == "quarantine":
        quarantine_files(found.root, result.unusable)
    return result


def quarantine_files(root: Path, unusable: dict[str, str]) -> None:
    """Move files into the hidden folder `.quarantine` of the data; `tuneforge data check --undo` moves them back.

    Args:
        root: What names start from.
        unusable: By name, why.

    Raises:
        FolderError: They cannot be moved.
    """
    place = root / QUARANTINE_DIR
    for name, why in unusable.items():
        path = root / name
        if not os.path.lexists(path):
            continue
        key = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
        line = json.dumps({"from": name, "to": key + os.path.splitext(name)[1], "why": why})
        try:
            place.mkdir(exist_ok=True)
            with (place / QUARANTINE_LOG).open(
                "a", encoding="utf-8"
            ) as file:  # before the move, so that each can be undone
                file.write(line + "\n")
            path.rename(place / (key + os.path.splitext(name)[1]))
        except OSError as error:
            raise FolderError(
                f"cannot move '{escape_name(name)}' away",
                where=escape_name(place),
                why=error.strerror or "",
                fix="use --data.on-error skip, which moves nothing",
            ) from None


def mark_duplicates(data: Data, duplicate_sets: Sequence[Iterable[str]], *, by: str) -> Data:
    """The data with a note, and a row of its own in the report, where test pictures have copies that were learnt from.

    Args:
        data: With the names of files as ids.
        duplicate_sets: Sets of ids whose pictures are the same, or nearly so.
        by: Who found them, for the note.
    """
    group = {each: number for number, members in enumerate(duplicate_sets) for each in members}
    if not group:
        return data
    train, val, test = (_assign_duplicate_sets(split, group) for split in (data.train, data.val, data.test))
    known = np.unique(np.concatenate([train, val]))
    notes = []
    if leaked := int(np.isin(val[val >= 0], train).sum()):
        notes.append(f"val: {leaked} of {len(val)} pictures have a copy in train ({by}), so its figures are too good")
    copies = (test >= 0) & np.isin(test, known)
    further = {}
    if count := int(copies.sum()):
        rest = np.flatnonzero(~copies)
        also = f"; the row '{_DEDUPLICATED_TEST}' leaves them out" if len(rest) else ""
        notes.append(
            f"test: {count} of {len(test)} pictures have a copy in train or val ({by}), "
            f"so its figures are too good{also}"
        )
        further = {_DEDUPLICATED_TEST: data.test.subset(torch.from_numpy(rest))} if len(rest) else {}
    return attrs.evolve(data, extra_test_splits={**data.extra_test_splits, **further}, notes=(*data.notes, *notes))


def read_duplicate_sets(path: Path, data: Data) -> list[list[str]]:
    """Sets of ids that `tuneforge data check` has found to be copies, exact or near.

    Raises:
        DataError: The file is not what that command writes, or is about other data.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        root = str(content["root"])
        sets = [[str(each) for each in members] for members in content["duplicates"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read '{escape_name(path)}'",
            where="--data.checked",
            why=str(error),
            fix="name the issues.json that tuneforge data check has written",
        ) from None
    for members in sets:  # a cleaned list has whole paths
        members += [os.path.join(root, each) for each in members]
    known = {id_ for split in data.splits().values() for id_ in (split.ids or ())}
    if sets and not any(each in known for members in sets for each in members):
        raise DataError(
            f"'{escape_name(path)}' is about other data",
            where="--data.checked",
            why="none of the pictures that it names is here",
            fix="run tuneforge data check on this data",
        )
    return sets


def _assign_duplicate_sets(split: Split, group: dict[str, int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The set that each sample belongs to, int64 (n,); -1 where it has no copy."""
    return np.array([group.get(split.id_of(row), -1) for row in range(len(split))], dtype=np.int64)


def _scan_files(found: ImageIndex, inputs: ImageInputs, memory_mb: int) -> FileCheck:
    result = FileCheck()
    first: dict[bytes, str] = {}
    more: dict[bytes, list[str]] = {}
    for listing in found.by_split.values():
        for name, verdict in zip(listing.names, scan_images(listing.paths, memory_mb=memory_mb), strict=True):
            why = verdict.why or _explain_if_too_large(inputs, verdict)
            if why:
                result.unusable[name] = why
                continue
            digest = bytes.fromhex(verdict.digest)
            if digest in first:
                more.setdefault(digest, [first[digest]]).append(name)
            first.setdefault(digest, name)
    result.duplicate_sets.extend([escape_name(name) for name in names] for names in more.values())
    return result


def _explain_if_too_large(inputs: ImageInputs, verdict: ImageScan) -> str:
    try:
        inputs.check_size(verdict.size[1], verdict.size[0], "it")
    except DataError as error:
        return error.what
    return ""


def _unusable_files_error(found: ImageIndex, unusable: dict[str, str]) -> DataError:
    name, why = next(iter(unusable.items()))
    others = f", and {len(unusable) - 1:,} more" if len(unusable) > 1 else ""
    return DataError(
        f"cannot use '{escape_name(name)}'{others}",
        where=escape_name(found.root),
        why=why,
        fix="repair or remove what tuneforge data check lists, or leave it out: --data.on-error skip",
    )


def _drop_unusable(found: ImageIndex, unusable: dict[str, str], *, moved: bool) -> ImageIndex:
    if not unusable:
        return found
    parts = {split: _filter_list(listing, unusable) for split, listing in found.by_split.items()}
    for split, listing in parts.items():
        if not len(listing):
            raise DataError(f"no picture of {split} can be used", why=next(iter(unusable.values())))
    name, why = next(iter(unusable.items()))
    done = f"moved to {QUARANTINE_DIR}" if moved else "left out"
    note = (
        f"{done}, because it cannot be used: {len(unusable):,} of {sum(map(len, found.by_split.values())):,} pictures"
    )
    return ImageIndex(
        parts, (*found.notes, f"{note}, the first '{escape_name(name)}' ({why}); all are in {FILE_CHECK_FILE}")
    )


def _filter_list(listing: ImageList, unusable: dict[str, str]) -> ImageList:
    names = list(listing.classes)
    kept = ImageList(listing.root)
    for name, code in zip(listing.names, listing.class_indices, strict=True):
        if name not in unusable:
            kept.append(name, names[code])
    return kept
