"""Training every layer of the digit CNN: 1,437 + 360 digits, 5 epochs, batch 32, validation after each.

    python benchmarks/unfrozen.py --runs 5 --pairs 15

First what each entry takes by itself: `tuneforge` picks its own settings, so its ratio to the raw loop in channels-last
says what they are worth. Then the engine against the tight raw loop at the same arithmetic (layout, batch, validation
batch, optimizer), back to back, with the 95 % interval of the mean of the paired ratios.
"""

import click
from common import Entry, in_pairs, in_turns, interval, say_machine, say_ratios, say_table
from ours import entry_of
from peers import installed
from raw import raw, raw_bfloat16, raw_channels_last, raw_loader
from work import Work, digits

LAYOUTS: dict[str, Entry] = {"channels-last": raw_channels_last, "contiguous": raw}


def paired(work: Work, layout: str, count: int) -> tuple[str, ...]:
    """A row: the engine to the raw loop in a layout."""
    engine = entry_of("engine", memory_format=layout, eval_batch_size=work.batch)
    ratios = [own / base for own, base in in_pairs(work, engine, LAYOUTS[layout], count)]
    mean, low, high = interval(ratios)
    return layout, f"{mean:.3f}", f"[{low:.3f} .. {high:.3f}]", f"[{min(ratios):.3f} .. {max(ratios):.3f}]", str(count)


@click.command()
@click.option("--runs", default=5, show_default=True)
@click.option("--pairs", default=15, show_default=True)
@click.option("--samples", type=int, default=None, help="Of the training images only so many.")
@click.option("--epochs", type=int, default=None, help="Other than 5.")
def main(runs: int, pairs: int, samples: int | None, epochs: int | None) -> None:
    """Print both tables."""
    work = digits(frozen=False).cut(samples, epochs)
    entries: dict[str, Entry] = {
        "raw loop, channels-last": raw_channels_last,
        "raw loop": raw,
        "raw loop, channels-last, bfloat16": raw_bfloat16,
        "raw loop, DataLoader": raw_loader,
        **installed(),
        "tuneforge": entry_of("tuneforge"),
        "tuneforge --precision bf16": entry_of("tuneforge --precision bf16", precision="bf16"),
    }
    size = f"{len(work.train[0]):,} + {len(work.val[0]):,} digits, {work.epochs} epochs"
    say_machine(runs, f"every layer of the digit CNN, {size}")
    say_ratios(in_turns(work, entries, runs), "raw loop, channels-last", "to the raw loop, channels-last")
    heads = ("the same arithmetic, in pairs", "mean ratio to the raw loop", "95 % interval", "spread", "pairs")
    say_table(heads, [paired(work, layout, pairs) for layout in LAYOUTS])


if __name__ == "__main__":
    main()
