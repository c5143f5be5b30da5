"""`tuneforge promote`: make a run the champion of a model name if the gate accepts it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tuneforge.plugin import ExitCode, FiniteFloatRange, json_option


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--registry",
    default="models",
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the model registry.",
)
@click.option("--name", metavar="NAME", help="Name of the model. [default: the name of the run's data source]")
@click.option(
    "--format",
    "formats",
    multiple=True,
    metavar="FORMAT",
    help="Export format of the version; repeatable. [default: onnx and safetensors]",
)
@click.option(
    "--new-test-set",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Test set of new data: files in one folder per class.",
)
@click.option(
    "--non-inferiority-margin",
    type=FiniteFloatRange(0, 1),
    help="Largest accepted loss of accuracy on the old test set. [default: 0.02]",
)
@click.option(
    "--min-recall", type=FiniteFloatRange(0, 1), help="Minimum recall of each class, old test set. [default: 0.5]"
)
@click.option("--alpha", type=FiniteFloatRange(0, 1), help="Level of the superiority test. [default: 0.05]")
@click.option(
    "--latency-ratio",
    type=FiniteFloatRange(0, min_open=True),
    help="Largest accepted ratio of the latencies of a single sample. [default: 2]",
)
@click.option("--accept-equal", is_flag=True, help="Also promote a run without a significant difference.")
@json_option()
def promote(
    run_dir: Path,
    registry: Path,
    name: str | None,
    formats: tuple[str, ...],
    new_test_set: Path | None,
    as_json: bool,
    accept_equal: bool,
    **rule_options: float | None,
) -> int:
    """Make a finished run, or a bundle, the champion of a model name if it is better than the current champion.

    On the champion's own test split the run must not be worse by more than the non-inferiority margin, and no class may
    fall below the minimum recall. On the new test set (without one: on the old test split) it must be significantly
    better. The exit code is 3 if the run is refused.
    """
    from tuneforge_serve import GateRules
    from tuneforge_serve import promote as promote_run

    def log(text: str) -> None:
        click.echo(text, err=as_json)

    rules = GateRules(
        **{key: value for key, value in rule_options.items() if value is not None}, accept_equal=accept_equal
    )
    result = promote_run(
        run_dir, registry=registry, name=name, formats=formats or None, new_test_set=new_test_set, rules=rules, log=log
    )
    if as_json:
        content = {
            "name": result.name,
            "version": result.version,
            "previous_champion": result.previous_champion,
            **result.decision.to_dict(),
        }
        click.echo(json.dumps(content))
    else:
        click.echo(result.decision.format_table())
        if result.version is not None:
            version_dir = registry / result.name / str(result.version)
            click.echo(f"done: {version_dir} is the champion of {result.name}")
    return ExitCode.OK if result.version is not None else ExitCode.TARGET_MISSED
