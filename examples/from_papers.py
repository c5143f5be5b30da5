"""Three strategies from papers, each a function of the task: DFR, FreezeOut and Freeze-Embed.

python examples/from_papers.py freezeout
"""

import math

import click

import tuneforge as tf
from tuneforge.plugin import StrategySteps


def dfr(task: tf.TaskInfo) -> StrategySteps:
    """Train all layers, then the head on a class-balanced sample: deep feature reweighting (Kirichenko et al. 2023)."""
    yield tf.Phase("all", epochs=3, lr=1e-3, schedule="cosine")
    yield tf.Phase("head", train="head", epochs=3, lr=2e-3, sampling="balanced", restore_best=True)


def freezeout(task: tf.TaskInfo, epochs: int = 6, first: float = 0.5, lr: float = 1e-3) -> StrategySteps:
    """Freeze the layer groups one after another from the input, each with its own cosine schedule (Brock et al. 2017).

    Group i of n stops after the fraction t = first + (1 - first) * i / (n - 1) of the epochs; its learning rate at the
    fraction s is lr / t * (1 + cos(pi * s / t)) / 2. Outputs of the frozen groups are cached from then on.
    """
    last = len(task.groups) - 1
    ends = {group.name: first + (1 - first) * index / max(1, last) for index, group in enumerate(task.groups)}
    for epoch in range(epochs):
        fraction = (epoch + 0.5) / epochs
        scales = {
            name: (1 + math.cos(math.pi * fraction / end)) / 2 / end for name, end in ends.items() if fraction < end
        } or {task.head.name: 1.0}
        yield tf.Phase(f"epoch {epoch + 1}", train=tuple(scales), epochs=1, lr=lr, lr_scales=scales)


def freeze_embed(task: tf.TaskInfo) -> StrategySteps:
    """Train with SGD and the first layer frozen, to match AdamW with less memory (Kumar et al. 2022, 2211.09359)."""
    rest = ("all", f"!{task.groups[0].name}")
    yield tf.Phase("all but the first", train=rest, epochs=4, lr=1e-2, optimizer=tf.use("sgd", momentum=0.9))


STRATEGIES = {"dfr": dfr, "freezeout": freezeout, "freeze-embed": freeze_embed}


@click.command()
@click.argument("name", type=click.Choice(list(STRATEGIES)), default="freezeout")
@click.option("--per-class", type=int, help="Training images of each class; all by default.")
def main(name: str, per_class: int | None) -> None:
    """Fine-tune on the digits that ship with the package."""
    tf.Engine(data=tf.use("digits", per_class=per_class), strategy=STRATEGIES[name], log=click.echo).run()


if __name__ == "__main__":
    main()
