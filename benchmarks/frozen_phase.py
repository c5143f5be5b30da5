"""The cost of a phase with a frozen backbone relative to one forward pass: 5 epochs, batch 32, validation after each.

    python benchmarks/frozen_phase.py --work digits --runs 7
    python benchmarks/frozen_phase.py --work resnet18 --runs 3

`one forward pass` is inference over all images at the fastest setting; `by hand` is that pass and the same steps of the
head on its features, `overlapped` with the pass over the validation images behind the first epoch. `tuneforge` is the
phase as a run executes it, hooks, metrics, freeze check and log included, on an empty cache; `whole run` adds reading
the data, the final evaluation and the files.
"""

from collections.abc import Mapping

import click
from common import Entry, in_turns, print_machine, print_ratios
from ours import empty_cache, entry_of, on_work
from peers import installed
from raw import FeaturePass, raw, raw_channels_last, raw_loader
from work import Network, Work, digits, photos

import tuneforge as tf

WORKS = {"digits": lambda: digits(frozen=True), "resnet18": photos}


def further_epochs(work: Work, network: Network) -> Mapping[str, float]:
    """Return rows of an entry: an epoch after the first of the phase, on cached features and without."""
    seconds = {}
    for row, cache in (("cached", "auto"), ("uncached", "off")):
        with empty_cache() as folder:
            seconds[row] = on_work(work, work.build(), folder / "run", cache=cache).further_epoch_s
    return seconds


def second_runs(work: Work, network: Network) -> Mapping[str, float]:
    """Return rows of an entry: the phase on an empty cache on disk, then in other runs that find its features there."""
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
@click.option("--samples", type=int, default=None, help="Number of training images; all by default.")
@click.option("--epochs", type=int, default=None, help="Number of epochs, if not 5.")
def main(chosen: str, runs: int, samples: int | None, epochs: int | None) -> None:
    """Print the phase beside the limit and other libraries, then the cost of a further epoch and of a second run."""
    work = WORKS[chosen]().cut(samples, epochs)
    libraries, feature_pass = installed(), FeaturePass.fastest(work)
    entries: dict[str, Entry] = {
        "one forward pass": feature_pass.over_all,
        "by hand": feature_pass.by_hand,
        "by hand, overlapped": feature_pass.overlapped,
        "raw loop, channels-last": raw_channels_last,
        "raw loop": raw,
        "raw loop, DataLoader": raw_loader,
        **libraries,
        "tuneforge": entry_of("tuneforge"),
        "tuneforge --cache off": entry_of("tuneforge --cache off", cache="off"),
    }
    size = f"{len(work.train[0]):,} + {len(work.val[0]):,} images, {work.epochs} epochs"
    print_machine(runs, f"frozen phase, {chosen}, {size}; fastest forward pass: {feature_pass}")
    print_ratios(in_turns(work, entries, runs), "one forward pass", "to one forward pass")

    rows = in_turns(work.cut(None, max(3, work.epochs)), {"epochs": further_epochs}, runs)
    print_ratios(rows, "cached", "each further epoch, to cached")
    print_ratios(in_turns(work, {"runs": second_runs}, runs), "first run", "to the first run")


if __name__ == "__main__":
    main()
