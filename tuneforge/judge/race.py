"""A race of strategies on the same data at equal cost, decided on validation, each strategy with several seeds.

`Race.run` is the story. Everything lies in one folder: `race.json` (the configuration, written once), an ordinary run's
folder for each entrant and seed, and at the end `results.json`, `costs.json`, `table.txt` and `cost.svg`. What was done
is found there again, so a race that was stopped or killed goes on when it is asked for again.

A run that needs a frozen prefix which no run before it did computes it for all, in its own seconds.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import nn

from tuneforge.engine.engine import Engine
from tuneforge.engine.network.model import Model
from tuneforge.engine.samples import given as objects
from tuneforge.engine.state import folder as names
from tuneforge.engine.state.folder import RunFolder
from tuneforge.errors import FolderError, StoppedError, TryAgainError, TuneforgeError, UsageError
from tuneforge.judge import finished
from tuneforge.judge.entrants import SOUP, Entrant, asked_for, baseline_of, entered
from tuneforge.judge.race_folder import RACE, again, agree, fresh, has_objects, recorded, unfinished
from tuneforge.judge.soup import greedy_soup
from tuneforge.judge.standings import DROPPED, FAILED, Finished, Row, ahead, judged, monitored
from tuneforge.judge.table import Comparison, conclude
from tuneforge.plugin.config import RunConfig, as_table, budget_of, resolve

_OWN = ("strategy", "seed", "out")  # what differs between the runs of a race
_PARTS = ("data", "model", "adapt", "step", "evaluate", "schedule", "optimizer", "augment", "extensions")
_UNITS = {"seconds": "s", "epochs": "epochs", "steps": "steps"}


def compare(
    strategies: Any = (),
    *,
    runs: Sequence[str | Path] = (),
    seeds: int | Sequence[int] = 3,
    budget: str | None = None,
    baseline: str | None = None,
    halving: bool = False,
    out: str | Path | None = None,
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
        say: Where sentences for the user go.
        given: What `Engine` takes: `data`, `model`, `batch_size`, ... All runs share `data_seed`, and so their splits.

    Raises:
        UsageError: Names, options or settings are wrong, or the folder holds another race.
        TuneforgeError: No entrant came through; what made the first one fail.
    """
    if runs:
        finished.refuse_race(strategies, given, halving=halving, budget=budget)
        return finished.compare_runs([Path(run) for run in runs], baseline=baseline, out=_path(out))
    race = Race(strategies, seeds=seeds, budget=budget, baseline=baseline, halving=halving, given=given, say=say)
    return race.run(_path(out))


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
        self.rungs = _rungs(budget, len(self.entrants)) if halving else [budget]
        self._halving = halving
        self._rows: dict[str, Row] = {each.name: Row(each.name, ()) for each in self.entrants}
        self._errors: list[Exception] = []

    @classmethod
    def found(cls, path: Path, *, say: Callable[[str], None] | None = None) -> Race:
        """The race whose folder this is.

        Raises:
            FolderError: It is none, or it was given Python objects.
        """
        record = names.read_json(path / RACE)
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
        self, out: Path | None = None, execute: Callable[[Engine], object] = lambda engine: engine.run()
    ) -> Comparison:
        """Hold it, or go on with it: every rung, then the decision.

        Args:
            out: The race's folder.
            execute: Runs an engine; a command line watches for signals meanwhile.

        Raises:
            StoppedError: It was asked to stop; asked for again, it goes on.
            TuneforgeError: No entrant came through; what made the first one fail.
        """
        record = self.record()
        path = out or unfinished(record) or fresh()
        with RunFolder(path, resume=True) as place:
            agree(path, record)
            self._say(f"race: {path}")
            with self._told(place):
                for number, budget in enumerate(self.rungs, 1):
                    self._hold(path, number, budget, execute)
                    if number < len(self.rungs):
                        self._halve(number, budget)
                if self._errors and all(row.state == FAILED for row in self._rows.values()):
                    raise self._errors[0]
                return self._conclude(path)

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

    def _hold(self, path: Path, rung: int, budget: str | None, execute: Callable[[Engine], object]) -> None:
        """Every seed of everybody who is still in it; seeds turn slowest, so that what is done early can be paired."""
        running = [each for each in self.entrants if self._rows[each.name].state not in (DROPPED, FAILED)]
        for each in running:
            row = self._rows[each.name]
            self._rows[each.name] = attrs.evolve(row, runs=(), rung=rung, budget=budget)
        for seed in self._seeds:
            for each in running:
                if self._rows[each.name].state != FAILED:
                    self._take(each, seed, path / each.folder / self._place(rung) / f"seed-{seed}", execute)

    def _take(self, entrant: Entrant, seed: int, path: Path, execute: Callable[[Engine], object]) -> None:
        """Do one run, if it is not done, and note what came of it."""
        row = self._rows[entrant.name]
        engine = self._engine(entrant, seed, row.budget, path)
        try:
            if engine is not None:
                execute(engine)
            run = Finished.read(path)
            if math.isnan(run.value):
                raise UsageError(f"its {run.monitor} on validation is no number")
        except (StoppedError, TryAgainError, FolderError):  # not the entrant's fault
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends an entrant and not the race
            reason = f"{error.what if isinstance(error, TuneforgeError) else f'{type(error).__name__}: {error}'}"
            self._errors.append(error)
            spent_s = row.spent_s + names.read_json(path / names.STATUS).get("spent_s", 0.0)
            self._rows[entrant.name] = attrs.evolve(
                row, state=FAILED, reason=f"{reason} (seed {seed})", spent_s=spent_s
            )
            self._say(f"{entrant.name}, seed {seed}: failed: {reason}; see {path}")
            return
        self._rows[entrant.name] = attrs.evolve(row, runs=(*row.runs, run), spent_s=row.spent_s + run.seconds)
        cost = f"{run.epochs} epoch(s), {run.seconds:.1f} s"
        self._say(f"{entrant.name}, seed {seed}: {run.monitor} {run.value:.4f} on validation, {cost}")

    def _engine(self, entrant: Entrant, seed: int, budget: str | None, path: Path) -> Engine | None:
        """What does, or goes on with, one run; None where it is done."""
        if (path / names.STATUS).exists() and (path / names.RUN).exists():
            if names.read_json(path / names.STATUS)["state"] == "done":
                return None
            parts = {key: value for key, value in self._with_model().items() if key in _PARTS}
            return Engine.resume(path, strategy=entrant.strategy, **parts)
        (path / names.RUN).unlink(missing_ok=True)  # killed before anything was done
        given = {"strategy": entrant.strategy, "seed": seed, "budget": budget, "out": path}
        return Engine(**{**self._with_model(), **given})

    def _with_model(self) -> dict[str, Any]:
        """What an engine is given; a module is a copy, because tuning changes it."""
        model = self._given.get("model")
        copied = {"model": copy.deepcopy(model)} if isinstance(model, (nn.Module, Model)) else {}
        return {**self._given, **copied}

    def _place(self, rung: int) -> str:
        return "" if rung == len(self.rungs) else f"rung-{rung}"

    def _halve(self, rung: int, budget: str | None) -> None:
        """Drop the worse half of those who ran in this rung, by their mean; the baseline stays to be compared with."""
        rows = [row for row in self._rows.values() if row.rung == rung]
        through = [row for row in rows if row.state not in (DROPPED, FAILED)]
        if not through:
            return
        _, mode = monitored([run for row in through for run in row.runs])
        for row in ahead(through, mode)[math.ceil(len(rows) / 2) :]:
            if row.name != self.baseline:
                reason = f"after rung {rung} of {len(self.rungs)}, {budget} each"
                self._rows[row.name] = attrs.evolve(row, state=DROPPED, reason=reason)
                self._say(f"{row.name}: dropped {reason}")

    def _conclude(self, path: Path) -> Comparison:
        standings = judged(list(self._rows.values()), baseline=self.baseline, comparisons=len(self.entrants) - 1)
        soup = self._cooked([run for row in standings.ranked for run in row.runs], path) if self._soup else None
        notes = [] if soup is None else [f"note: of the soup's test nobody looked: tuneforge evaluate {path / 'soup'}"]
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
    given = {name: getattr(config, name) for name in _PARTS} | config.settings()
    return {name: value for name, value in given.items() if name not in ("out", "budget")}


