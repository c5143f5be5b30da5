"""Training every layer of the digit CNN: 1,437 + 360 digits, 5 epochs, batch 32, validation after each.

    python benchmarks/unfrozen.py --runs 5 --pairs 15

First each entry with its own settings, relative to the raw loop in channels-last. Then the engine against the tight raw
loop with the same numerics (memory format, batch, validation batch, optimizer), back to back, with the 95 % interval of
the mean of the paired ratios.
"""

import click
from common import Entry, in_pairs, in_turns, interval, print_machine, print_ratios, print_table
from ours import entry_of
from peers import installed
from raw import raw, raw_bfloat16, raw_channels_last, raw_loader
from work import Work, digits

LAYOUTS: dict[str, Entry] = {"channels-last": raw_channels_last, "contiguous": raw}


def paired(work: Work, layout: str, count: int) -> tuple[str, ...]:
    """Return a row: the engine relative to the raw loop in a memory format."""
    engine = entry_of("engine", memory_format=layout, eval_batch_size=work.batch)
    ratios = [own / base for own, base in in_pairs(work, engine, LAYOUTS[layout], count)]
    mean, low, high = interval(ratios)
    return layout, f"{mean:.3f}", f"[{low:.3f} .. {high:.3f}]", f"[{min(ratios):.3f} .. {max(ratios):.3f}]", str(count)


@click.command()
@click.option("--runs", default=5, show_default=True)
@click.option("--pairs", default=15, show_default=True)
@click.option("--samples", type=int, default=None, help="Number of training images; all by default.")
@click.option("--epochs", type=int, default=None, help="Number of epochs, if not 5.")
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
    print_machine(runs, f"every layer of the digit CNN, {size}")
    print_ratios(in_turns(work, entries, runs), "raw loop, channels-last", "to the raw loop, channels-last")
    heads = ("the same arithmetic, in pairs", "mean ratio to the raw loop", "95 % interval", "spread", "pairs")
    print_table(heads, [paired(work, layout, pairs) for layout in LAYOUTS])


if __name__ == "__main__":
    main()
