"""Check of image files before training: unusable files, and duplicates across splits."""

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
"""In a run directory: unusable files and identical files; a resumed run reads it again."""

QUARANTINE_DIR, QUARANTINE_LOG = ".quarantine", "quarantined.jsonl"
"""In the data folder: the folder of quarantined files, and the log of their original names."""

_DEDUPLICATED_TEST = "test without duplicates"


@attrs.frozen
class FileCheck:
    """Result of the check of all files.

    Args:
        unusable: Reason by name of an unusable file.
        duplicate_sets: Names of identical files, one list for each set.
        run_dir: Run directory, on all ranks; None if the run writes no files.
    """

    unusable: dict[str, str] = attrs.field(factory=dict)
    duplicate_sets: list[list[str]] = attrs.field(factory=list)
    run_dir: Path | None = None


def check_files(
    found: ImageIndex, inputs: ImageInputs, run: Run, *, on_error: OnError, memory_mb: int
) -> tuple[ImageIndex, FileCheck]:
    """Check each file in a process with limits, and return the usable images.

    Rank 0 checks the files and sends the result to the other ranks. The result is stored in the run directory, so that
    a resumed run has the same samples.

    Args:
        found: Images listed by folders or a CSV file.
        inputs: Decodes the images; images that exceed its limits are unusable.
        run: The run.
        on_error: What to do about unusable files: raise an error, skip them, or skip and quarantine them.
        memory_mb: Memory limit for the check of a file, in MB.

    Raises:
        DataError: Files are unusable and `on_error` is `raise`, or a split has no usable image.
    """
    gathered: dict[str, Any] = {}
    if run.process_group.is_main:
        try:
            result = _check_files_locally(found, inputs, on_error, memory_mb, run.run_dir)
            gathered = {"unusable": result.unusable, "duplicate_sets": result.duplicate_sets}
            gathered["run_dir"] = None if run.run_dir is None else os.path.abspath(run.run_dir)
        finally:
            if not gathered:
                run.process_group.all_gather_object(None)
    gathered = run.process_group.all_gather_object(gathered)[0]
    if gathered is None:
        raise DataError("rank 0 could not read the data", fix="see the error of rank 0")
    run_dir = gathered.pop("run_dir")
    result = FileCheck(**gathered, run_dir=None if run_dir is None else Path(run_dir))
    return _drop_unusable(found, result.unusable, moved=on_error == "quarantine"), result


def _check_files_locally(
    found: ImageIndex, inputs: ImageInputs, on_error: OnError, memory_mb: int, run_dir: Path | None
) -> FileCheck:
    saved = None if run_dir is None else run_dir / FILE_CHECK_FILE
    if saved is not None and saved.exists():
        return FileCheck(**json.loads(saved.read_text(encoding="utf-8")))
    result = _scan_files(found, inputs, memory_mb)
    if result.unusable and on_error == "raise":
        raise _unusable_files_error(found, result.unusable)
    if saved is not None:
        content = {"unusable": result.unusable, "duplicate_sets": result.duplicate_sets}
        part = saved.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(saved)
    if on_error == "quarantine":
        quarantine_files(found.root, result.unusable)
    return result


def quarantine_files(root: Path, unusable: dict[str, str]) -> None:
    """Move files into the hidden folder `.quarantine` of the data; `tuneforge data check --undo` moves them back.

    Args:
        root: Folder that the names are relative to.
        unusable: Reason by name.

    Raises:
        FolderError: A file cannot be moved.
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
            ) as file:  # before the move, so that every move can be undone
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
    """Add notes, and an extra test split without duplicates, where splits share images.

    Args:
        data: Data whose ids are names of files.
        duplicate_sets: Sets of ids of duplicates or near-duplicates.
        by: How they were found, for the notes.
    """
    group = {each: number for number, members in enumerate(duplicate_sets) for each in members}
    if not group:
        return data
    train, val, test = (_assign_duplicate_sets(split, group) for split in (data.train, data.val, data.test))
    known = np.unique(np.concatenate([train, val]))
    notes = []
    if leaked := int(np.isin(val[val >= 0], train).sum()):
        notes.append(
            f"val: {leaked} of {len(val)} images have a duplicate in train ({by}), so its metrics are too high"
        )
    copies = (test >= 0) & np.isin(test, known)
    further = {}
    if count := int(copies.sum()):
        rest = np.flatnonzero(~copies)
        also = f"; the split '{_DEDUPLICATED_TEST}' excludes them" if len(rest) else ""
        notes.append(
            f"test: {count} of {len(test)} images have a duplicate in train or val ({by}); metrics are too high{also}"
        )
        further = {_DEDUPLICATED_TEST: data.test.subset(torch.from_numpy(rest))} if len(rest) else {}
    return attrs.evolve(data, extra_test_splits={**data.extra_test_splits, **further}, notes=(*data.notes, *notes))


def read_duplicate_sets(path: Path, data: Data) -> list[list[str]]:
    """Return the sets of duplicates and near-duplicates that `tuneforge data check` found.

    Raises:
        DataError: The file is not one of that command, or is about other data.
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
            fix="name the issues.json of tuneforge data check",
        ) from None
    for members in sets:  # a cleaned list has absolute paths
        members += [os.path.join(root, each) for each in members]
    known = {id_ for split in data.splits().values() for id_ in (split.ids or ())}
    if sets and not any(each in known for members in sets for each in members):
        raise DataError(
            f"'{escape_name(path)}' is about other data",
            where="--data.checked",
            why="none of its images is in this data",
            fix="run tuneforge data check on this data",
        )
    return sets


def _assign_duplicate_sets(split: Split, group: dict[str, int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the index of the duplicate set of each sample, int64 (n,); -1 without duplicates."""
    return np.array([group.get(split.id_of(row), -1) for row in range(len(split))], dtype=np.int64)


def _scan_files(found: ImageIndex, inputs: ImageInputs, memory_mb: int) -> FileCheck:
    result = FileCheck()
    first: dict[bytes, str] = {}
    more: dict[bytes, list[str]] = {}
    for listing in found.by_split.values():
        for name, verdict in zip(
            listing.names, scan_images(listing.paths, memory_mb=memory_mb, max_pixels=inputs.max_pixels), strict=True
        ):
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
        inputs.check_size(verdict.size[1], verdict.size[0], "it", is_jpeg=verdict.format.startswith("JPEG"))
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
        fix=("raise the limit with --data.max-megapixels; or " if " pixels" in why else "")
        + "repair or remove the files that tuneforge data check lists, or skip them: --data.on-error skip",
    )


def _drop_unusable(found: ImageIndex, unusable: dict[str, str], *, moved: bool) -> ImageIndex:
    if not unusable:
        return found
    parts = {split: _filter_list(listing, unusable) for split, listing in found.by_split.items()}
    for split, listing in parts.items():
        if not len(listing):
            raise DataError(f"{split} has no usable image", why=next(iter(unusable.values())))
    name, why = next(iter(unusable.items()))
    done = f"moved to {QUARANTINE_DIR}" if moved else "skipped"
    note = f"{done} because unusable: {len(unusable):,} of {sum(map(len, found.by_split.values())):,} images"
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
