"""A strategy written from scratch: it converses with the engine and decides from the whole report.

tuneforge run --strategy own_strategy:WeakestClass --strategy.enough 0.99      (from this folder)
"""

from collections.abc import Iterator

import click

import tuneforge as tf
from tuneforge.plugin import StrategyStep


@tf.component(api=1)
class WeakestClass:
    """Train the head; then thaw one layer group at a time until the weakest class is recognised well enough."""

    enough: float = tf.option(
        default=0.97, help="Recall of the weakest class that ends the run.", check=tf.between(0, 1)
    )
    epochs: int = tf.option(default=2, help="Epochs of each phase.", check=tf.ge(1))
    lr: float = tf.option(default=2e-3, help="Peak learning rate of the head.", check=tf.gt(0))

    @tf.hookimpl
    def finetune_strategy(self, task: tf.TaskInfo) -> Iterator[StrategyStep]:
        """Each `yield` returns the engine's report on the step just done."""
        schedule = tf.use("one-cycle", pct_start=0.3)
        for thawed in range(1, len(task.groups) + 1):
            report = yield tf.Phase(
                f"top-{thawed}",
                train=f"groups[-{thawed}:]",
                epochs=self.epochs,
                lr=self.lr,
                layer_decay=0.7,
                schedule=schedule,
                class_weights="balanced",
                restore_best=True,
            )
            if report.val["recall_min"] >= self.enough:
                return


@click.command()
@click.option("--enough", default=0.97, show_default=True)
@click.option("--per-class", type=int, help="Training images of each class; all by default.")
def main(enough: float, per_class: int | None) -> None:
    """Run it by handing over an instance; a name works as well once a package installs it."""
    data = tf.use("digits", per_class=per_class)
    result = tf.Engine(data=data, strategy=WeakestClass(enough=enough), log=click.echo).run()
    for step, report in result.strategy_steps:
        click.echo(f"{step.name}: weakest class {report.val['hardest_class']}, recall {report.val['recall_min']:.3f}")


if __name__ == "__main__":
    main()
