"""Your own images, one folder per class. Here the folders are made from scikit-learn's digits.

tuneforge run --data image-folder --data.path FOLDER --data.size 32
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import click
from PIL import Image
from sklearn.datasets import load_digits

import tuneforge as tf


def write_images(folder: Path, count: int) -> None:
    """Write `count` digits as PNG files into folders named by their class."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:count], digits.target, strict=False)):
        path = folder / f"digit {label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).resize((32, 32), Image.Resampling.BILINEAR).save(path)


@click.command()
@click.option("--count", default=600, show_default=True, help="Images to make.")
@click.option("--epochs", default=6, show_default=True)
def main(count: int, epochs: int) -> None:
    """Fine-tune on the folders, then predict the class of one image."""
    with TemporaryDirectory() as folder:
        write_images(Path(folder), count)
        data = tf.use("image-folder", path=folder, size=32)
        strategy = tf.use("freeze-then-unfreeze", epochs=epochs)
        result = tf.Engine(data=data, strategy=strategy, augment=["rotate", "shift"], log=click.echo).run()
        path = sorted(Path(folder).glob("*/*.png"))[0]
        prediction = next(tf.predict(result.run_dir, [path]))
        probability = prediction["probability"]
        click.echo(f"{path.parent.name}: predicted {prediction['class']} with probability {probability:.2f}")


if __name__ == "__main__":
    main()
