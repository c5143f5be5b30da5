"""Kill every installed library at the same points, resume it as its documentation says, and print the results.

Nothing is installed or downloaded. A library that cannot be imported has no column. Run it from anywhere:

    python examples/kills/kills.py [--kills 24] [--seed 0] [--only Lightning] [--phases] [--details]
"""

import argparse
import importlib
import importlib.util
import itertools
import logging
import platform
import random
import shutil
import statistics
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from trial import Outcome, Whole, begun, compared, interrupted, killed, whole
from world import STEPS, STEPS_AN_EPOCH, Job, Kill, Tool

MODULES = {
    "tuneforge": "with_tuneforge", "lightning": "with_lightning", "transformers": "with_transformers",
    "accelerate": "with_accelerate", "fastai": "with_fastai", "skorch": "with_skorch",
}  # fmt: skip
CYCLE = ("forward", "backward", "saving", "stepped", "file", "border", "validating", "saving")
"""Places in turn; `border` is the first step of an epoch or its neighbours."""


def tools(only: str | None = None) -> list[Tool]:
    """Return the libraries that can be imported."""
    found: list[Tool] = []
    for package, module in MODULES.items():
        if importlib.util.find_spec(package) is not None:
            try:
                found += importlib.import_module(module).tools()
            except ImportError as error:
                print(f"no column for {package}: {error}")
    return [each for each in found if only in (None, each.name)]


