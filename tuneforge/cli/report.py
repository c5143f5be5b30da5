"""`tuneforge report`: the figures of a finished run, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print report.json as it is.")
def report(folder: Path, as_json: bool) -> None:
    """Print a finished run's figures, and write its page (report.html) again."""
    from tuneforge.engine import folder as names
    from tuneforge.engine import story
    from tuneforge.engine.tuned import require_done
    from tuneforge.judge.page import write_page

    require_done(folder)
    content = names.read_json(folder / names.REPORT)
    if as_json:
        click.echo(json.dumps(content))
        return
    for line in story.of_result(content["splits"], content["headline"]):
        click.echo(line)
    click.echo(f"page: {write_page(folder)}")
