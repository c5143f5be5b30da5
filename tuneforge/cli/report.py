"""`tuneforge report`: the figures of a finished run, its page, and what it did as a plan that runs again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tuneforge.plugin.steps import Step


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--plan", is_flag=True, help="Print the steps that the run took, as a plan file, and nothing else.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="With --plan: write them into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json as it is; with --plan, the steps as JSON.")
def report(folder: Path, plan: bool, out: Path | None, as_json: bool) -> None:
    """Print a finished run's figures, and write its page (report.html) again.

    With --plan: the steps that it took, to read, to change and to run with --strategy plan-file.
    """
    from tuneforge.engine.session import messages as story
    from tuneforge.engine.session.predictor import require_done
    from tuneforge.engine.storage import run_dir as names
    from tuneforge.errors import UsageError
    from tuneforge.report.report import write_page

    require_done(folder)
    if plan:
        _plan(folder, out, as_json=as_json)
        return
    if out is not None:
        raise UsageError("--out has nothing to write", where="--out", fix=f"add --plan, or see {folder / names.PAGE}")
    content = names.read_json(folder / names.REPORT)
    if as_json:
        click.echo(json.dumps(content))
        return
    for line in story.of_result(content["splits"], content["headline"]):
        click.echo(line)
    click.echo(f"page: {write_page(folder)}")


def _plan(folder: Path, out: Path | None, *, as_json: bool) -> None:
    """Print or write the executed steps; what keeps them from giving the same weights is said on standard error too."""
    from tuneforge.builtin.strategies.plan_file import as_entry, plan_text
    from tuneforge.engine.session import messages as story
    from tuneforge.engine.storage import run_dir as names
    from tuneforge.plugin.serialization import from_json

    steps: list[Step] = [from_json(json.dumps(line["step"])) for line in names.read_lines(folder / names.STEPS)]
    record = names.read_json(folder / names.RUN)
    notes = list(_differences(folder, record, steps))
    for note in notes:
        click.echo(note, err=True)
    if as_json:
        text = json.dumps({"steps": [as_entry(step) for step in steps], "notes": notes}) + "\n"
    else:
        about = f"What the run in '{folder}' did (strategy '{record['config']['strategy']['name']}')."
        again = "With the run's other options it gives the same weights: --strategy plan-file --strategy.path FILE"
        text = plan_text(steps, heading=[about, *(notes or [again])], says=story.of_step)
    if out is None:
        click.echo(text, nl=False)
        return
    names.write_whole(out, text)
    click.echo(f"plan: {out}")
    click.echo(f"next: tuneforge run --strategy plan-file --strategy.path {shlex.quote(str(out))}")


def _differences(folder: Path, record: dict[str, Any], steps: list[Step]) -> Iterator[str]:
    """Why the steps alone, with the run's other options, would not give the same weights."""
    from tuneforge.engine.storage import run_dir as names

    yield from beyond_steps(record["config"]["strategy"]["name"])
    budget = names.read_json(folder / names.REPORT).get("stopped_by_budget")
    if budget is not None:
        yield f"note: the budget stopped the run at optimizer step {budget}, before the end of these steps"


def beyond_steps(strategy: str) -> Iterator[str]:
    """What a strategy does that no plan holds, such as changing the loss; nothing where it only asks for steps."""
    from tuneforge.engine.session import from_objects as given
    from tuneforge.errors import TuneforgeError
    from tuneforge.plugin import registry
    from tuneforge.plugin.hooks import check_hooks

    if strategy.startswith(given.__name__):  # steps that were given as Python objects
        return
    try:
        found = check_hooks(registry.load(registry.find("finetune_strategy", strategy)), strategy)
    except TuneforgeError as error:
        yield f"note: it cannot be told whether strategy '{strategy}' does more than ask for steps ({error.what})"
        return
    others = sorted({hook for _, hook, _ in found} - {"finetune_strategy"})
    if others:
        yield f"note: strategy '{strategy}' also takes part in {', '.join(others)}, which a plan does not hold"
