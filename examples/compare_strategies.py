"""Compare strategies at equal cost: decided on validation, with a paired test and a plot.

The same from the command line, without the function below:

tuneforge compare --strategies head-only:epochs=10,full:epochs=10,lp-ft:epochs=10,greedy-soup --budget 10epochs
"""

from pathlib import Path

import click

import tuneforge as tf
from tuneforge.plugin import StrategyStep


def last_block(task: tf.TaskInfo) -> list[StrategyStep]:
    """Train the head and the block below it: a function of the task is a strategy too."""
    return [tf.Phase("top", train="groups[-2:]", epochs=10, lr=1e-3, schedule="cosine", restore_best=True)]


@click.command()
@click.option("--seeds", default=5, show_default=True)
@click.option("--budget", default="10epochs", show_default=True, help="Budget of each run; a run may end earlier.")
@click.option("--per-class", default=20, show_default=True, help="Training images of each class.")
@click.option("--out", default="study", show_default=True, type=click.Path(path_type=Path))
def main(seeds: int, budget: str, per_class: int, out: Path) -> None:
    """Run the comparison; if it is stopped or killed, the same command continues it."""
    candidates = [
        "head-only:epochs=10",
        tf.use("full", epochs=10),
        tf.use("lp-ft", epochs=10),
        last_block,
        "greedy-soup",
    ]
    comparison = tf.compare(
        candidates,
        seeds=seeds,
        budget=budget,
        baseline="full:epochs=10",
        data=tf.use("digits", per_class=per_class),
        page=False,
        out=out,
        log=click.echo,
    )
    click.echo(comparison.table)
    click.echo(f"plot: {comparison.study_dir}/cost.svg")
    for each in comparison.results["candidates"]:
        click.echo(f"{each['name']}: {each['verdict']}")


if __name__ == "__main__":
    main()
