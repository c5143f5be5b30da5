"""The whole circle on real digits: train, serve, test over the wire; the world changes; feedback; retune; swap.

    python examples/production_loop.py [--out FOLDER] [--quick]

A server of a model store answers all the time, and a client asks it without a pause. Then the world changes four times:
inverted ink, rotation, a new pen, and a letter that is a class never seen before. Each time the answers get worse,
people label some of them (POST /feedback), `tuneforge retune` makes a challenger, the gate lets it pass, the server
swaps. At last somebody mislabels a batch, and what is learnt from it does not pass. A table sums it up. The digits of
production are real ones that the model has not been tuned or tested on.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import attrs
import numpy as np
from PIL import Image, ImageFilter

import tuneforge as tf
from tuneforge.builtin.characters.digit_images import real_digits
from tuneforge.builtin.characters.fonts import find_fonts
from tuneforge.builtin.characters.glyphs import render

Sample = tuple[bytes, str]
DATA = {"other_share": 0, "per_class": 60, "test": 0.3, "val": 0.1}
NEW_CLASS = "A"


def picture(counts: np.ndarray, side: int = 8) -> Image.Image:
    """Light ink on dark, of ink counts (8, 8)."""
    plain = Image.fromarray((counts * 15.9375).astype(np.uint8))
    return plain if side == 8 else plain.resize((side, side), Image.Resampling.BICUBIC)


def inverted(counts: np.ndarray) -> Image.Image:
    """Dark ink on light."""
    return Image.fromarray(255 - np.asarray(picture(counts)))


def rotated(counts: np.ndarray) -> Image.Image:
    """Turned by 40 degrees."""
    return picture(counts, 32).rotate(40)


def new_pen(counts: np.ndarray) -> Image.Image:
    """Written with a much broader pen."""
    return picture(counts, 64).filter(ImageFilter.MaxFilter(13))


def png(image: Image.Image) -> bytes:
    """The file that production sends."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


class Production:
    """Digits that the model has not seen, as a world shows them; each is used once a world.

    Args:
        base: The run whose training, validation and test digits are left out.
    """

    def __init__(self, base: Path) -> None:
        data = tf.with_data(tf.load(base)).data
        used = {split.id_of(row) for split in data.splits().values() for row in range(len(split))}
        self.images, self.labels = real_digits()
        free = [index for index in range(len(self.labels)) if f"real/{index}" not in used]
        self.free = np.random.default_rng(0).permutation(free)

    def digits(self, look: Callable[[np.ndarray], Image.Image], start: int, stop: int) -> list[Sample]:
        """Some of the free digits, as a world shows them."""
        return [(png(look(self.images[index])), str(self.labels[index])) for index in self.free[start:stop]]

    def letters(self, count: int, *, seed: int) -> list[Sample]:
        """A letter in many fonts and hands."""
        drawn, _ = render(np.array([NEW_CLASS] * count), find_fonts(), seed=seed, stream="letters")
        return [(png(picture(each)), NEW_CLASS) for each in drawn]


class Client:
    """Asks a server, one request at a time."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: bytes, kind: str) -> Any:
        """The JSON that the server answers."""
        with urlopen(Request(self.url + path, body, {"Content-Type": kind}), timeout=30) as answer:
            return json.load(answer)

    def predict(self, body: bytes) -> dict[str, Any]:
        """The answer for a picture."""
        found: dict[str, Any] = self.post("/predict", body, "image/png")
        return found

    def label(self, request: str, name: str) -> None:
        """Say what was right."""
        self.post("/feedback", json.dumps({"id": request, "class": name}).encode(), "application/json")

    def accuracy(self, samples: list[Sample]) -> float:
        """The share of samples that is answered right."""
        return sum(self.predict(body)["class"] == name for body, name in samples) / len(samples)


class Busy(threading.Thread):
    """A client that asks without a pause, and counts what is not answered."""

    def __init__(self, client: Client, samples: list[Sample]) -> None:
        super().__init__(daemon=True)
        self.client, self.samples = client, samples
        self.asked = self.lost = 0
        self.over = threading.Event()
        self.versions: list[str] = []

    def run(self) -> None:
        """Ask until it is over."""
        while not self.over.wait(0.05):
            body, _ = self.samples[self.asked % len(self.samples)]
            self.asked += 1
            try:
                version = self.client.predict(body)["version"]
            except OSError:
                self.lost += 1
                continue
            if version not in self.versions:
                self.versions.append(version)


@attrs.frozen
class Row:
    """What one turn did: accuracies in per cent, on fresh samples of the world and on the old test split."""

    world: str
    before: float
    after: float
    old: float
    version: str
    sentence: str


def main() -> None:
    """Read the options and go round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Folder for all of it; by default one that is deleted.")
    parser.add_argument("--quick", action="store_true", help="One world, few samples and epochs: does it run at all?")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        circle(given.out or Path(temporary), quick=given.quick)


