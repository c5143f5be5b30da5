"""A study: strategies on the same data at equal cost, with several seeds each, ranked on the validation split.

`Study.run` reads from top to bottom. The study directory holds `study.json` (the configuration, written once), a run
directory for each candidate and seed, and at the end `results.json`, `costs.json`, `table.txt` and `cost.svg`. Runs
that are done are read from there, so a study that was stopped or killed is resumed by the same call. Several processes
may share its runs (see `worker_pool`); the results are those of one process with as many threads per run.

The first run that needs the features of a frozen backbone computes and caches them for all, within its own time.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import nn

from tuneforge.comparison import finished_runs as finished
from tuneforge.comparison.candidates import SOUP, Candidate, build_candidates, choose_baseline, normalize_strategies
from tuneforge.comparison.model_soup import greedy_soup
from tuneforge.comparison.ranking import DROPPED, FAILED, CandidateResult, FinishedRun, rank_candidates
from tuneforge.comparison.study_dir import (
    STUDY,
    find_unfinished,
    has_objects,
    new_study_dir,
    normalize_record,
    resume_command,
    write_or_verify_record,
)
from tuneforge.comparison.successive_halving import plan_halving, select_dropped
from tuneforge.comparison.summary import Comparison, summarize
from tuneforge.comparison.trial import COMPONENT_KEYS, FAILURE, Trial
from tuneforge.comparison.worker_pool import WorkerPool, threads_per_process
from tuneforge.engine.model.model import Model
from tuneforge.engine.session.components import as_list
from tuneforge.engine.session.engine import Engine
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.errors import FolderError, StoppedError, TuneforgeError, UsageError
from tuneforge.plugin.config import RunConfig, config_to_dict, parse_budget, resolve_config

_PER_RUN_SETTINGS = ("strategy", "seed", "out")  # what differs between the runs of a study


def compare(
    strategies: Any = (),
    *,
    runs: Sequence[str | Path] = (),
    seeds: int | Sequence[int] = 3,
    budget: str | None = None,
    baseline: str | None = None,
    halving: bool = False,
    out: str | Path | None = None,
    num_processes: int = 1,
    log: Callable[[str], None] | None = None,
    **engine_options: Any,
) -> Comparison:
    """Compare strategies at equal cost, or compare finished runs.

    Candidates are ranked on the validation split. The test split is read once, after the decision, for the winner and
    the baseline.

    Args:
        strategies: Names, `"full:lr=3e-4"`, `use(...)`, instances, functions of the task, or a mapping from names to
            any of these. `"greedy-soup"` among them stands for the average of the others' weights.
        runs: Directories of finished runs, instead of strategies.
        seeds: The number of seeds, counted from `seed` (0), or a list of seeds.
        budget: The budget of each run, such as `20epochs`, `500steps` or `60s`; None lets each run to its own end.
        baseline: The candidate that the others are tested against; None is the first.
        halving: Use successive halving: drop the worse half after a quarter of the budget, after half of it, and so
            on; each round starts new runs.
        out: The study directory, new or that of the same study; None is a new one under `runs/`, or that of the same
            study if it is unfinished.
        num_processes: The number of worker processes on this machine that share the runs, each with its share of the
            threads. A script calls this under `if __name__ == "__main__":`, because the workers import it.
        log: Called with each log line.
        engine_options: Keywords of `Engine`, such as `data`, `model` and `batch_size`. All runs share `data_seed`, and
            so their splits.

    Raises:
        UsageError: Names, options or settings are wrong, or the directory holds another study.
        TuneforgeError: Every candidate failed; this is the error of the first one.
    """
    if num_processes < 1:
        raise UsageError(f"{num_processes} processes cannot run a study", where="--num-processes", fix="use 1 or more")
    if runs:
        finished.require_no_study_options(strategies, engine_options, halving=halving, budget=budget)
        return finished.compare_runs([Path(run) for run in runs], baseline=baseline, out=_path(out))
    study = Study(
        strategies,
        seeds=seeds,
        budget=budget,
        baseline=baseline,
        halving=halving,
        engine_options=engine_options,
        log=log,
    )
    return study.run(_path(out), num_processes=num_processes)


class Study:
    """A comparison of strategies, before or after it is run.

    Args:
        strategies: As for `compare`.
        seeds: The number of seeds, or a list of them.
        budget: The budget of each run of the last round.
        baseline: The name of a candidate, or None.
        halving: Drop the worse half after each round.
        engine_options: Other keywords of `Engine`.
        log: Called with each log line.

    Raises:
        UsageError: The arguments do not describe a study.
        OptionError: An option of a candidate or a setting is wrong.
    """

    def __init__(
        self,
        strategies: Any,
        *,
        seeds: int | Sequence[int] = 3,
        budget: str | None = None,
        baseline: str | None = None,
        halving: bool = False,
        engine_options: Mapping[str, Any],
        log: Callable[[str], None] | None = None,
    ) -> None:
        if "strategy" in engine_options:
            raise UsageError("a comparison takes strategies, not a strategy", where="strategy", fix="compare([...])")
        named = normalize_strategies(strategies)
        competing = [(name, each) for name, each in named if _strategy_name(each) != SOUP]
        if not competing:
            raise UsageError(
                "there are no strategies to compare",
                where="--strategies",
                fix="name some: --strategies lp-ft,full,head-only",
            )
        self._log = log or (lambda text: None)
        self._engine_options = {key: value for key, value in engine_options.items() if key not in _PER_RUN_SETTINGS}
        self._seeds = _parse_seeds(seeds, int(engine_options.get("seed", 0)))
        self._engine_options["data_seed"] = (
            self._seeds[0] if engine_options.get("data_seed") is None else engine_options["data_seed"]
        )
        engines = [Engine(**self._copy_engine_options(), strategy=each, budget=budget) for _, each in competing]
        self._config = engines[0].config
        self.candidates = build_candidates(competing, [engine.config.strategy for engine in engines])
        self.baseline = choose_baseline(baseline, [each.name for each in self.candidates])
        self._includes_soup = len(competing) < len(named)
        self.round_budgets = plan_halving(budget, len(self.candidates)) if halving else [budget]
        self._halving = halving
        self._results: dict[str, CandidateResult] = {
            each.name: CandidateResult(each.name, ()) for each in self.candidates
        }
        self._errors: list[TuneforgeError] = []
        self._num_processes = 1

    @classmethod
    def from_dir(cls, path: Path, *, log: Callable[[str], None] | None = None) -> Study:
        """Return the study of a study directory.

        Raises:
            FolderError: The directory holds no study, or one that was given Python objects.
        """
        if path.is_dir() and not (path / STUDY).exists():
            raise FolderError(f"'{path}' holds no study", where="--resume", fix="name one, such as runs/study-...")
        record = names.read_json(path / STUDY, "candidates", "config", "seeds")
        if has_objects(record):
            raise FolderError(
                f"the study in '{path}' was given Python objects",
                where=STUDY,
                why="a directory holds names and options, not objects",
                fix=f"resume it with {resume_command(path, record)}",
            )
        config = resolve_config(record["config"], where=str(path / STUDY))
        uses = {name: resolve_config({"strategy": table}).strategy for name, table in record["candidates"].items()}
        return cls(
            {**uses, **({SOUP: SOUP} if record["soup"] else {})},
            seeds=record["seeds"],
            budget=config.budget,
            baseline=record["baseline"],
            halving=record["halving"],
            engine_options=engine_options_from_config(config),
            log=log,
        )

    def run(
        self,
        out: Path | None = None,
        execute: Callable[[Engine], object] = lambda engine: engine.run(),
        *,
        num_processes: int = 1,
    ) -> Comparison:
        """Do every round that is not done yet, then decide.

        Args:
            out: The directory of the study.
            execute: Runs an engine where there is one process; a command line watches for signals meanwhile.
            num_processes: Processes of this machine that share the runs.

        Raises:
            StoppedError: It was asked to stop; the same call resumes it.
            TryAgainError: A worker process was killed; the same call resumes the study.
            UsageError: Python objects cannot be sent to other processes, or torchrun has started this one.
            TuneforgeError: Every candidate failed; this is the error of the first one.
        """
        self._num_processes = self._check_num_processes(num_processes)
        record = self.build_record()
        path = out or find_unfinished(record) or new_study_dir()
        with RunDir(path, resume=True) as study_dir:
            write_or_verify_record(path, record)
            for failure in [*path.glob(f"*/seed-*/{FAILURE}"), *path.glob(f"*/*/seed-*/{FAILURE}")]:
                failure.unlink()  # it is tried again
            self._log(f"study: {path}")
            with self._track_status(study_dir):
                self._run_all_rounds(path, execute)
                if self._errors and all(row.state == FAILED for row in self._results.values()):
                    raise self._errors[0]
                return self._finish(path)

    def _check_num_processes(self, num_processes: int) -> int:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "a comparison runs on one machine and starts its own processes, but torchrun has started this one",
                where="WORLD_SIZE",
                fix="start it without torchrun, with --num-processes N",
            )
        if num_processes > 1 and has_objects(self.build_record()):
            raise UsageError(
                "a comparison in several processes takes names and options, not Python objects",
                where="num_processes",
                why="Python objects cannot be sent to the other processes",
                fix="write package.module:Name, or use one process",
            )
        return min(num_processes, len(self.candidates) * len(self._seeds))

    def build_record(self) -> dict[str, Any]:
        """Return the content of `study.json`: everything that determines the results."""
        return normalize_record(
            {
                "candidates": {
                    each.name: config_to_dict(RunConfig(strategy=each.spec))["strategy"] for each in self.candidates
                },
                "seeds": self._seeds,
                "baseline": self.baseline,
                "halving": self._halving,
                "soup": self._includes_soup,
                "config": {
                    key: value for key, value in config_to_dict(self._config).items() if key not in _PER_RUN_SETTINGS
                },
            }
        )

    def _run_all_rounds(self, path: Path, execute: Callable[[Engine], object]) -> None:
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(WorkerPool(self._num_processes)) if self._num_processes > 1 else None
            for number, budget in enumerate(self.round_budgets, 1):
                self._run_round(path, number, budget, pool, execute)
                if number < len(self.round_budgets):
                    self._drop_worse_half(number, budget)

    def _run_round(
        self,
        path: Path,
        round_number: int,
        budget: str | None,
        pool: WorkerPool | None,
        execute: Callable[[Engine], object],
    ) -> None:
        """Do a run of every remaining candidate with every seed.

        All candidates run with one seed before the next seed, so that the runs of a study that was stopped early can be
        paired. Runs may end in any order; they are counted in that of the study, and none after one that failed.
        """
        running = [each for each in self.candidates if self._results[each.name].state not in (DROPPED, FAILED)]
        for each in running:
            self._results[each.name] = attrs.evolve(
                self._results[each.name], runs=(), round_number=round_number, budget=budget
            )
        trials = [self._make_trial(path, round_number, budget, each, seed) for seed in self._seeds for each in running]
        outcomes: dict[Trial, FinishedRun | TuneforgeError] = {}
        first_failed: dict[str, int] = {}

        def skips(trial: Trial) -> bool:
            return trial.number > first_failed.get(trial.candidate.name, trial.number)

        for trial in (
            self._run_in_order(trials, execute, skips)
            if pool is None
            else pool.run(trials, self._engine_options, skips=skips)
        ):
            outcome = outcomes[trial] = trial.outcome()
            self._log_outcome(trial, outcome)
            if isinstance(outcome, TuneforgeError):
                name = trial.candidate.name
                first_failed[name] = min(trial.number, first_failed.get(name, trial.number))
        for trial in sorted(outcomes, key=lambda each: each.number):
            if self._results[trial.candidate.name].state != FAILED:
                self._record_outcome(trial, outcomes[trial])

    def _run_in_order(
        self, trials: Iterable[Trial], execute: Callable[[Engine], object], skips: Callable[[Trial], bool]
    ) -> Iterator[Trial]:
        """Do the runs in this process, one after the other."""
        for trial in trials:
            if not skips(trial):
                trial.attempt(self._copy_engine_options(), execute)
                yield trial

    def _make_trial(self, path: Path, round_number: int, budget: str | None, candidate: Candidate, seed: int) -> Trial:
        number = (round_number * len(self._seeds) + self._seeds.index(seed)) * len(
            self.candidates
        ) + self.candidates.index(candidate)
        run_dir = path / candidate.dir_name / self._round_dir_name(round_number) / f"seed-{seed}"
        return Trial(number, candidate, seed, budget, run_dir)

    def _log_outcome(self, trial: Trial, outcome: FinishedRun | TuneforgeError) -> None:
        name = f"{trial.candidate.name}, seed {trial.seed}"
        if isinstance(outcome, TuneforgeError):
            self._log(f"{name}: failed: {outcome.what}; see {trial.run_dir}")
            return
        cost = f"{outcome.epochs} epoch(s), {outcome.seconds:.1f} s"
        self._log(f"{name}: {outcome.monitor} {outcome.value:.4f} on validation, {cost}")

    def _record_outcome(self, trial: Trial, outcome: FinishedRun | TuneforgeError) -> None:
        """Add the outcome of a run to the results of its candidate."""
        row = self._results[trial.candidate.name]
        if isinstance(outcome, TuneforgeError):
            self._errors.append(outcome)
            reason, spent_s = f"{outcome.what} (seed {trial.seed})", row.total_s + trial.spent_s
            self._results[row.name] = attrs.evolve(row, state=FAILED, reason=reason, total_s=spent_s)
        else:
            spent_s = row.total_s + outcome.seconds
            self._results[row.name] = attrs.evolve(row, runs=(*row.runs, outcome), total_s=spent_s)

    def _copy_engine_options(self) -> dict[str, Any]:
        """Return the keywords of `Engine`; a module is copied, because training changes it."""
        model = self._engine_options.get("model")
        copied = {"model": copy.deepcopy(model)} if isinstance(model, (nn.Module, Model)) else {}
        return {**self._engine_options, **copied}

    def _round_dir_name(self, round_number: int) -> str:
        return "" if round_number == len(self.round_budgets) else f"round-{round_number}"

    def _drop_worse_half(self, round_number: int, budget: str | None) -> None:
        for name in select_dropped(
            [row for row in self._results.values() if row.round_number == round_number], baseline=self.baseline
        ):
            reason = f"after round {round_number} of {len(self.round_budgets)}, {budget} each"
            self._results[name] = attrs.evolve(self._results[name], state=DROPPED, reason=reason)
            self._log(f"{name}: dropped {reason}")

    def _finish(self, path: Path) -> Comparison:
        ranking = rank_candidates(
            list(self._results.values()), baseline=self.baseline, num_comparisons=len(self.candidates) - 1
        )
        soup = (
            self._make_soup([run for row in ranking.ranked for run in row.runs], path) if self._includes_soup else None
        )
        notes = (
            []
            if soup is None
            else [f"note: the soup was not evaluated on the test split; to do so: tuneforge evaluate {path / 'soup'}"]
        )
        if (
            self._num_processes > 1
            and self._config.budget is not None
            and parse_budget(self._config.budget)[0] == "seconds"
        ):
            each = (
                f"{self._num_processes} runs at a time, each with {threads_per_process(self._num_processes)} thread(s)"
            )
            notes.append(f"note: {each}: {self._config.budget} allow fewer steps than in a run alone, equally for all")
        more = {"seeds": self._seeds, "round_budgets": self.round_budgets if self._halving else None}
        return summarize(ranking, notes=notes, soup=soup, study_dir=path, extra=more)

    def _make_soup(self, runs: Sequence[FinishedRun], path: Path) -> dict[str, Any]:
        model = self._engine_options.get("model")
        return greedy_soup(
            runs,
            path / "soup",
            data=self._engine_options.get("data"),
            model=model if isinstance(model, (nn.Module, Model)) else None,
            metrics=as_list(self._engine_options.get("metrics")),
            device_name=self._config.device,
        )

    @contextlib.contextmanager
    def _track_status(self, run_dir: RunDir) -> Iterator[None]:
        """Keep the status of the study in its directory; a stop logs how to resume."""
        run_dir.write_status("running")
        try:
            yield
            run_dir.write_status("done")
        except StoppedError as error:
            run_dir.write_status("stopped", reason=error.what)
            how = f"resume with: {resume_command(run_dir.path, self.build_record())}"
            raise StoppedError(error.what, exit_code=error.exit_code, fix=how) from error
        except BaseException as error:
            stopped = not isinstance(error, Exception)
            run_dir.write_status("stopped" if stopped else "failed", reason=str(error) or type(error).__name__)
            if stopped:
                self._log(f"resume with: {resume_command(run_dir.path, self.build_record())}")
            raise


def engine_options_from_config(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as keywords of `Engine`, without budget and what differs between the runs of a study."""
    given = {name: getattr(config, name) for name in COMPONENT_KEYS} | config.settings()
    return {name: value for name, value in given.items() if name not in ("out", "budget")}


def _parse_seeds(value: int | Sequence[int], first: int) -> list[int]:
    seeds = list(range(first, first + value)) if isinstance(value, int) else [int(seed) for seed in value]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"{value} is not a valid value for seeds", where="--seeds", fix="use 1 or more, all different")
    return seeds


def _strategy_name(strategy: Any) -> str:
    return strategy if isinstance(strategy, str) else str(getattr(strategy, "name", ""))


def _path(out: str | Path | None) -> Path | None:
    return None if out is None else Path(out)
