"""The first example: handwritten digits in a set where 60 % are the digits 0-9 and 40 % are other characters.

Prints what matters beyond the accuracy: are the real digits alone recognised, is print mistaken for `other` (the
control set: digits of a font family that neither training nor pretraining has seen), and what is confused with what.
"""

import click

import tuneforge as tf


@click.command()
@click.option("--other-share", default=0.4, show_default=True)
@click.option("--epochs", default=8, show_default=True)
@click.option("--per-class", type=int, help="Training images of each class; all by default.")
def main(other_share: float, epochs: int, per_class: int | None) -> None:
    """Tune, and look at the report as a program."""
    result = tf.Engine(
        data=tf.use("digits", other_share=other_share, per_class=per_class),
        strategy=tf.use("freeze-then-unfreeze", epochs=epochs),
        log=click.echo,
    ).run()
    splits = result.report["splits"]
    for name, figures in splits.items():
        click.echo(f"{name:12} accuracy {figures['accuracy']:.4f}  recall {figures['recall_macro']:.4f}")
    classes = list(splits["test"]["per_class"])
    confusions = [
        (count, classes[truth], classes[answer])
        for truth, row in enumerate(splits["test"]["confusion"])
        for answer, count in enumerate(row)
        if truth != answer and count
    ]
    for count, truth, answer in sorted(confusions, reverse=True)[:5]:
        click.echo(f"{count} x {truth} taken for {answer}")


if __name__ == "__main__":
    main()
