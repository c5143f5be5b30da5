"""The engine from Python: your own arrays, your own network, steps as a list, then predictions."""

import click
import numpy as np
import torch
from sklearn.datasets import load_wine

import tuneforge as tf
from tuneforge.sklearn import data_from_arrays


class Network(torch.nn.Module):
    """Two hidden layers and a head: (batch, 13) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(13, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.ReLU()
        )
        self.head = torch.nn.Linear(32, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, 3) of standardized rows (batch, 13)."""
        logits: torch.Tensor = self.head(self.body(rows))
        return logits


@click.command()
@click.option("--epochs", default=20, show_default=True)
def main(epochs: int) -> None:
    """Fine-tune on the 178 wines that ship with scikit-learn, then classify three of them."""
    wines = load_wine()
    names = np.array(["Barolo", "Grignolino", "Barbera"])[wines.target]
    torch.manual_seed(0)
    network = Network()
    steps = [
        tf.Phase("all", epochs=epochs, lr=0.01, schedule="cosine", patience=8, restore_best=True),
        tf.HeadFit("head"),
    ]
    data = data_from_arrays(wines.data.astype("float32"), names, standardize=True)
    result = tf.Engine(data=data, model=network, strategy=steps, log=click.echo, seed=1).run()

    predictor = tf.load(result.run_dir, model=network)
    for row, name in list(zip(wines.data, names, strict=True))[::60]:
        prediction = next(predictor.predict([row.astype("float32")]))
        click.echo(f"{name}: predicted {prediction['class']} with probability {prediction['probability']:.2f}")


if __name__ == "__main__":
    main()
