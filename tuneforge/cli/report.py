"""`tuneforge report`: the figures of a finished run, its page, and what it did as a plan that runs again."""

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
@click.option("--plan", is_flag=True, help="Print the steps that the run took, as a plan file, and nothing else.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="With --plan: write them into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json as it is; with --plan, the steps as JSON.")
def report(run_dir: Path, plan: bool, out: Path | None, as_json: bool) -> None:
    """Print a finished run's figures, and write its page (report.html) again.

    With --plan: the steps that it took, to read, to change and to run with --strategy plan-file.
    """
    from tuneforge.engine.session import messages
    from tuneforge.engine.session.predictor import require_done
    from tuneforge.engine.storage.run_dir import REPORT, REPORT_HTML, read_json
    from tuneforge.errors import UsageError
    from tuneforge.report.report import write_report

    require_done(run_dir)
    if plan:
        _print_executed_steps(run_dir, out, as_json=as_json)
        return
    if out is not None:
        raise UsageError("--out has nothing to write", where="--out", fix=f"add --plan, or see {run_dir / REPORT_HTML}")
    content = read_json(run_dir / REPORT)
    if as_json:
        click.echo(json.dumps(content))
        return
    for line in messages.format_metrics(content["splits"], content["primary_metrics"]):
        click.echo(line)
    click.echo(f"page: {write_report(run_dir)}")


def _print_executed_steps(run_dir: Path, out: Path | None, *, as_json: bool) -> None:
    """Print or write the executed steps; what keeps them from giving the same weights is said on standard error too."""
    from tuneforge.builtin.strategies.plan_file import format_plan, step_to_dict
    from tuneforge.engine.session import messages
    from tuneforge.engine.storage.run_dir import RUN, STRATEGY_STEPS, atomic_write, read_json, read_jsonl
    from tuneforge.plugin.serialization import from_json

    steps: list[StrategyStep] = [from_json(json.dumps(line["step"])) for line in read_jsonl(run_dir / STRATEGY_STEPS)]
    record = read_json(run_dir / RUN)
    notes = list(_explain_differences(run_dir, record, steps))
    for note in notes:
        click.echo(note, err=True)
    if as_json:
        text = json.dumps({"steps": [step_to_dict(step) for step in steps], "notes": notes}) + "\n"
    else:
        about = f"What the run in '{run_dir}' did (strategy '{record['config']['strategy']['name']}')."
        again = "With the run's other options it gives the same weights: --strategy plan-file --strategy.path FILE"
        text = format_plan(steps, heading=[about, *(notes or [again])], describe=messages.format_step)
    if out is None:
        click.echo(text, nl=False)
        return
    atomic_write(out, text)
    click.echo(f"plan: {out}")
    click.echo(f"next: tuneforge run --strategy plan-file --strategy.path {shlex.quote(str(out))}")


def _explain_differences(run_dir: Path, record: dict[str, Any], steps: list[StrategyStep]) -> Iterator[str]:
    """Why the steps alone, with the run's other options, would not give the same weights."""
    from tuneforge.engine.storage.run_dir import REPORT, read_json

    yield from describe_other_hooks(record["config"]["strategy"]["name"])
    budget = read_json(run_dir / REPORT).get("stopped_by_budget")
    if budget is not None:
        yield f"note: the budget stopped the run at optimizer step {budget}, before the end of these steps"


def describe_other_hooks(strategy: str) -> Iterator[str]:
    """What a strategy does that no plan holds, such as changing the loss; nothing where it only asks for steps."""
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
        yield f"note: it cannot be told whether strategy '{strategy}' does more than ask for steps ({error.what})"
        return
    others = sorted({hook for _, hook, _ in found} - {"finetune_strategy"})
    if others:
        yield f"note: strategy '{strategy}' also takes part in {', '.join(others)}, which a plan does not hold"
