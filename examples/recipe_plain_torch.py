"""A common fine-tuning recipe in plain PyTorch, corrected; `recipe_tuneforge.py` is the same as one command.

Corrected: (1) ReLU was applied to the logits, which removes every negative one; (2) images were reshaped to rows of 32
before a convolution that takes (batch, 3, 32, 32); (3) no pretrained weights were loaded; (4) ten outputs, and no class
for other characters; (5) it never validated and (6) never called eval(); (7) a loop variable had the name of its
module; (8) it reported no recall and no F1. Kept: DataLoader, SGD 0.01 with momentum 0.9, batches of 32, 10 epochs.
"""

from types import SimpleNamespace

import click
import torch
from sklearn.metrics import classification_report
from torch.utils.data import DataLoader, TensorDataset

import tuneforge as tf
from tuneforge.builtin.datasets.demo.digits import Digits
from tuneforge.builtin.models.digit_cnn import PRETRAINED_WEIGHTS, DigitNet
from tuneforge.exporting import load_tensors


def loader(data: tf.Data, split: tf.Split, *, shuffle: bool) -> DataLoader:
    """A split as a DataLoader: images (batch, 3, 32, 32) and labels (batch,)."""
    inputs = data.inputs.preprocess(split.fetch(torch.arange(len(split))))
    return DataLoader(TensorDataset(inputs, split.targets), batch_size=32, shuffle=shuffle)


def predictions(network: torch.nn.Module, batches: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the predicted classes (n,) and the labels (n,)."""
    network.eval()  # (6)
    with torch.inference_mode():
        pairs = [(network(images).argmax(1), labels) for images, labels in batches]
    return torch.cat([predicted for predicted, _ in pairs]), torch.cat([labels for _, labels in pairs])


@click.command()
@click.option("--epochs", default=10, show_default=True)
@click.option("--per-class", type=int, help="Training images of each class; all by default.")
def main(epochs: int, per_class: int | None) -> None:
    """Train and report."""
    torch.manual_seed(0)
    data = Digits(per_class=per_class).data_prepare(SimpleNamespace(data_seed=0))
    network = DigitNet(11)  # (4); its forward ends on the head: (1), (2)
    shipped, _ = load_tensors(PRETRAINED_WEIGHTS)
    network.load_state_dict({k: w.float() for k, w in shipped.items() if "head" not in k}, strict=False)  # (3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for epoch in range(epochs):
        network.train()
        for images, labels in loader(data, data.train, shuffle=True):  # (7)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        predicted, labels = predictions(network, loader(data, data.val, shuffle=False))  # (5)
        click.echo(f"epoch {epoch + 1}: validation accuracy {(predicted == labels).float().mean():.4f}")
    predicted, labels = predictions(network, loader(data, data.test, shuffle=False))
    click.echo(classification_report(labels, predicted, target_names=data.targets.labels, zero_division=0))  # (8)


if __name__ == "__main__":
    main()
