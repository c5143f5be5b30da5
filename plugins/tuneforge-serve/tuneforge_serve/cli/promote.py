"""`tuneforge promote`: make a run the champion of a name, if the gate lets it pass."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tuneforge.plugin.parameter_types import FiniteFloatRange

REFUSED = 3


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--store", default="models", show_default=True, type=click.Path(path_type=Path), metavar="DIR", help="The store."
)
@click.option("--name", metavar="NAME", help="Of the model. [default: what the run's data source is called]")
@click.option(
    "--to", multiple=True, metavar="FORMAT", help="What the version holds; repeatable. [default: onnx and safetensors]"
)
@click.option(
    "--new", type=click.Path(path_type=Path), metavar="DIR", help="Held-out files of the new world, one folder a class."
)
@click.option(
    "--margin",
    "non_inferiority_margin",
    type=FiniteFloatRange(0, 1),
    help="Share of right answers to lose at most, old test set. [default: 0.02]",
)
@click.option(
    "--floor",
    "min_recall",
    type=FiniteFloatRange(0, 1),
    help="Least recall of each class, old test set. [default: 0.5]",
)
@click.option("--alpha", type=FiniteFloatRange(0, 1), help="Level of the test that shows a difference. [default: 0.05]")
@click.option(
    "--latency-ratio",
    type=FiniteFloatRange(0, min_open=True),
    help="How many times as long a lone answer may take. [default: 2]",
)
@click.option("--accept-equal", is_flag=True, help="Promote also where no significant difference is found.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
def promote(
    folder: Path,
    store: Path,
    name: str | None,
    to: tuple[str, ...],
    new: Path | None,
    as_json: bool,
    accept_equal: bool,
    **rule_options: float | None,
) -> int:
    """Make a finished run, or a bundle, the champion of a name, if it is better.

    The champion's own test split must not be answered worse, no class may fall under the floor, and on the new
    world's files (without them: on the old test split) the challenger must be significantly better. Exits 3 where the
    champion stays.
    """
    from tuneforge_serve.registry.gate import GateRules
    from tuneforge_serve.registry.promotion import promote as promoted

    def log(text: str) -> None:
        click.echo(text, err=as_json)

    rules = GateRules(
        **{key: value for key, value in rule_options.items() if value is not None}, accept_equal=accept_equal
    )
    done = promoted(folder, registry=store, name=name, to=to or None, new_test_set=new, rules=rules, log=log)
    if as_json:
        result = {
            "name": done.name,
            "version": done.version,
            "previous_champion": done.previous_champion,
            **done.decision.to_dict(),
        }
        click.echo(json.dumps(result))
    else:
        click.echo(done.decision.format_table())
        if done.version is not None:
            click.echo(f"done: {store / done.name / str(done.version)} is the champion of {done.name}")
    return 0 if done.version is not None else REFUSED
