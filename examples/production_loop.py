"""Train, serve and test the endpoint; then the domain shifts: label, retrain, promote. Wrong labels are refused."""

import json
import tempfile
import time
from pathlib import Path

import click
from production.clients import BackgroundClient, Client, run_command, run_server
from production.domains import Production, inverted, new_pen, plain, rotated

import tuneforge as tf


def retrain(client: Client, registry: Path, options: list[object], domain: str, labeled: list, unseen: list) -> str:
    """Label samples of a domain, retrain, and return the accuracy on unseen samples and on the old test split."""
    before = client.accuracy(unseen)
    for body, label in labeled:
        client.label(client.predict(body)["id"], label)
    output = run_command("retrain", "--registry", registry, *options, exit_codes=(0, 3))
    champion = str(json.loads((registry / "digits" / "champion.json").read_text())["version"])
    while client.predict(unseen[0][0])["version"] != champion:
        time.sleep(0.1)
    endpoint = ["test-endpoint", client.url, "--run", registry.parent / "base", "--batch-size", 8, "--json"]
    old = json.loads(run_command(*endpoint))["metrics"]["test"]["accuracy"]
    decision = next(line for line in output.splitlines() if "promoted:" in line)
    return f"{domain:<15} {before:7.1%} {client.accuracy(unseen):7.1%} {old:8.1%}   {champion}  {decision}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Output directory; a temporary one by default.")
@click.option("--count", default=300, show_default=True, help="Labeled samples per domain.")
@click.option("--epochs", default=8, show_default=True, help="Epochs of each training.")
@click.option("--only", default="inverted ink,rotated,new pen,new class,wrong labels", help="Domains, comma-separated.")
def main(out: Path | None, count: int, epochs: int, only: str) -> None:
    """Run four shifted domains, and a batch of wrong labels."""
    out = out or Path(tempfile.mkdtemp())
    base, registry = out / "base", out / "models"
    data = tf.use("digits", other_share=0, per_class=60, test=0.3, val=0.1)
    tf.Engine(data=data, model="digit-cnn", strategy=tf.use("full", epochs=epochs), out=base, page=False).run()
    run_command("promote", base, "--registry", registry, "--name", "digits", "--format", "safetensors")
    production = Production(base)
    domains = {"inverted ink": inverted, "rotated": rotated, "new pen": new_pen, "wrong labels": plain}
    samples = {
        name: [production.digits(each, *span) for span in ((0, count), (300, 470))] for name, each in domains.items()
    }
    samples["wrong labels"][0] = [(body, str((int(label) + 1) % 10)) for body, label in samples["wrong labels"][0]]
    samples["new class"] = [production.letters(60, 60 + max(30, count // 3)), production.letters(0, 60)]
    options = ["--strategy.epochs", epochs, "--strategy.lr", 5e-4]
    background = production.digits(plain, 0, 50)
    with run_server(registry, registry / "requests.db") as url, BackgroundClient(Client(url), background) as client:
        print("domain           before   after old test  version")
        for domain in only.split(","):
            print(retrain(Client(url), registry, options, domain, *samples[domain]), flush=True)
    versions = ", ".join(client.versions)
    print(f"{client.num_requests} background requests, {client.num_lost} lost, versions {versions}; {out}")


if __name__ == "__main__":
    main()
