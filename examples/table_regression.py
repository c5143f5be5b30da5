"""Regression on a table.

tuneforge run --data table-csv --data.path diabetes.csv --data.target progression --model mlp
"""

import csv
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from sklearn.datasets import load_diabetes

import tuneforge as tf


def write_table(path: Path) -> None:
    """Write the 442 patients that ship with scikit-learn as a CSV file with a header."""
    patients = load_diabetes(scaled=False)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*patients.feature_names, "progression"])
        writer.writerows([*row, target] for row, target in zip(patients.data, patients.target, strict=True))


@click.command()
@click.option("--epochs", default=30, show_default=True)
def main(epochs: int) -> None:
    """Train a small network to predict the progression of diabetes after a year."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "diabetes.csv"
        write_table(path)
        result = tf.Engine(
            data=tf.use("table-csv", path=path, target="progression"),
            model=tf.use("mlp", hidden=(64, 64)),
            strategy=tf.use("full", epochs=epochs, lr=3e-3),
            log=click.echo,
        ).run()
        row = next(csv.DictReader(path.open()))
    prediction = next(tf.predict(result.run_dir, [row]))
    click.echo(f"first patient: {row['progression']}, predicted {prediction['value']:.0f}")


if __name__ == "__main__":
    main()
