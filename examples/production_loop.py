"""Train, serve, test over the wire; the world changes; feedback, retune, swap; and wrong labels do not pass."""

import json
import tempfile
import time
from pathlib import Path

import click
from production.clients import Busy, Client, command, serving
from production.worlds import Production, inverted, new_pen, plain, rotated

import tuneforge as tf


def turn(client: Client, store: Path, options: list[object], world: str, labelled: list, fresh: list) -> str:
    """Label what the world shows, tune on it, and see how fresh samples of it and the old test split are answered."""
    before = client.accuracy(fresh)
    for body, name in labelled:
        client.label(client.predict(body)["id"], name)
    said = command("retune", "--store", store, *options, good=(0, 3))
    champion = str(json.loads((store / "digits" / "champion.json").read_text())["version"])
    while client.predict(fresh[0][0])["version"] != champion:
        time.sleep(0.1)
    tested = json.loads(command("test", client.url, "--run", store.parent / "base", "--rows", 8, "--json"))
    figures = f"{before:7.1%} {client.accuracy(fresh):7.1%} {tested['splits']['test']['accuracy']:8.1%}"
    return f"{world:<15} {figures}   {champion}  " + next(line for line in said.splitlines() if "promoted:" in line)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="A folder to keep; a temporary one by default.")
@click.option("--count", default=300, show_default=True, help="Samples of each world that are labelled.")
@click.option("--epochs", default=8, show_default=True, help="Of each training.")
@click.option("--only", default="inverted ink,rotated,new pen,new class,poison", help="Worlds, with commas between.")
def main(out: Path | None, count: int, epochs: int, only: str) -> None:
    """Go round: four changed worlds, and a batch of wrong labels."""
    out = out or Path(tempfile.mkdtemp())
    base, store, records = out / "base", out / "models", out / "models" / "requests.db"
    data = tf.use("digits", other_share=0, per_class=60, test=0.3, val=0.1)
    tf.Engine(data=data, model="digit-cnn", strategy=tf.use("full", epochs=epochs), out=base, page=False).run()
    command("promote", base, "--store", store, "--name", "digits", "--to", "safetensors")
    production = Production(base)
    looks = {"inverted ink": inverted, "rotated": rotated, "new pen": new_pen, "poison": plain}
    worlds = {
        name: [production.digits(look, *span) for span in ((0, count), (300, 470))] for name, look in looks.items()
    }
    worlds["poison"][0] = [(body, str((int(name) + 1) % 10)) for body, name in worlds["poison"][0]]
    worlds["new class"] = [production.letters(60, 60 + max(30, count // 3)), production.letters(0, 60)]
    options = ["--strategy.epochs", epochs, "--strategy.lr", 5e-4]
    with serving(store, records) as url, Busy(Client(url), production.digits(plain, 0, 50)) as busy:
        print(next(line for line in command("test", url, "--run", base).splitlines() if "offline" in line))
        print("world            before   after old test  version")
        for world in only.split(","):
            print(turn(Client(url), store, options, world, *worlds[world]), flush=True)
    print(
        f"{busy.asked} requests all the while, {busy.lost} lost, answered by versions {', '.join(busy.versions)}; {out}"
    )


if __name__ == "__main__":
    main()
