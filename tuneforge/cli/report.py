"""`tuneforge report`: the metrics of a finished run, its report.html, and its steps as a plan file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tuneforge.plugin.steps import StrategyStep


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--export-strategy", is_flag=True, help="Print only the executed strategy steps, as a plan file.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --export-strategy: output file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print report.json; with --export-strategy, the steps as JSON.")
def report(run_dir: Path, export_strategy: bool, out: Path | None, as_json: bool) -> None:
    """Print the metrics of a finished run, and write its report.html again.

    With --export-strategy, print the executed strategy steps as a file for: tuneforge run --strategy plan-file
    """
    from tuneforge.engine.session import messages
    from tuneforge.engine.session.predictor import require_done
    from tuneforge.engine.storage.run_files import REPORT, REPORT_HTML, read_json
    from tuneforge.errors import UsageError
    from tuneforge.report.report import write_report

    require_done(run_dir)
    if export_strategy:
        _print_executed_steps(run_dir, out, as_json=as_json)
        return
    if out is not None:
        raise UsageError(
            "--out has nothing to write",
            where="--out",
            fix=f"add --export-strategy, or open {run_dir / REPORT_HTML}",
        )
    content = read_json(run_dir / REPORT)
    if as_json:
        click.echo(json.dumps(content))
        return
    for line in messages.format_metrics(content["splits"], content["primary_metrics"]):
        click.echo(line)
    click.echo(f"report: {write_report(run_dir)}")


def _print_executed_steps(run_dir: Path, out: Path | None, *, as_json: bool) -> None:
    """Print or write the executed steps; print on standard error why they would not give the same weights."""
    from tuneforge.builtin.strategies.plan_file import format_plan, step_to_dict
    from tuneforge.engine.session import messages
    from tuneforge.engine.storage.atomic import atomic_write
    from tuneforge.engine.storage.run_files import REPORT, RUN, STRATEGY_STEPS, read_json, read_jsonl
    from tuneforge.plugin.serialization import from_json

    steps: list[StrategyStep] = [from_json(json.dumps(line["step"])) for line in read_jsonl(run_dir / STRATEGY_STEPS)]
    record = read_json(run_dir / RUN)
    notes = list(_explain_differences(run_dir, record, steps))
    for note in notes:
        click.echo(note, err=True)
    if as_json:
        text = json.dumps({"steps": [step_to_dict(step) for step in steps], "notes": notes}) + "\n"
    else:
        about = f"The steps that the run in '{run_dir}' executed (strategy '{record['config']['strategy']['name']}')."
        again = (
            "With the other options of the run they give the same weights: --strategy plan-file --strategy.path FILE"
        )
        heading = [about, *(notes or [again])]
        refit = "refit" in read_json(run_dir / REPORT)
        text = format_plan(steps, heading=heading, describe=messages.format_step, refit=refit)
    if out is None:
        click.echo(text, nl=False)
        return
    atomic_write(out, text)
    click.echo(f"plan: {out}")
    click.echo(f"next: tuneforge run --strategy plan-file --strategy.path {shlex.quote(str(out))}")


def _explain_differences(run_dir: Path, record: dict[str, Any], steps: list[StrategyStep]) -> Iterator[str]:
    """Yield the reasons why the steps, with the other options of the run, would not give the same weights."""
    from tuneforge.engine.storage.run_files import REPORT, read_json

    yield from describe_other_hooks(record["config"]["strategy"]["name"])
    budget = read_json(run_dir / REPORT).get("stopped_by_budget")
    if budget is not None:
        yield f"note: the budget stopped the run at optimizer step {budget}, before the end of these steps"


def describe_other_hooks(strategy: str) -> Iterator[str]:
    """Yield a note on what a strategy does that a plan file does not hold, such as changing the loss."""
    from tuneforge.engine.session.components import is_object
    from tuneforge.errors import TuneforgeError
    from tuneforge.plugin import registry
    from tuneforge.plugin.hooks import find_hook_methods

    if is_object(strategy):  # steps that were given as Python objects
        return
    try:
        found = find_hook_methods(
            registry.load_component(registry.find_component("finetune_strategy", strategy)), strategy
        )
    except TuneforgeError as error:
        yield f"note: strategy '{strategy}' cannot be loaded, so it may do more than yield steps ({error.what})"
        return
    others = sorted({hook for _, hook, _ in found} - {"finetune_strategy"})
    if others:
        yield f"note: strategy '{strategy}' also implements {', '.join(others)}, which a plan file does not hold"
