"""`auto`: find out which block of layers the shift of the data concerns, and tune that one.

It imports no torch, so that `tuneforge run --strategy auto --help` shows its options at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuneforge import Blend, Brief, Phase, Probe, Readings, Report, Steps, component, ge, gt, hookimpl, option, use
from tuneforge.builtin.strategies.adaptive import better, compared, first
from tuneforge.builtin.strategies.fixed import has_fresh_rows


@component(api=1)
class Auto:
    """Diagnose what has shifted, tune each block that it may concern from the same start, and keep the best of them.

    Surgical fine-tuning (Lee et al. 2023, arXiv 2210.11466) tunes one block: the first for a shift of the inputs, the
    head for one of the answers. Which one is diagnosed on the labelled target samples, then checked by validation:

    - Confusion: where naming each answer anew would make it right, by more than two standard errors, the head leads.
    - Drift: the lowest block whose features on validation lie off those on training, three times as far as chance
      would have it, comes next.
    - Gradients: the other blocks follow by relative gradient norm |g| / |w|, mean over `batches` batches.

    The first `candidates` of these are tuned, each from the same weights, and compared as `adaptive` compares. The best
    is mixed with the start in the share that validation's loss prefers (WiSE-FT, Wortsman et al. 2022, 2109.01903).
    Last, all layers train from there at a tenth of the rate, which is kept where it gains: was the block enough? Fresh
    rows of the head are brought to the data first.
    """

    candidates: int = option(default=4, help="Blocks that are tried.", check=ge(1))
    epochs: int = option(default=20, help="Epochs of each.", check=ge(1))
    lr: float = option(default=1e-2, help="Peak learning rate of each.", check=gt(0))
    then_all: bool = option(default=True, help="Train all layers from there, and keep that where it gains.")
    batches: int = option(default=5, help="Training batches that a measurement looks at.", check=ge(1))

    @hookimpl
    def finetune_strategy(self, brief: Brief) -> Steps:
        """The measurements, a phase for each candidate, and the way back to the best."""
        if has_fresh_rows(brief):
            start = yield first(brief, epochs=self.epochs, lr=self.lr)
        else:
            start = yield Blend("before", snapshots=("start",), why="what goes wrong untuned tells what has shifted")
        gradients = yield Probe("gradients", batches=self.batches, why="which block do the samples pull at?")
        drift = yield Probe("drift", measure="features", batches=self.batches, why="do validation and training differ?")
        ranked = [start]
        for block, why in suspects(brief, start, gradients, drift, self.batches)[: self.candidates]:
            if len(ranked) > 1:
                again = "every block is tried from the same weights"
                yield Blend(f"before-{block}", snapshots=(start.step,), why=again)
            index = [group.name for group in brief.groups].index(block)
            report = yield self._phase(f"{block}-only", train=f"groups[{index}]", lr=self.lr, why=why)
            place = next((place for place, each in enumerate(ranked) if better(report, each, brief)), len(ranked))
            ranked.insert(place, report)
        found = yield chosen(brief, start, ranked)
        if self.then_all:
            why = "is the block all that has shifted?"
            report = yield self._phase("all", train="all", lr=self.lr / 10, why=why)
            if not better(report, found, brief):
                why = f"it is: {compared(report, found, brief)}"
                yield Blend("end", snapshots=(found.step,), why=why)

    def _phase(self, name: str, *, train: str, lr: float, why: str) -> Phase:
        schedule = use("cosine", warmup=0.1)
        return Phase(name, train=train, epochs=self.epochs, lr=lr, schedule=schedule, restore_best=True, why=why)


def suspects(
    brief: Brief, before: Report, gradients: Readings, drift: Readings, batches: int
) -> Sequence[tuple[str, str]]:
    """Blocks in the order in which they deserve a trial, each with the reason."""
    found: dict[str, str] = {}
    right, renamed, error = relabelled(before)
    if renamed - right > 2 * error:
        found[brief.head.name] = f"naming answers anew would bring accuracy from {right:.2f} to {renamed:.2f}"
    seen = [min(batches * brief.batch_size, count) for count in (brief.num_train, brief.num_val)]
    chance = math.sqrt(2 / math.pi * (1 / seen[0] + 1 / seen[1]))
    for block, value in drift.values.items():
        if block in gradients.values and value > 3 * chance:
            found.setdefault(block, f"the lowest whose features drift: {value:.2f} deviations, {chance:.2f} by chance")
            break
    for block, value in sorted(gradients.values.items(), key=lambda pair: -pair[1]):
        found.setdefault(block, f"its relative gradient norm is {value:.3g}")
    return list(found.items())


def relabelled(report: Report) -> tuple[float, float, float]:
    """Accuracy as it is, after the best renaming of each answer, and the latter's standard error; 0 without classes."""
    confusion = report.val.get("confusion", ())
    count = sum(map(sum, confusion))
    if not count:
        return 0.0, 0.0, 0.0
    right = sum(row[place] for place, row in enumerate(confusion)) / count
    renamed = sum(map(max, zip(*confusion, strict=True))) / count
    return right, renamed, math.sqrt(renamed * (1 - renamed) / count)


def chosen(brief: Brief, start: Report, ranked: Sequence[Report]) -> Blend:
    """The way to the best of some reports, which come best first, mixed with the start in the share that pays."""
    best, second = ranked[:2]
    why = f"'{best.step}' is best on validation, {compared(best, second, brief)} of '{second.step}'"
    if best is start:
        return Blend("chosen", snapshots=(start.step,), why=f"no block gains anything: {why}")
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    monitor = {"monitor": "loss", "monitor_mode": "min"} if "loss" in best.val else {}
    return Blend("chosen", snapshots=(start.step, best.step), weights=shares, why=why, **monitor)