def kills(count: int, seed: int) -> list[Kill]:
    """Return where to kill, the same for every library; after the first epoch, when all have saved once."""
    chance, found = random.Random(seed), []
    for number in range(count):
        place, step = CYCLE[number % len(CYCLE)], chance.randint(STEPS_AN_EPOCH + 1, STEPS - 2)
        epoch_end = STEPS_AN_EPOCH * chance.randint(2, STEPS // STEPS_AN_EPOCH - 1)
        if place == "validating":
            step = epoch_end
        if place == "border":
            place, step = chance.choice(["stepped", "forward", "backward"]), epoch_end + chance.choice([0, 1, 2])
        share = chance.uniform(0.2, 0.95)
        found.append(Kill(place, step, share))
    return found


def share(found: Iterable[Any]) -> str:
    """Return how many of them are true, as text."""
    listed = list(found)
    return f"{sum(map(bool, listed))} of {len(listed)}"


def rows(tool: Tool, expected: Whole, outcomes: list[Outcome]) -> dict[str, str]:
    """Return the cells of a library."""
    done = [each for each in outcomes if not each.error]
    helped = [each.helped for each in outcomes if each.helped is not None]
    errors = sorted({each.error.partition(":")[0] for each in outcomes if each.error})
    litter = [each for each in done if each.litter]
    anew = sum(each.start == 0 for each in helped)
    by_hand = f"{share(not each.error for each in helped)}, {share(each.weights for each in helped)} bit-identical"
    by_hand += f" ({anew} start from scratch)" if anew else ""
    return {
        "saves": "by step" if tool.each_step else "by epoch",
        "two uninterrupted runs are equal": "yes" if expected.again else "NO: the rows below mean nothing",
        "resumed without an error": share(not each.error for each in outcomes) + _in_brackets(", ".join(errors)),
        "others, resumed after deleting the newest checkpoint by hand": by_hand if helped else "",
        "weights bit-identical": share(each.weights for each in outcomes),
        "optimizer bit-identical": share(each.optimizer for each in outcomes),
        "each sample once an epoch": share(each.once for each in outcomes),
        "the same samples in the same order": share(each.order for each in outcomes),
        "record of metrics": f"each {tool.log} once: {share(each.log for each in outcomes)}" if tool.log else "n/a",
        "steps repeated, median": f"{statistics.median(redone(each) for each in done):g}" if done else "",
        "leftover files at the end": share(each.litter for each in outcomes)
        + _in_brackets(litter[0].litter[0] if litter else ""),
    }


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def redone(outcome: Outcome) -> int:
    """Return the number of steps that the kill lost."""
    return max(0, outcome.kill.step - outcome.start)


def damaged(tool: Tool, job: Job, expected: Whole) -> list[str]:
    """Return how a resume handles a truncated file or a flipped bit in the newest checkpoint; a line per case."""
    kill, lines = Kill("forward", 33), []
    with begun(tool, job) as trial:
        first = killed(trial, kill, expected)
        aside = trial.place / "aside"
        shutil.copytree(trial.folder, aside)
        newest = tool.newest(trial.folder) or trial.folder
        files = sorted(newest.iterdir()) if newest.is_dir() else [newest]
        clean = trial.go(resume=True)
        usual = compared(trial, kill, first, clean, expected)
        for path, part in itertools.product(files, HARMS):
            shutil.rmtree(trial.folder)
            shutil.copytree(aside, trial.folder)
            _harm(path, part)
            last = trial.go(resume=True)
            found = compared(trial, kill, first, last, expected)
            same = bool(last.ended) and last.ended["weights"] == clean.ended.get("weights")
            told = f"one bit of {path.name} at {part:.0%}" if part else f"half of {path.name}"
            lines.append(f"{told}: {_verdict(found, usual, same)}")
    return lines


def summary(lines: list[str]) -> str:
    """Return the lines of `damaged` as one summary."""
    ends = {
        "goes on from step": "continue from the one before", "stops with": "stop with an error",
        "TAKEN": "are used without an error and end differently", "starts from scratch": "start from scratch",
        "without effect": "have no effect",
    }  # fmt: skip
    counts = {told: sum(end in line for line in lines) for end, told in ends.items()}
    return f"of {len(lines)}: " + ", ".join(f"{count} {told}" for told, count in counts.items() if count)


HARMS = (0.0, 0.3, 0.5, 0.7)
"""0: the file is truncated to half; otherwise the position in the file of the flipped bit."""


def _harm(path: Path, part: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * part)] ^= 0x40
    path.write_bytes(bytes(content) if part else path.read_bytes()[: len(content) // 2])


def _verdict(found: Outcome, usual: Outcome, same: bool) -> str:
    if found.error:
        return f"stops with {found.error[:100]}"
    if found.start == usual.start:
        return "taken as it is, without effect" if same else "TAKEN AS IT IS, and the run ends differently"
    ends = "ends bit-identical" if found.weights else "ends differently"
    from_start = (
        "starts from scratch" if found.start == 0 else f"goes on from step {found.start} instead of {usual.start}"
    )
    return f"{from_start}, {ends}"


def rotation(tool: Tool, expected: Whole) -> tuple[int, int, int]:
    """Keep one checkpoint, and kill at each file operation of a save and within its bytes.

    Returns:
        The number of kills, after how many a resume continues from a checkpoint, and after how many a complete one
        exists: the resume continues from one, possibly after deleting the newest by hand.
    """
    job = Job(keep=1)
    step = 30 if tool.each_step else 36
    count = whole(tool, job).operations(step)
    places = [Kill("file", step, (number + 0.5) / count) for number in range(count)]
    places += [Kill("saving", step, part) for part in (0.3, 0.6, 0.9)]
    outcomes = [interrupted(tool, job, kill, _with(expected, step, count)) for kill in places]
    whole_one = [each.start > 0 or (each.helped is not None and each.helped.start > 0) for each in outcomes]
    return len(places), sum(each.start > 0 for each in outcomes), sum(whole_one)


def _with(expected: Whole, step: int, count: int) -> Whole:
    ended = {**expected.ended, "operations": {**expected.ended["operations"], str(step): count}}
    return Whole(ended, expected.seen, expected.files, expected.again)


def cost_ms(tool: Tool) -> str:
    """Return the time of a save: from an optimizer step to the next one, or to validation, with a save and without.

    A library that saves by epoch does so between validation and the next step.
    """
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for saving in (True, False) * 3:
        with begun(tool, Job() if saving else Job(interval=None)) as trial:
            for step, gap in trial.go().ended[GAPS[tool.each_step]].items():
                last = int(step) % STEPS_AN_EPOCH == 0
                if (not last and int(step) % 5 == 0) if tool.each_step else (last and 0 < int(step) < STEPS):
                    gaps[saving].append(1000 * gap)
    with_it, without = (sorted(gaps[saving]) for saving in (True, False))
    middle = statistics.median(without)
    low, high = (with_it[len(with_it) * quarter // 4] - middle for quarter in (1, 3))
    return f"{statistics.median(with_it) - middle:.1f} ms ({low:.1f} to {high:.1f})"


GAPS = {True: "gaps", False: "rests"}


def measured(tool: Tool, asked: argparse.Namespace) -> dict[str, str]:
    """Return all cells of a library."""
    job = Job(phases=asked.phases)
    expected = whole(tool, job)
    outcomes = [interrupted(tool, job, kill, expected) for kill in kills(asked.kills, asked.seed)]
    if asked.details:
        for each in outcomes:
            print(tool.name, each)
    cells = rows(tool, expected, outcomes)
    if not asked.phases and not asked.quick:
        harmed = damaged(tool, job, expected)
        print(f"\n{tool.name}, the newest checkpoint damaged:\n" + "\n".join(f"- {line}" for line in harmed))
        cells["newest checkpoint damaged"] = summary(harmed)
        count, resumed, there = rotation(tool, expected)
        cells["killed while saving, one checkpoint kept: resumed"] = f"{resumed} of {count}"
        cells["killed while saving, one checkpoint kept: a complete one exists"] = f"{there} of {count}"
        cells["a save costs"] = cost_ms(tool)
    return cells


def main() -> None:
    """Print how each library handles a damaged checkpoint, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one library, by its name")
    parser.add_argument("--phases", action="store_true", help="the head first, then all layers")
    parser.add_argument("--quick", action="store_true", help="only the kills")
    parser.add_argument("--details", action="store_true", help="print each kill")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found = [each for each in tools(asked.only) if each.freezes or not asked.phases]
    found = [each for each in found if asked.phases or not getattr(each, "only_phases", False)]
    print(f"Python {platform.python_version()}, torch {torch.__version__} (CPU, 1 thread), {asked.kills} kills")
    cells = {each.name: measured(each, asked) for each in found}
    print("\n| | " + " | ".join(f"{each.name} {each.version()}" for each in found) + " |")
    print("| --- |" + " --- |" * len(found))
    for row in next(iter(cells.values())):
        print(f"| {row} | " + " | ".join(cells[each.name][row] for each in found) + " |", flush=True)


if __name__ == "__main__":
    main()
