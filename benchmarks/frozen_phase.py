"""What a frozen phase costs beside one look at the data, here and elsewhere: 5 epochs, batch 32, validation after each.

    python benchmarks/frozen_phase.py --work digits --runs 7
    python benchmarks/frozen_phase.py --work resnet18 --runs 3

`one look` is an inference pass over all images at its fastest setting here; `by hand` is that look and the same head
steps on its features, `overlapped` with the look at the validation images behind the first epoch. `tuneforge` is the
phase as a run does it, hooks, metrics, proof and log included, on an empty cache; `whole run` adds reading the data,
the final evaluation and the files.
"""

from collections.abc import Mapping

import click
from common import Entry, in_turns, say_machine, say_ratios
from ours import empty_cache, entry_of, on_work
from peers import installed
from raw import Look, raw, raw_channels_last, raw_loader
from work import Network, Work, digits, photos

import tuneforge as tf

WORKS = {"digits": lambda: digits(frozen=True), "resnet18": photos}


def further_epochs(work: Work, network: Network) -> Mapping[str, float]:
    """Rows of an entry: an epoch after the first of the phase, on cached features and without."""
    seconds = {}
    for row, cache in (("cached", "auto"), ("uncached", "off")):
        with empty_cache() as folder:
            seconds[row] = on_work(work, work.build(), folder / "run", cache=cache).further_epoch_s
    return seconds


def second_runs(work: Work, network: Network) -> Mapping[str, float]:
    """Rows of an entry: the phase on an empty cache on disk, then in other runs on what the first one left there."""
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    other = tf.Phase("other", train="head", epochs=work.epochs, lr=0.003, schedule="cosine", restore_best=True)
    runs = {"first run": {}, "second seed": {"seed": 1}, "second strategy": {"strategy": [other]}}
    seconds = {}
    with empty_cache() as folder:  # one TUNEFORGE_CACHE for all three: the second and third find what the first left
        for number, (row, flags) in enumerate(runs.items()):
            again = work.build()
            again.load_state_dict(weights)
            seconds[row] = on_work(work, again, folder / str(number), **flags).steps_s
    return seconds


@click.command()
@click.option("--work", "chosen", type=click.Choice(list(WORKS)), default="digits", show_default=True)
@click.option("--runs", default=7, show_default=True)
@click.option("--samples", type=int, default=None, help="Of the training images only so many.")
@click.option("--epochs", type=int, default=None, help="Other than 5.")
def main(chosen: str, runs: int, samples: int | None, epochs: int | None) -> None:
    """Print the phase beside the limit and the peers, then what a further epoch and a second run cost."""
    work = WORKS[chosen]().cut(samples, epochs)
    libraries, look = installed(), Look.fastest(work)
    entries: dict[str, Entry] = {
        "one look": look.over_all,
        "by hand": look.by_hand,
        "by hand, overlapped": look.overlapped,
        "raw loop, channels-last": raw_channels_last,
        "raw loop": raw,
        "raw loop, DataLoader": raw_loader,
        **libraries,
        "tuneforge": entry_of("tuneforge"),
        "tuneforge --cache off": entry_of("tuneforge --cache off", cache="off"),
    }
    size = f"{len(work.train[0]):,} + {len(work.val[0]):,} images, {work.epochs} epochs"
    say_machine(runs, f"frozen phase, {chosen}, {size}; a look is fastest with {look}")
    say_ratios(in_turns(work, entries, runs), "one look", "to one look")

    rows = in_turns(work.cut(None, max(3, work.epochs)), {"epochs": further_epochs}, runs)
    say_ratios(rows, "cached", "each further epoch, to cached")
    say_ratios(in_turns(work, {"runs": second_runs}, runs), "first run", "to the first run")


if __name__ == "__main__":
    main()
