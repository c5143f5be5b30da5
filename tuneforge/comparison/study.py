"""A race of strategies on the same data at equal cost, decided on validation, each strategy with several seeds.

`Race.run` is the story. Everything lies in one folder: `race.json` (the configuration, written once), an ordinary run's
folder for each entrant and seed, and at the end `results.json`, `costs.json`, `table.txt` and `cost.svg`. What was done
is found there again, so a race that was stopped or killed goes on when it is asked for again. Several processes may
share its runs (see `crew`); the table is that of one with as many threads a run.

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
from tuneforge.comparison.candidates import SOUP, Entrant, asked_for, baseline_of, entered
from tuneforge.comparison.model_soup import greedy_soup
from tuneforge.comparison.ranking import DROPPED, FAILED, Finished, Row, judged
from tuneforge.comparison.study_dir import RACE, again, agree, fresh, has_objects, recorded, unfinished
from tuneforge.comparison.successive_halving import fallen, rungs_of
from tuneforge.comparison.summary import Comparison, conclude, read_back
from tuneforge.comparison.trial import FAILURE, PARTS, Trial
from tuneforge.comparison.worker_pool import Crew, Meeting, await_end, each_alone, let_go, threads_each
from tuneforge.engine.model.model import Model
from tuneforge.engine.session import from_objects as objects
from tuneforge.engine.session.engine import Engine
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.run_dir import RunFolder
from tuneforge.errors import FolderError, StoppedError, TuneforgeError, UsageError
from tuneforge.plugin.config import RunConfig, as_table, budget_of, resolve

_OWN = ("strategy", "seed", "out")  # what differs between the runs of a race


def compare(
    strategies: Any = (),
    *,
    runs: Sequence[str | Path] = (),
    seeds: int | Sequence[int] = 3,
    budget: str | None = None,
    baseline: str | None = None,
    halving: bool = False,
    out: str | Path | None = None,
    ranks: int = 1,
    say: Callable[[str], None] | None = None,
    **given: Any,
) -> Comparison:
    """Race strategies at equal cost, or compare runs that are finished.

    It decides on validation; the test split is read once, after the decision, for the winner and the baseline.

    Args:
        strategies: Names, `"full:lr=3e-4"`, `use(...)`, instances, functions of the brief, or a mapping of any of these
            by name. `"greedy-soup"` among them stands for the average of the others' weights.
        runs: Folders of finished runs, in place of strategies.
        seeds: How many, from `seed` (0) on; or which.
        budget: What each run may spend, such as `20epochs`, `500steps` or `60s`; None: each runs to its own end.
        baseline: The entrant that others are tested against; None: the first.
        halving: Drop the worse half after half the budget, a quarter, and so on; each rung starts again.
        out: The race's folder, new or that of the same race; None: a new one under `runs/`, or the same race's that was
            not done.
        ranks: Processes of this machine that share the runs, each with its share of threads. Under torchrun its ranks
            share them, and `out` is a folder that all machines see; each of them gets the comparison.
        say: Where sentences for the user go.
        given: What `Engine` takes: `data`, `model`, `batch_size`, ... All runs share `data_seed`, and so their splits.

    Raises:
        UsageError: Names, options or settings are wrong, or the folder holds another race.
        TuneforgeError: No entrant came through; what made the first one fail.
    """
    if ranks < 1:
        raise UsageError(f"{ranks} processes cannot hold a race", where="--ranks", fix="give 1 or more")
    if runs:
        finished.refuse_race(strategies, given, halving=halving, budget=budget)
        return finished.compare_runs([Path(run) for run in runs], baseline=baseline, out=_path(out))
    race = Race(strategies, seeds=seeds, budget=budget, baseline=baseline, halving=halving, given=given, say=say)
    return race.run(_path(out), ranks=ranks)


class Race:
    """A race before it is run.

    Args:
        strategies: As `compare` takes them.
        seeds: How many, or which.
        budget: Of each run of the last rung.
        baseline: Name of an entrant, or None.
        halving: Drop the worse half after each rung.
        given: What `Engine` takes besides.
        say: Where sentences for the user go.

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
        given: Mapping[str, Any],
        say: Callable[[str], None] | None = None,
    ) -> None:
        if "strategy" in given:
            raise UsageError("a race takes strategies, not a strategy", where="strategy", fix="compare([...])")
        named = asked_for(strategies)
        racing = [(name, each) for name, each in named if _name_of(each) != SOUP]
        if not racing:
            raise UsageError(
                "a race needs strategies", where="--strategies", fix="name some: --strategies lp-ft,full,head-only"
            )
        self._say = say or (lambda text: None)
        self._given = {key: value for key, value in given.items() if key not in _OWN}
        self._seeds = _seeds(seeds, int(given.get("seed", 0)))
        self._given["data_seed"] = self._seeds[0] if given.get("data_seed") is None else given["data_seed"]
        engines = [Engine(**self._with_model(), strategy=each, budget=budget) for _, each in racing]
        self._config = engines[0].config
        self.entrants = entered(racing, [engine.config.strategy for engine in engines])
        self.baseline = baseline_of(baseline, [each.name for each in self.entrants])
        self._soup = len(racing) < len(named)
        self.rungs = rungs_of(budget, len(self.entrants)) if halving else [budget]
        self._halving = halving
        self._rows: dict[str, Row] = {each.name: Row(each.name, ()) for each in self.entrants}
        self._errors: list[TuneforgeError] = []
        self._ranks = 1

    @classmethod
    def found(cls, path: Path, *, say: Callable[[str], None] | None = None) -> Race:
        """The race whose folder this is.

        Raises:
            FolderError: It is none, or it was given Python objects.
        """
        if path.is_dir() and not (path / RACE).exists():
            raise FolderError(f"'{path}' holds no race", where="--resume", fix="name one, such as runs/race-...")
        record = names.read_json(path / RACE, "entrants", "config", "seeds")
        if has_objects(record):
            raise FolderError(
                f"the race in '{path}' was given Python objects",
                where=RACE,
                why="a folder holds names and options, not objects",
                fix=f"go on with {again(path, record)}",
            )
        config = resolve(record["config"], where=str(path / RACE))
        uses = {name: resolve({"strategy": table}).strategy for name, table in record["entrants"].items()}
        return cls(
            {**uses, **({SOUP: SOUP} if record["soup"] else {})},
            seeds=record["seeds"],
            budget=config.budget,
            baseline=record["baseline"],
            halving=record["halving"],
            given=given_of(config),
            say=say,
        )

    def run(
        self,
        out: Path | None = None,
        execute: Callable[[Engine], object] = lambda engine: engine.run(),
        *,
        ranks: int = 1,
    ) -> Comparison:
        """Hold it, or go on with it: every rung, then the decision.

        Args:
            out: The race's folder.
            execute: Runs an engine; a command line watches for signals meanwhile.
            ranks: Processes of this machine that share the runs; under torchrun, which has started its own, 1.

        Raises:
            StoppedError: It was asked to stop; asked for again, it goes on.
            UsageError: It was given Python objects, which other processes do not have.
            TuneforgeError: No entrant came through; what made the first one fail.
        """
        meeting = Meeting.found()
        self._ranks = self._checked_ranks(ranks, meeting)
        if meeting is None:
            return self._lead(out, execute)
        with each_alone():
            if meeting.rank == 0:
                return self._lead(out, execute, begun=meeting.tell)
            path = meeting.heard()
            self.follow(path, execute)
        await_end(path)
        return read_back(path)

    def _lead(
        self,
        out: Path | None,
        execute: Callable[[Engine], object],
        *,
        begun: Callable[[Path], None] = lambda path: None,
    ) -> Comparison:
        record = self.record()
        path = out or unfinished(record) or fresh()
        with RunFolder(path, resume=True) as place:
            agree(path, record)
            for failure in [*path.glob(f"*/seed-*/{FAILURE}"), *path.glob(f"*/*/seed-*/{FAILURE}")]:
                failure.unlink()  # it is tried again
            self._say(f"race: {path}")
            with self._told(place):
                begun(path)
                with Crew(path, helpers=self._ranks if self._ranks > 1 else 0, say=self._say) as crew:
                    self._hold_all(path, crew, execute)
                if self._errors and all(row.state == FAILED for row in self._rows.values()):
                    raise self._errors[0]
                return self._conclude(path)

    def follow(self, path: Path, execute: Callable[[Engine], object]) -> None:
        """Do runs of a race that another process leads, until none is left; in silence, and without a decision.

        Args:
            path: The race's folder.
            execute: Runs an engine.
        """
        self._say = lambda text: None
        agree(path, self.record())
        with Crew(path) as crew:
            self._hold_all(path, crew, execute)

    def _checked_ranks(self, ranks: int, meeting: Meeting | None) -> int:
        if ranks == 1:
            return 1
        if meeting is not None:
            raise UsageError("torchrun says how many processes there are", where="--ranks", fix="leave it out")
        if has_objects(self.record()):
            raise UsageError(
                "a race of several processes takes names and options, not Python objects",
                where="ranks",
                why="the other processes have no such objects",
                fix="write package.module:Name, or start the script itself with torchrun",
            )
        return min(ranks, len(self.entrants) * len(self._seeds))

    def record(self) -> dict[str, Any]:
        """The content of `race.json`: all that decides the race."""
        return recorded(
            {
                "entrants": {each.name: as_table(RunConfig(strategy=each.use))["strategy"] for each in self.entrants},
                "seeds": self._seeds,
                "baseline": self.baseline,
                "halving": self._halving,
                "soup": self._soup,
                "config": {key: value for key, value in as_table(self._config).items() if key not in _OWN},
            }
        )

    def _hold_all(self, path: Path, crew: Crew, execute: Callable[[Engine], object]) -> None:
        for number, budget in enumerate(self.rungs, 1):
            self._hold(path, number, budget, crew, execute)
            if number < len(self.rungs):
                self._halve(number, budget)

    def _hold(self, path: Path, rung: int, budget: str | None, crew: Crew, execute: Callable[[Engine], object]) -> None:
        """Every seed of everybody who is still in it; seeds turn slowest, so that what is done early can be paired.

        Runs may end in any order; they are counted in that of the race, and none after one that failed.
        """
        running = [each for each in self.entrants if self._rows[each.name].state not in (DROPPED, FAILED)]
        for each in running:
            self._rows[each.name] = attrs.evolve(self._rows[each.name], runs=(), rung=rung, budget=budget)
        waiting = [self._trial(path, rung, budget, each, seed) for seed in self._seeds for each in running]
        outcomes: dict[Trial, Finished | TuneforgeError] = {}
        while waiting:
            trial = next((each for each in waiting if self._settle(each, crew, execute)), None)
            if trial is None:
                crew.wait()
                continue
            waiting.remove(trial)
            outcome = outcomes[trial] = trial.outcome()
            self._tell(trial, outcome)
            if isinstance(outcome, TuneforgeError):
                later = [each for each in waiting if each.entrant is trial.entrant and each.number > trial.number]
                waiting = [each for each in waiting if each not in later]
        for trial in sorted(outcomes, key=lambda each: each.number):
            if self._rows[trial.entrant.name].state != FAILED:
                self._count(trial, outcomes[trial])

    def _trial(self, path: Path, rung: int, budget: str | None, entrant: Entrant, seed: int) -> Trial:
        place = (rung * len(self._seeds) + self._seeds.index(seed)) * len(self.entrants) + self.entrants.index(entrant)
        return Trial(place, entrant, seed, budget, path / entrant.folder / self._place(rung) / f"seed-{seed}")

    def _settle(self, trial: Trial, crew: Crew, execute: Callable[[Engine], object]) -> bool:
        """See that a run is done, if need be by doing it; False where that is left to another process."""
        with crew.taken(trial.number) as mine:
            if mine and not trial.settled and crew.works:
                let_go(trial.path)
                trial.attempt(self._with_model(), execute)
            return mine and trial.settled

    def _tell(self, trial: Trial, outcome: Finished | TuneforgeError) -> None:
        name = f"{trial.entrant.name}, seed {trial.seed}"
        if isinstance(outcome, TuneforgeError):
            self._say(f"{name}: failed: {outcome.what}; see {trial.path}")
            return
        cost = f"{outcome.epochs} epoch(s), {outcome.seconds:.1f} s"
        self._say(f"{name}: {outcome.monitor} {outcome.value:.4f} on validation, {cost}")

    def _count(self, trial: Trial, outcome: Finished | TuneforgeError) -> None:
        """Note in an entrant's row what came of a run."""
        row = self._rows[trial.entrant.name]
        if isinstance(outcome, TuneforgeError):
            self._errors.append(outcome)
            reason, spent_s = f"{outcome.what} (seed {trial.seed})", row.spent_s + trial.spent_s
            self._rows[row.name] = attrs.evolve(row, state=FAILED, reason=reason, spent_s=spent_s)
        else:
            spent_s = row.spent_s + outcome.seconds
            self._rows[row.name] = attrs.evolve(row, runs=(*row.runs, outcome), spent_s=spent_s)

    def _with_model(self) -> dict[str, Any]:
        """What an engine is given; a module is a copy, because tuning changes it."""
        model = self._given.get("model")
        copied = {"model": copy.deepcopy(model)} if isinstance(model, (nn.Module, Model)) else {}
        return {**self._given, **copied}

    def _place(self, rung: int) -> str:
        return "" if rung == len(self.rungs) else f"rung-{rung}"

    def _halve(self, rung: int, budget: str | None) -> None:
        for name in fallen([row for row in self._rows.values() if row.rung == rung], baseline=self.baseline):
            reason = f"after rung {rung} of {len(self.rungs)}, {budget} each"
            self._rows[name] = attrs.evolve(self._rows[name], state=DROPPED, reason=reason)
            self._say(f"{name}: dropped {reason}")

    def _conclude(self, path: Path) -> Comparison:
        standings = judged(list(self._rows.values()), baseline=self.baseline, comparisons=len(self.entrants) - 1)
        soup = self._cooked([run for row in standings.ranked for run in row.runs], path) if self._soup else None
        notes = [] if soup is None else [f"note: of the soup's test nobody looked: tuneforge evaluate {path / 'soup'}"]
        if self._ranks > 1 and self._config.budget is not None and budget_of(self._config.budget)[0] == "seconds":
            each = f"{self._ranks} runs at a time, each with {threads_each(self._ranks)} thread(s)"
            notes.append(f"note: {each}: {self._config.budget} are worth less so than to a run alone, equally for all")
        more = {"seeds": self._seeds, "rungs": self.rungs if self._halving else None}
        return conclude(standings, notes=notes, soup=soup, folder=path, more=more)

    def _cooked(self, runs: Sequence[Finished], path: Path) -> dict[str, Any]:
        model = self._given.get("model")
        return greedy_soup(
            runs,
            path / "soup",
            data=self._given.get("data"),
            model=model if isinstance(model, (nn.Module, Model)) else None,
            metrics=objects.listed(self._given.get("evaluate")),
            device_name=self._config.device,
        )

    @contextlib.contextmanager
    def _told(self, place: RunFolder) -> Iterator[None]:
        """Keep in the race's folder how the race stands; a stop says how to go on."""
        place.status("running")
        try:
            yield
            place.status("done")
        except StoppedError as error:
            place.status("stopped", reason=error.what)
            how = f"go on with: {again(place.path, self.record())}"
            raise StoppedError(error.what, exit_code=error.exit_code, fix=how) from error
        except BaseException as error:
            stopped = not isinstance(error, Exception)
            place.status("stopped" if stopped else "failed", reason=str(error) or type(error).__name__)
            if stopped:
                self._say(f"go on with: {again(place.path, self.record())}")
            raise


def given_of(config: RunConfig) -> dict[str, Any]:
    """A configuration as keywords of `Engine`, without what differs between the runs of a race, or their budget."""
    given = {name: getattr(config, name) for name in PARTS} | config.settings()
    return {name: value for name, value in given.items() if name not in ("out", "budget")}


def _seeds(asked: int | Sequence[int], first: int) -> list[int]:
    seeds = list(range(first, first + asked)) if isinstance(asked, int) else [int(seed) for seed in asked]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"{asked} are no seeds for a race", where="--seeds", fix="give 1 or more, all different")
    return seeds


def _name_of(asked: Any) -> str:
    return asked if isinstance(asked, str) else str(getattr(asked, "name", ""))


def _path(out: str | Path | None) -> Path | None:
    return None if out is None else Path(out)
