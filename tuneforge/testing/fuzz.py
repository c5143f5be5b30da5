"""Differential fuzzing of the engine: random programs whose runs must agree with each other.

From a seed, `tuneforge.testing.fuzzer` draws a network, data, a strategy and settings. Runs of it that must agree are
compared: with the feature cache and without, in micro-batches and in whole batches, killed and resumed and undisturbed,
on two ranks and in one process. Each pair is equal (bit-identical, or within a tolerance where only sums over another
number of samples differ), or it is refused before training by a `TuneforgeError`. Anything else is a finding, which is
reduced to a small program.

    python -m tuneforge.testing.fuzz --seeds 0:2000 --results results.jsonl
    python -m tuneforge.testing.fuzz --seeds 0:200 --relation two-ranks --results ranks.jsonl
    python -m tuneforge.testing.fuzz --program '{"$kind": "FuzzProgram", ...}'
    python -m tuneforge.testing.fuzz --mutants

A command that is stopped continues with the seeds that its results do not hold yet.
"""

from __future__ import annotations

import collections
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import click

from tuneforge.engine.model.inspection import silence_tracing
from tuneforge.testing.fuzzer.mutants import MUTANTS
from tuneforge.testing.fuzzer.program import FuzzProgram, draw_program
from tuneforge.testing.fuzzer.reduction import reduce_program
from tuneforge.testing.fuzzer.relations import RELATIONS, Outcome, Relations
from tuneforge.testing.fuzzer.runs import ProgramRuns

__all__ = ["FuzzProgram", "Outcome", "SeedResult", "check_program", "draw_program", "find_mutant", "fuzz"]

ONE_PROCESS = tuple(name for name in RELATIONS if name != "two-ranks")
"""The relations of one process; `two-ranks` takes a second a seed."""