def _rungs(budget: str | None, entrants: int) -> list[str | None]:
    """The budget of each rung of a halving: twice that of the one before it, the last one whole.

    Raises:
        UsageError: There is no budget, or too little to halve so often.
    """
    if budget is None:
        raise UsageError("a halving needs a budget", where="--halving", fix="give one, such as --budget 20epochs")
    count = max(1, math.ceil(math.log2(entrants)))
    kind, amount = budget_of(budget)
    amounts = [amount / 2 ** (count - number) for number in range(1, count)]
    if kind != "seconds" and amounts and min(amounts) < 1:
        raise UsageError(
            f"a budget of {budget} cannot be halved {count - 1} times, as {entrants} entrants need",
            where="--budget",
            fix=f"give at least {2 ** (count - 1)}{_UNITS[kind]}",
        )
    shown = (f"{each:.3f}".rstrip("0").rstrip(".") if kind == "seconds" else str(int(each)) for each in amounts)
    return [*(f"{each}{_UNITS[kind]}" for each in shown), budget]


def _seeds(asked: int | Sequence[int], first: int) -> list[int]:
    seeds = list(range(first, first + asked)) if isinstance(asked, int) else [int(seed) for seed in asked]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"{asked} are no seeds for a race", where="--seeds", fix="give 1 or more, all different")
    return seeds


def _name_of(asked: Any) -> str:
    return asked if isinstance(asked, str) else str(getattr(asked, "name", ""))


def _path(out: str | Path | None) -> Path | None:
    return None if out is None else Path(out)
