"""Fine-tune the CNN that ships on the digits that ship: what `tuneforge run` does, in Python."""

import click

import tuneforge as tf


@click.command()
@click.option("--epochs", default=8, show_default=True, help="Epochs with every layer trained.")
@click.option("--per-class", type=int, help="Training images of each class; all by default.")
def main(epochs: int, per_class: int | None) -> None:
    """Run the default strategy and print the test accuracy."""
    strategy = tf.use("freeze-then-unfreeze", epochs=epochs)
    result = tf.Engine(data=tf.use("digits", per_class=per_class), strategy=strategy, log=click.echo).run()
    click.echo(f"test accuracy {result.report['splits']['test']['accuracy']:.4f}; run directory: {result.run_dir}")


if __name__ == "__main__":
    main()