@attrs.frozen
class SeedResult:
    """What the relations of one seed found.

    Args:
        seed: The seed.
        outcomes: By relation.
        seconds: How long it took.
        reduced: JSON of the smallest program found that still breaks the relation, by relation that is broken.
    """

    seed: int
    outcomes: Mapping[str, Outcome]
    seconds: float
    reduced: Mapping[str, str]

    def to_json(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SeedResult:
        """Return the result that `to_json` wrote."""
        fields = json.loads(text)
        outcomes = {name: Outcome(**outcome) for name, outcome in fields.pop("outcomes").items()}
        return cls(outcomes=outcomes, **fields)


def check_program(program: FuzzProgram, relations: Sequence[str] = ONE_PROCESS) -> dict[str, Outcome]:
    """Run a program as each relation asks, and return what the relations found."""
    with tempfile.TemporaryDirectory(prefix="tuneforge-fuzz-") as directory, silence_tracing():
        shared = Relations(ProgramRuns(program, Path(directory)))
        return {name: RELATIONS[name](shared) for name in relations}


def fuzz(
    seeds: Iterable[int], relations: Sequence[str] = ONE_PROCESS, *, results: Path | None = None, reduce: bool = True
) -> Iterator[SeedResult]:
    """Yield the result of each seed.

    Args:
        seeds: The seeds to run.
        relations: Names of the relations to check, among `RELATIONS`.
        results: A file of JSON lines: a seed that it holds is not run again, and each result is appended.
        reduce: Reduce the programs that break a relation, which takes up to 200 times as long as the program itself.
    """
    known = {} if results is None else read_results(results)
    for seed in seeds:
        if seed in known:
            yield known[seed]
            continue
        began, program = time.perf_counter(), draw_program(seed)
        outcomes = check_program(program, relations)
        broken = {name: each for name, each in outcomes.items() if each.verdict == "different" and reduce}
        smallest = {name: reduce_program(program, _is_broken(name, each)).to_json() for name, each in broken.items()}
        result = SeedResult(seed, outcomes, time.perf_counter() - began, smallest)
        if results is not None:
            with results.open("a", encoding="utf-8") as file:
                file.write(result.to_json() + "\n")
        yield result


def read_results(path: Path) -> dict[int, SeedResult]:
    """Return the results in a file of JSON lines by seed; a last line that was cut off is removed."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    return {result.seed: result for result in map(SeedResult.from_json, complete.splitlines())}


def find_mutant(name: str, seeds: Iterable[int]) -> int | None:
    """Return the first seed at which a planted defect breaks its relation, or None; see `fuzzer.mutants.MUTANTS`."""
    mutant = MUTANTS[name]
    with mutant.plant():
        for result in fuzz(seeds, [mutant.relation], reduce=False):
            if any(outcome.verdict == "different" for outcome in result.outcomes.values()):
                return result.seed
    return None


def summarize(results: Iterable[SeedResult]) -> str:
    """Return a table of how many seeds each relation compared, refused and found different, and why it refused."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    reasons: collections.Counter[str] = collections.Counter()
    for result in results:
        for name, outcome in result.outcomes.items():
            counts[name].update([outcome.verdict, *(["bitwise"] * outcome.bitwise), *(["cached"] * outcome.cached)])
            if outcome.verdict == "equal":
                kinds[name].update(draw_program(result.seed).kinds())
            if outcome.verdict == "refused":
                reasons[f"{name}: {outcome.reason:.100}"] += 1
    lines = [
        f"{name}: " + ", ".join(f"{count} {word}" for word, count in sorted(counts[name].items())) for name in counts
    ]
    for kind in sorted(set().union(*kinds.values())):
        lines.append(f"  {kind}: " + ", ".join(f"{name} {kinds[name][kind]}" for name in kinds))
    return "\n".join([*lines, *(f"  refused {count} times: {reason}" for reason, count in reasons.most_common())])


def _is_broken(relation: str, before: Outcome) -> Callable[[FuzzProgram], bool]:
    """Return a function that tells whether a program breaks a relation in the same way."""

    def is_broken(program: FuzzProgram) -> bool:
        outcome = check_program(program, [relation])[relation]
        same = not before.reason.startswith("the run ends") or outcome.reason[:60] == before.reason[:60]
        return outcome.verdict == "different" and same

    return is_broken


def _parse_range(text: str) -> range:
    start, _, stop = text.rpartition(":")
    return range(int(start or 0), int(stop))


@click.command()
@click.option("--seeds", default="0:40", help="FIRST:STOP.", show_default=True)
@click.option("--relation", multiple=True, type=click.Choice(list(RELATIONS)), help="By default those of one process.")
@click.option("--results", type=click.Path(path_type=Path), help="File of JSON lines; seeds that it holds are not run.")
@click.option("--program", help="JSON of one program to run instead of seeds.")
@click.option("--mutants", is_flag=True, help="Plant each defect in turn, and report the first seed that finds it.")
def main(seeds: str, relation: tuple[str, ...], results: Path | None, program: str | None, mutants: bool) -> None:
    """Compare runs of random programs that must agree; exit with 1 if some do not."""
    chosen = relation or ONE_PROCESS
    if mutants:
        found = {name: find_mutant(name, _parse_range(seeds)) for name in MUTANTS}
        for name, seed in found.items():
            click.echo(f"{name}: {'not found' if seed is None else f'seed {seed}'}")
        raise SystemExit(None in found.values())
    if program is not None:
        outcomes = check_program(FuzzProgram.from_json(program), chosen)
        for name, outcome in outcomes.items():
            click.echo(f"{name}: {outcome.verdict} {outcome.reason}")
        raise SystemExit(any(outcome.verdict == "different" for outcome in outcomes.values()))
    done = []
    for result in fuzz(_parse_range(seeds), chosen, results=results):
        done.append(result)
        for name, reduced in result.reduced.items():
            click.echo(f"seed {result.seed}, {name}: {result.outcomes[name].reason}\n  reduced: {reduced}")
    click.echo(summarize(done))
    raise SystemExit(any(result.reduced for result in done))


if __name__ == "__main__":
    main()
