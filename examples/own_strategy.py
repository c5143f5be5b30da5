"""A strategy written from scratch: it decides from the metrics of each class.

tuneforge run --strategy own_strategy:WeakestClass --strategy.enough 0.99      (from this folder)
"""

from collections.abc import Iterator

import click

import tuneforge as tf
from tuneforge.plugin import StrategyStep


@tf.component(api=1)
class WeakestClass:
    """Train the head; then unfreeze one layer group at a time until the recall of the hardest class is high enough."""

    enough: float = tf.option(
        default=0.97, help="Recall of the hardest class that ends the run.", check=tf.between(0, 1)
    )
    epochs: int = tf.option(default=2, help="Epochs of each phase.", check=tf.ge(1))
    lr: float = tf.option(default=2e-3, help="Peak learning rate of the head.", check=tf.gt(0))

    @tf.hookimpl
    def finetune_strategy(self, task: tf.TaskInfo) -> Iterator[StrategyStep]:
        """Each `yield` returns the result of the step just executed."""
        schedule = tf.use("one-cycle", pct_start=0.3)
        for num_groups in range(1, len(task.groups) + 1):
            result = yield tf.Phase(
                f"top-{num_groups}",
                train=f"groups[-{num_groups}:]",
                epochs=self.epochs,
                lr=self.lr,
                layer_decay=0.7,
                schedule=schedule,
                class_weights="balanced",
                restore_best=True,
            )
            if result.val["recall_min"] >= self.enough:
                return


@click.command()
@click.option("--enough", default=0.97, show_default=True)
@click.option("--per-class", type=int, help="Training images of each class; all by default.")
def main(enough: float, per_class: int | None) -> None:
    """Run it by passing an instance; a name works too once a package installs it."""
    data = tf.use("digits", per_class=per_class)
    result = tf.Engine(data=data, strategy=WeakestClass(enough=enough), log=click.echo).run()
    for step, step_result in result.strategy_steps:
        metrics = step_result.val
        click.echo(f"{step.name}: hardest class {metrics['hardest_class']}, recall {metrics['recall_min']:.3f}")


if __name__ == "__main__":
    main()
