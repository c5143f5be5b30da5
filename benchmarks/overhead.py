"""The overhead of a training loop: a model that costs nothing, 1,000 steps at batch 32, validation every 200.

    python benchmarks/overhead.py --runs 11 --pairs 20

Every row is in microseconds per step, over the tight raw loop in the same round. `tuneforge` runs with hooks, metrics,
freeze check, log and checkpoint timer on; `validation at 32` is the same with the validation batch size of the others.
The last table gives both against the raw loop back to back.
"""

import statistics
from functools import partial

import click
from common import Entry, Times, in_pairs, in_turns, interval, print_machine, print_table
from ours import entry_of
from peers import installed
from raw import raw, raw_loader
from work import Work, free

RAW, OURS, SAME = "raw loop", "tuneforge", "tuneforge, validation at 32"
entry = partial(entry_of, cache="off")  # nothing is frozen


def over_raw(times: Times, work: Work) -> list[tuple[str, ...]]:
    """Return rows: microseconds per step, and those over the raw loop with their spread over the rounds."""
    rows = []
    for name, seconds in times.items():
        over = [1e6 * (own - base) / work.steps for own, base in zip(seconds, times[RAW], strict=True)]
        own = 1e6 * statistics.median(seconds) / work.steps
        rows.append((name, f"{own:.0f}", f"{statistics.median(over):.0f}", f"[{min(over):.0f} .. {max(over):.0f}]"))
    return rows


def paired(work: Work, name: str, one: Entry, count: int) -> tuple[str, ...]:
    """Return a row: the mean of `one` over the raw loop, back to back, with its 95 % interval."""
    over = [1e6 * (own - base) / work.steps for own, base in in_pairs(work, one, raw, count)]
    mean, low, high = interval(over)
    return name, f"{mean:.0f}", f"[{low:.0f} .. {high:.0f}]", str(count)


@click.command()
@click.option("--runs", default=11, show_default=True)
@click.option("--pairs", default=20, show_default=True)
@click.option("--samples", type=int, default=None, help="Of the training rows only so many.")
@click.option("--epochs", type=int, default=None, help="Other than 5.")
def main(runs: int, pairs: int, samples: int | None, epochs: int | None) -> None:
    """Print both tables."""
    work = free().cut(samples, epochs)
    alike = entry(SAME, eval_batch_size=work.batch)
    entries: dict[str, Entry] = {RAW: raw, "raw loop, DataLoader": raw_loader, **installed()}
    entries |= {OURS: entry(OURS), SAME: alike}
    print_machine(runs, f"overhead of the loop, {work.steps:,} steps of a model that costs nothing")
    heads = ("entry", "microseconds per step", "over the raw loop", "spread")
    print_table(heads, over_raw(in_turns(work, entries, runs), work))
    rows = [paired(work, name, one, pairs) for name, one in ((OURS, entry(OURS)), (SAME, alike))]
    print_table(("in pairs", "microseconds per step over the raw loop, mean", "95 % interval", "pairs"), rows)


if __name__ == "__main__":
    main()
