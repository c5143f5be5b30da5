"""Handwritten digits in a data set where 60 % are the digits 0-9 and 40 % are other characters.

Prints more than the accuracy: metrics on the real digits alone, on printed digits of a font family that neither
training nor pretraining has seen (the split `unseen font`), and the most frequent confusions.
"""

import click

import tuneforge as tf


@click.command()
@click.option("--other-share", default=0.4, show_default=True)
@click.option("--epochs", default=8, show_default=True)
@click.option("--per-class", type=int, help="Training images of each class; all by default.")
def main(other_share: float, epochs: int, per_class: int | None) -> None:
    """Fine-tune, and read the report from Python."""
    result = tf.Engine(
        data=tf.use("digits", other_share=other_share, per_class=per_class),
        strategy=tf.use("freeze-then-unfreeze", epochs=epochs),
        log=click.echo,
    ).run()
    splits = result.report["splits"]
    for name, metrics in splits.items():
        click.echo(f"{name:12} accuracy {metrics['accuracy']:.4f}  recall {metrics['recall_macro']:.4f}")
    classes = list(splits["test"]["per_class"])
    confusions = [
        (count, classes[label], classes[prediction])
        for label, row in enumerate(splits["test"]["confusion"])
        for prediction, count in enumerate(row)
        if label != prediction and count
    ]
    for count, label, prediction in sorted(confusions, reverse=True)[:5]:
        click.echo(f"{count} x label {label}, predicted {prediction}")


if __name__ == "__main__":
    main()