def circle(out: Path, *, quick: bool) -> list[Row]:
    """Train, promote, serve, test over the wire; then one world after the other."""
    base, store, records = out / "base", out / "models", out / "records.db"
    strategy = tf.use("full", epochs=1 if quick else 8)
    data = tf.use("digits", **DATA)
    tf.Engine(data=data, model="digit-cnn", strategy=strategy, out=base, page=False).run()
    command("promote", base, "--store", store, "--name", "digits", "--to", "safetensors")
    production = Production(base)
    with serving(store, records) as url:
        client = Client(url)
        said = command("test", url, "--run", base, "--rows", 8)
        print(next(line for line in said.splitlines() if "offline report" in line))
        busy = Busy(client, production.digits(picture, 0, 50))
        busy.start()
        rows = list(worlds(client, production, base, store, records, quick=quick))
        busy.over.set()
        busy.join()
    show(rows, busy)
    return rows


def worlds(
    client: Client, production: Production, base: Path, store: Path, records: Path, *, quick: bool
) -> Iterator[Row]:
    """Each world: fresh samples, how they are answered, labels for others, a turn, the same fresh samples again."""
    size, fresh = (60, 60) if quick else (300, 200)
    looks = {"inverted ink": inverted} if quick else {"inverted ink": inverted, "rotated": rotated, "new pen": new_pen}
    epochs = 2 if quick else 8
    for name, look in looks.items():
        exam = production.digits(look, size, size + fresh)
        yield turn(client, name, exam, production.digits(look, 0, size), base, store, records, epochs=epochs)
    if quick:
        return
    letters = production.letters(120, seed=1)
    yield turn(client, "a new class", production.letters(60, seed=2), letters, base, store, records, epochs=epochs)
    plain = production.digits(picture, 0, size)
    wrong = [(body, str((int(name) + 1) % 10)) for body, name in plain]
    exam = production.digits(picture, size, size + fresh)
    yield turn(client, "poisoned labels", exam, wrong, base, store, records, epochs=epochs)


def turn(
    client: Client,
    world: str,
    exam: list[Sample],
    labelled: list[Sample],
    base: Path,
    store: Path,
    records: Path,
    *,
    epochs: int,
) -> Row:
    """One turn of the circle in a changed world."""
    before = client.accuracy(exam)
    for body, name in labelled:
        client.label(client.predict(body)["id"], name)
    options = ("--strategy.epochs", epochs, "--strategy.lr", 5e-4)
    said = command("retune", "--store", store, "--records", records, *options, good=(0, 3))
    sentence = next(line for line in said.splitlines() if "promoted:" in line)
    champion = str(json.loads((store / "digits" / "champion.json").read_text())["version"])
    body, _ = exam[0]
    while client.predict(body)["version"] != champion:
        time.sleep(0.1)
    old = json.loads(command("test", client.url, "--run", base, "--rows", 8, "--json"))["splits"]["test"]["accuracy"]
    row = Row(world, 100 * before, 100 * client.accuracy(exam), 100 * old, champion, sentence)
    print(f"{world}: {row.before:.1f} -> {row.after:.1f} %; {sentence}")
    return row


def show(rows: list[Row], busy: Busy) -> None:
    """Print the table."""
    print(f"\n{'world':<18} {'before':>8} {'after':>8} {'old test':>9}  answered by")
    for row in rows:
        print(f"{row.world:<18} {row.before:>7.1f}% {row.after:>7.1f}% {row.old:>8.1f}%  version {row.version}")
    seen = ", ".join(busy.versions)
    print(f"a client that asked all the while: {busy.asked} requests, {busy.lost} lost, answered by versions {seen}")


class serving:  # noqa: N801 - used as a function
    """The address of a server of a store, which is stopped at the end."""

    def __init__(self, store: Path, records: Path) -> None:
        arguments = ["serve", str(store), "--port", "0", "--records", str(records), "--json"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tuneforge", *arguments], stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> str:
        assert self.process.stdout is not None
        return str(json.loads(self.process.stdout.readline())["url"])

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.communicate()


def command(*arguments: Any, good: tuple[int, ...] = (0,)) -> str:
    """What a command prints; an exit code that is not among the good ones ends it all."""
    done = subprocess.run([sys.executable, "-m", "tuneforge", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode not in good:
        raise SystemExit(f"tuneforge {' '.join(map(str, arguments))}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
