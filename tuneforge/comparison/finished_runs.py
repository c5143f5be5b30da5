"""Comparison of finished runs: grouped by configuration, and paired by seed and validation samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneforge.comparison.candidates import choose_baseline
from tuneforge.comparison.ranking import (
    FAILED,
    RANKED,
    CandidateResult,
    FinishedRun,
    describe_data_differences,
    rank_candidates,
    require_common_monitor,
)
from tuneforge.comparison.summary import Comparison, summarize
from tuneforge.engine.session.components import is_object
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import UsageError

_IGNORED_SETTINGS = {
    "seed", "data-seed", "out", "page", "device", "num-workers", "keep", "checkpoint-s", "checkpoint-steps", "cache",
    "cache-mb", "cache-disk-mb", "cache-dir", "memory-format",
}  # fmt: skip
"""Settings that do not distinguish candidates."""

_STEPS = "strategy.steps"


def compare_runs(run_dirs: Sequence[Path], *, baseline: str | None = None, out: Path | None = None) -> Comparison:
    """Compare finished runs: runs whose configurations are equal but for the seed are one candidate.

    Args:
        run_dirs: The run directories.
        baseline: The name of a candidate, or the directory of one of its runs; None is the first.
        out: The directory for results, table and plot; None writes nothing.

    Raises:
        FolderError: A directory holds no finished run.
        UsageError: The runs monitor different metrics, or were not validated on the same samples.
    """
    groups = _group_by_config(
        [(FinishedRun.read(path), names.read_json(path / names.RUN)["config"]) for path in run_dirs]
    )
    require_common_monitor([run for runs in groups.values() for run in runs])
    kept, notes = _keep_common_validation(groups)
    rows = [_summarize_candidate(name, runs) for name, runs in kept.items()]
    notes += describe_data_differences(rows)
    named = {str(run.run_dir): name for name, runs in kept.items() for run in runs}
    first = choose_baseline(named.get(str(Path(baseline))) or baseline if baseline else None, list(kept))
    ranking = rank_candidates(rows, baseline=first, num_comparisons=len(groups) - 1)
    return summarize(ranking, notes=notes, soup=None, study_dir=out, extra={"seeds": None, "round_budgets": None})


def require_no_study_options(
    strategies: Any, engine_options: Mapping[str, Any], *, halving: bool, budget: str | None
) -> None:
    """Check that nothing is asked of finished runs but to be compared.

    Raises:
        UsageError: An option of a study was given too.
    """
    asked = [*engine_options, *(name for name, value in (("strategies", strategies), ("halving", halving)) if value)]
    if asked or budget:
        raise UsageError(
            "finished runs are compared as they are, so options of new runs cannot be given",
            where=", ".join(asked or ["budget"]),
            fix="give either run directories or strategies",
        )


def _summarize_candidate(name: str, runs: Sequence[FinishedRun]) -> CandidateResult:
    bad = [str(run.run_dir) for run in runs if math.isnan(run.value)]
    state, reason = (FAILED, f"its {runs[0].monitor} is NaN in {', '.join(bad)}") if bad else (RANKED, "")
    return CandidateResult(name, tuple(runs), state=state, reason=reason, total_s=sum(run.seconds for run in runs))


def _group_by_config(runs: Iterable[tuple[FinishedRun, Mapping[str, Any]]]) -> dict[str, list[FinishedRun]]:
    """Group runs by configuration, under the strategy's name with the options that differ; equal runs count once."""
    groups: dict[str, list[FinishedRun]] = {}
    settings_of: dict[str, dict[str, str]] = {}
    for run, config in runs:
        settings = _flatten(
            {key: value for key, value in config.items() if key.replace("_", "-") not in _IGNORED_SETTINGS}
        )
        if is_object(
            settings["strategy.name"]
        ):  # functions and lists of steps differ only by the steps that they yielded
            settings |= _read_steps(run.run_dir)
        key = json.dumps(settings, sort_keys=True)
        settings_of[key] = settings
        if all(run.pairing_key != other.pairing_key for other in groups.setdefault(key, [])):
            groups[key].append(run)
    labels = _name_configs(settings_of)
    alike = [key for key in groups if list(labels.values()).count(labels[key]) > 1]
    labels |= {key: f"{labels[key]} ({groups[key][0].run_dir})" for key in alike}
    return {labels[key]: found for key, found in groups.items()}


def _read_steps(run_dir: Path) -> dict[str, str]:
    """Return the strategy steps of a run: their names, and their content."""
    steps = [line["step"] for line in names.read_jsonl(run_dir / names.STRATEGY_STEPS)]
    return {"strategy.name": "+".join(step["name"] for step in steps) or "steps", _STEPS: json.dumps(steps)}


def _name_configs(configs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return a name for each configuration: its strategy, and what differs between those of that strategy."""
    strategies = {key: settings["strategy.name"] for key, settings in configs.items()}
    labels = {}
    for key, settings in configs.items():
        rivals = [configs[other] for other, name in strategies.items() if name == strategies[key]]
        differing = [each for each in dict.fromkeys(each for rival in rivals for each in rival)
                     if each != _STEPS and len({rival.get(each) for rival in rivals}) > 1]  # fmt: skip
        words = [f"{each.removeprefix('strategy.')}={settings.get(each, 'none')}" for each in differing]
        labels[key] = ":".join([strategies[key], *words])
    return labels


def _flatten(table: Any, prefix: str = "") -> dict[str, str]:
    """Return a nested table as a flat one with dotted keys and values as text."""
    if isinstance(table, Mapping):
        items: Iterable[tuple[str, Any]] = table.items()
    elif isinstance(table, list) and any(isinstance(each, Mapping) for each in table):
        items = ((str(place), each) for place, each in enumerate(table))
    else:
        return {prefix: str(table)}
    flat: dict[str, str] = {}
    for key, value in items:
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _keep_common_validation(groups: Mapping[str, list[FinishedRun]]) -> tuple[dict[str, list[FinishedRun]], list[str]]:
    """Return the runs whose validation samples every group has, and notes on the others.

    Raises:
        UsageError: No validation samples are common to all groups.
    """
    prints = [{run.fingerprints["val"] for run in runs} for runs in groups.values()]
    common = set.intersection(*prints)
    if not common:
        found = [
            f"  {name}: {', '.join(sorted(each[:12] for each in own))}"
            for name, own in _pair_with_names(groups, prints)
        ]
        raise UsageError(
            "\n".join(["these runs were validated on different samples, so their metrics cannot be compared", *found]),
            where="fingerprints of the validation split in model.json",
            fix="train both on the same data with the same --data-seed, or use tuneforge evaluate with the same --data",
        )
    kept = {name: [run for run in runs if run.fingerprints["val"] in common] for name, runs in groups.items()}
    out = [str(run.run_dir) for runs in groups.values() for run in runs if run.fingerprints["val"] not in common]
    notes = [f"note: excluded, because the others were validated on other samples: {', '.join(out)}"] if out else []
    return kept, notes


def _pair_with_names(
    groups: Mapping[str, list[FinishedRun]], fingerprints: list[set[str]]
) -> Iterable[tuple[str, set[str]]]:
    return zip(groups, fingerprints, strict=True)
