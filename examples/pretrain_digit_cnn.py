"""Pretrain the digit CNN on rendered glyphs: this is how the weights that ship with tuneforge were made.

    python examples/pretrain_digit_cnn.py --out digit_cnn.safetensors

62 classes (0-9, A-Z, a-z) in the shape of optdigits, drawn anew by the generator in `characters/`: the network has seen
none of the images that ship, and the control family of the digits is among none of the fonts. More fonts are welcome:
`--fonts FOLDER` may be repeated. Case is normalized away, so a part of the letters (o and O, s and S) cannot be told
apart; what the network learns is strokes. Prints the accuracy on test glyphs, which a test checks.
"""

from itertools import pairwise
from pathlib import Path

import click
import torch
from characters.glyphs import glyph_images

import tuneforge as tf
from tuneforge.builtin.datasets.demo.digits import INPUTS, stored_images
from tuneforge.builtin.targets import ClassTargets
from tuneforge.exporting import load_tensors, save_tensors


def glyphs(count: int, fonts: tuple[Path, ...]) -> tf.Data:
    """Render `count` characters and split them 80:10:10."""
    drawn = glyph_images(count, seed=0, folders=fonts)
    images, labels = stored_images(drawn.images), torch.from_numpy(drawn.labels)
    ends = [round(share * count) for share in (0, 0.8, 0.9, 1)]
    train, val, test = (tf.Split(images[start:end], labels[start:end]) for start, end in pairwise(ends))
    return tf.Data(train=train, val=val, test=test, inputs=INPUTS, targets=ClassTargets(names=drawn.class_names))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("digit_cnn.safetensors"), show_default=True)
@click.option("--count", default=40_000, show_default=True, help="Glyphs in all.")
@click.option("--epochs", default=6, show_default=True)
@click.option("--fonts", multiple=True, type=click.Path(path_type=Path, exists=True), help="A further font folder.")
def main(out: Path, count: int, epochs: int, fonts: tuple[Path, ...]) -> None:
    """Train from scratch and write the weights in half precision."""
    result = tf.Engine(
        data=glyphs(count, fonts),
        model=tf.use("digit-cnn", pretrained=False),
        strategy=tf.use("full", epochs=epochs, lr=1e-3),
        batch_size=64,
        log=click.echo,
    ).run()
    tensors, metadata = load_tensors(result.run_dir / "model.safetensors")
    save_tensors({name: tensor.half() for name, tensor in tensors.items()}, out, metadata=metadata)
    click.echo(f"{out}: accuracy on test glyphs {result.report['splits']['test']['accuracy']:.4f}")


if __name__ == "__main__":
    main()
