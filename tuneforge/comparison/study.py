"""A race of strategies on the same data at equal cost, decided on validation, each strategy with several seeds.

`Study.run` is the story. Everything lies in one folder: `study.json` (the configuration, written once), an ordinary
run's folder for each entrant and seed, and at the end `results.json`, `costs.json`, `table.txt` and `cost.svg`. What
was done is found there again, so a race that was stopped or killed goes on when it is asked for again. Several
processes may share its runs (see `worker_pool`); the table is that of one with as many threads a run.

A run that needs a frozen prefix which no run before it did computes it for all, in its own seconds.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tuneforge.comparison.summary import Comparison, read_comparison, summarize
from tuneforge.comparison.trial import COMPONENT_KEYS, FAILURE, Trial
from tuneforge.comparison.worker_pool import (
    Rendezvous,
    WorkerPool,
    as_single_process,
    threads_per_process,
    wait_for_release,
    wait_until_finished,
)
from tuneforge.engine.model.model import Model
from tuneforge.engine.session.components import as_list
from tuneforge.engine.session.engine import Engine
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.errors import FolderError, StoppedError, TuneforgeError, UsageError
from tuneforge.plugin.config import RunConfig, config_to_dict, parse_budget, resolve_config

_PER_RUN_SETTINGS = ("strategy", "seed", "out")  # what differs between the runs of a race


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
    """Race strategies at equal cost, or compare runs that are finished.

    It decides on validation; the test split is read once, after the decision, for the winner and the baseline.

    Args:
        strategies: Names, `"full:lr=3e-4"`, `use(...)`, instances, functions of the task, or a mapping of any of these
            by name. `"greedy-soup"` among them stands for the average of the others' weights.
        runs: Folders of finished runs, in place of strategies.
        seeds: How many, from `seed` (0) on; or which.
        budget: What each run may spend, such as `20epochs`, `500steps` or `60s`; None: each runs to its own end.
        baseline: The entrant that others are tested against; None: the first.
        halving: Drop the worse half after half the budget, a quarter, and so on; each rung starts again.
        out: The race's folder, new or that of the same race; None: a new one under `runs/`, or the same race's that was
            not done.
        num_processes: Processes of this machine that share the runs, each with its share of threads. Under torchrun its
            ranks share them, and `out` is a folder that all machines see; each of them gets the comparison.
        log: Where sentences for the user go.
        engine_options: What `Engine` takes: `data`, `model`, `batch_size`, ... All runs share `data_seed`, and so
            their splits.

    Raises:
        UsageError: Names, options or settings are wrong, or the folder holds another race.
        TuneforgeError: No entrant came through; what made the first one fail.
    """
    if num_processes < 1:
        raise UsageError(f"{num_processes} processes cannot hold a race", where="--num-processes", fix="give 1 or more")
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
    """A race before it is run.

    Args:
        strategies: As `compare` takes them.
        seeds: How many, or which.
        budget: Of each run of the last rung.
        baseline: Name of an entrant, or None.
        halving: Drop the worse half after each rung.
        engine_options: What `Engine` takes besides.
        log: Where sentences for the user go.

    Raises:
        UsageError: What was asked for makes no race.
        OptionError: An option of an entrant or a setting is wrong.
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
            raise UsageError("a race takes strategies, not a strategy", where="strategy", fix="compare([...])")
        named = normalize_strategies(strategies)
        competing = [(name, each) for name, each in named if _strategy_name(each) != SOUP]
        if not competing:
            raise UsageError(
                "a race needs strategies", where="--strategies", fix="name some: --strategies lp-ft,full,head-only"
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
        """The race whose folder this is.

        Raises:
            FolderError: It is none, or it was given Python objects.
        """
        if path.is_dir() and not (path / STUDY).exists():
            raise FolderError(f"'{path}' holds no race", where="--resume", fix="name one, such as runs/race-...")
        record = names.read_json(path / STUDY, "candidates", "config", "seeds")
        if has_objects(record):
            raise FolderError(
                f"the race in '{path}' was given Python objects",
                where=STUDY,
                why="a folder holds names and options, not objects",
                fix=f"go on with {resume_command(path, record)}",
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
        """Hold it, or go on with it: every rung, then the decision.

        Args:
            out: The race's folder.
            execute: Runs an engine; a command line watches for signals meanwhile.
            num_processes: Processes of this machine that share the runs; under torchrun, which has started its own, 1.

        Raises:
            StoppedError: It was asked to stop; asked for again, it goes on.
            UsageError: It was given Python objects, which other processes do not have.
            TuneforgeError: No entrant came through; what made the first one fail.
        """
        rendezvous = Rendezvous.from_environment()
        self._num_processes = self._resolve_num_processes(num_processes, rendezvous)
        if rendezvous is None:
            return self._run_as_main(out, execute)
        with as_single_process():
            if rendezvous.rank == 0:
                return self._run_as_main(out, execute, on_start=rendezvous.send_dir)
            path = rendezvous.receive_dir()
            self.run_as_worker(path, execute)
        wait_until_finished(path)
        return read_comparison(path)

    def _run_as_main(
        self,
        out: Path | None,
        execute: Callable[[Engine], object],
        *,
        on_start: Callable[[Path], None] = lambda path: None,
    ) -> Comparison:
        record = self.build_record()
        path = out or find_unfinished(record) or new_study_dir()
        with RunDir(path, resume=True) as place:
            write_or_verify_record(path, record)
            for failure in [*path.glob(f"*/seed-*/{FAILURE}"), *path.glob(f"*/*/seed-*/{FAILURE}")]:
                failure.unlink()  # it is tried again
            self._log(f"race: {path}")
            with self._track_status(place):
                on_start(path)
                with WorkerPool(
                    path, num_workers=self._num_processes if self._num_processes > 1 else 0, log=self._log
                ) as pool:
                    self._run_all_rounds(path, pool, execute)
                if self._errors and all(row.state == FAILED for row in self._results.values()):
                    raise self._errors[0]
                return self._finish(path)

    def run_as_worker(self, path: Path, execute: Callable[[Engine], object]) -> None:
        """Do runs of a race that another process leads, until none is left; in silence, and without a decision.

        Args:
            path: The race's folder.
            execute: Runs an engine.
        """
        self._log = lambda text: None
        write_or_verify_record(path, self.build_record())
        with WorkerPool(path) as pool:
            self._run_all_rounds(path, pool, execute)

    def _resolve_num_processes(self, num_processes: int, rendezvous: Rendezvous | None) -> int:
        if num_processes == 1:
            return 1
        if rendezvous is not None:
            raise UsageError("torchrun says how many processes there are", where="--num-processes", fix="leave it out")
        if has_objects(self.build_record()):
            raise UsageError(
                "a race of several processes takes names and options, not Python objects",
                where="num_processes",
                why="the other processes have no such objects",
                fix="write package.module:Name, or start the script itself with torchrun",
            )
        return min(num_processes, len(self.candidates) * len(self._seeds))

    def build_record(self) -> dict[str, Any]:
        """The content of `study.json`: all that decides the race."""
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

    def _run_all_rounds(self, path: Path, pool: WorkerPool, execute: Callable[[Engine], object]) -> None:
        for number, budget in enumerate(self.round_budgets, 1):
            self._run_round(path, number, budget, pool, execute)
            if number < len(self.round_budgets):
                self._drop_worse_half(number, budget)

    def _run_round(
        self, path: Path, round_number: int, budget: str | None, pool: WorkerPool, execute: Callable[[Engine], object]
    ) -> None:
        """Every seed of everybody who is still in it; seeds turn slowest, so that what is done early can be paired.

        Runs may end in any order; they are counted in that of the race, and none after one that failed.
        """
        running = [each for each in self.candidates if self._results[each.name].state not in (DROPPED, FAILED)]
        for each in running:
            self._results[each.name] = attrs.evolve(
                self._results[each.name], runs=(), round_number=round_number, budget=budget
            )
        waiting = [self._make_trial(path, round_number, budget, each, seed) for seed in self._seeds for each in running]
        outcomes: dict[Trial, FinishedRun | TuneforgeError] = {}
        while waiting:
            trial = next((each for each in waiting if self._try_run(each, pool, execute)), None)
            if trial is None:
                pool.poll()
                continue
            waiting.remove(trial)
            outcome = outcomes[trial] = trial.outcome()
            self._log_outcome(trial, outcome)
            if isinstance(outcome, TuneforgeError):
                later = [each for each in waiting if each.candidate is trial.candidate and each.number > trial.number]
                waiting = [each for each in waiting if each not in later]
        for trial in sorted(outcomes, key=lambda each: each.number):
            if self._results[trial.candidate.name].state != FAILED:
                self._record_outcome(trial, outcomes[trial])

    def _make_trial(self, path: Path, round_number: int, budget: str | None, candidate: Candidate, seed: int) -> Trial:
        place = (round_number * len(self._seeds) + self._seeds.index(seed)) * len(
            self.candidates
        ) + self.candidates.index(candidate)
        return Trial(
            place,
            candidate,
            seed,
            budget,
            path / candidate.dir_name / self._round_dir_name(round_number) / f"seed-{seed}",
        )

    def _try_run(self, trial: Trial, pool: WorkerPool, execute: Callable[[Engine], object]) -> bool:
        """See that a run is done, if need be by doing it; False where that is left to another process."""
        with pool.claim(trial.number) as mine:
            if mine and not trial.is_settled and pool.runs_trials:
                wait_for_release(trial.run_dir)
                trial.attempt(self._copy_engine_options(), execute)
            return mine and trial.is_settled

    def _log_outcome(self, trial: Trial, outcome: FinishedRun | TuneforgeError) -> None:
        name = f"{trial.candidate.name}, seed {trial.seed}"
        if isinstance(outcome, TuneforgeError):
            self._log(f"{name}: failed: {outcome.what}; see {trial.run_dir}")
            return
        cost = f"{outcome.epochs} epoch(s), {outcome.seconds:.1f} s"
        self._log(f"{name}: {outcome.monitor} {outcome.value:.4f} on validation, {cost}")

    def _record_outcome(self, trial: Trial, outcome: FinishedRun | TuneforgeError) -> None:
        """Note in an entrant's row what came of a run."""
        row = self._results[trial.candidate.name]
        if isinstance(outcome, TuneforgeError):
            self._errors.append(outcome)
            reason, spent_s = f"{outcome.what} (seed {trial.seed})", row.total_s + trial.spent_s
            self._results[row.name] = attrs.evolve(row, state=FAILED, reason=reason, total_s=spent_s)
        else:
            spent_s = row.total_s + outcome.seconds
            self._results[row.name] = attrs.evolve(row, runs=(*row.runs, outcome), total_s=spent_s)

    def _copy_engine_options(self) -> dict[str, Any]:
        """What an engine is given; a module is a copy, because tuning changes it."""
        model = self._engine_options.get("model")
        copied = {"model": copy.deepcopy(model)} if isinstance(model, (nn.Module, Model)) else {}
        return {**self._engine_options, **copied}

    def _round_dir_name(self, round_number: int) -> str:
        return "" if round_number == len(self.round_budgets) else f"round-{round_number}"

    def _drop_worse_half(self, round_number: int, budget: str | None) -> None:
        for name in select_dropped(
            [row for row in self._results.values() if row.round_number == round_number], baseline=self.baseline
        ):
            reason = f"after rung {round_number} of {len(self.round_budgets)}, {budget} each"
            self._results[name] = attrs.evolve(self._results[name], state=DROPPED, reason=reason)
            self._log(f"{name}: dropped {reason}")

    def _finish(self, path: Path) -> Comparison:
        ranking = rank_candidates(
            list(self._results.values()), baseline=self.baseline, num_comparisons=len(self.candidates) - 1
        )
        soup = (
            self._make_soup([run for row in ranking.ranked for run in row.runs], path) if self._includes_soup else None
        )
        notes = [] if soup is None else [f"note: of the soup's test nobody looked: tuneforge evaluate {path / 'soup'}"]
        if (
            self._num_processes > 1
            and self._config.budget is not None
            and parse_budget(self._config.budget)[0] == "seconds"
        ):
            each = (
                f"{self._num_processes} runs at a time, each with {threads_per_process(self._num_processes)} thread(s)"
            )
            notes.append(f"note: {each}: {self._config.budget} are worth less so than to a run alone, equally for all")
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
        """Keep in the race's folder how the race stands; a stop says how to go on."""
        run_dir.write_status("running")
        try:
            yield
            run_dir.write_status("done")
        except StoppedError as error:
            run_dir.write_status("stopped", reason=error.what)
            how = f"go on with: {resume_command(run_dir.path, self.build_record())}"
            raise StoppedError(error.what, exit_code=error.exit_code, fix=how) from error
        except BaseException as error:
            stopped = not isinstance(error, Exception)
            run_dir.write_status("stopped" if stopped else "failed", reason=str(error) or type(error).__name__)
            if stopped:
                self._log(f"go on with: {resume_command(run_dir.path, self.build_record())}")
            raise


def engine_options_from_config(config: RunConfig) -> dict[str, Any]:
    """A configuration as keywords of `Engine`, without what differs between the runs of a race, or their budget."""
    given = {name: getattr(config, name) for name in COMPONENT_KEYS} | config.settings()
    return {name: value for name, value in given.items() if name not in ("out", "budget")}


def _parse_seeds(value: int | Sequence[int], first: int) -> list[int]:
    seeds = list(range(first, first + value)) if isinstance(value, int) else [int(seed) for seed in value]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"{value} are no seeds for a race", where="--seeds", fix="give 1 or more, all different")
    return seeds


def _strategy_name(strategy: Any) -> str:
    return strategy if isinstance(strategy, str) else str(getattr(strategy, "name", ""))


def _path(out: str | Path | None) -> Path | None:
    return None if out is None else Path(out)
