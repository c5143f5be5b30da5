"""L2-SP (Li et al. 2018, arXiv 1802.01483) in the domain that the network knows, and in another one.

Claim: the penalty on the distance to the start helps with few labels of the same domain, and does not where the domains
differ (Li et al. 2020, arXiv 2002.11770). A network that knows handwritten digits is fine-tuned on other handwritten
digits, then on rendered small letters, without the penalty and with three strengths of it.
"""

from __future__ import annotations

import click
import torch
from shifts import Kind, fine_tune, make_domain
from tables import difference, interval, print_table

import tuneforge as tf

DOMAINS = {"same: digits": Kind("", "hand", "hand"), "other: letters": Kind("", "hand", "small letters")}
STRENGTHS = (0.01, 0.1, 1.0)


@click.command()
@click.option("--seeds", default=6, show_default=True)
@click.option("--per-class", default=6, show_default=True, help="Labels per class; a third are for validation.")
@click.option("--epochs", default=20, show_default=True)
def main(seeds: int, per_class: int, epochs: int) -> None:
    """Print test accuracy of each strength in each domain, and the paired difference to `full`."""
    torch.set_num_threads(1)
    methods = {"full": tf.use("full", epochs=epochs, lr=3e-3)}
    methods |= {f"l2-sp, alpha {alpha:g}": tf.use("l2-sp", epochs=epochs, lr=3e-3, alpha=alpha) for alpha in STRENGTHS}
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(seeds):
        for domain, kind in DOMAINS.items():
            model, data = make_domain(kind, seed, per_class)
            for name, strategy in methods.items():
                report = fine_tune(model, data, strategy, seed=seed).report
                found.setdefault((domain, name), []).append(report["splits"]["test"]["accuracy"])

    def line(key: tuple[str, str]) -> list[str]:
        domain, name = key
        gain = [mine - other for mine, other in zip(found[key], found[domain, "full"], strict=True)]
        mean, low, high = (100 * each for each in interval(found[key]))
        return [domain, name, f"{mean:.1f} ({low:.1f} to {high:.1f})", "" if name == "full" else difference(gain)]

    print_table(("domain", "strategy", "accuracy", "over `full`"), map(line, sorted(found, key=lambda key: key[0])))


if __name__ == "__main__":
    main()
