"""The differential fuzzer: it finds planted defects, reduces what it finds, and can be continued."""

import attrs
import pytest

from tuneforge import Phase, use
from tuneforge.testing import fuzz as fuzz_module
from tuneforge.testing.fuzz import ONE_PROCESS, FuzzProgram, check_program, draw_program, find_mutant, fuzz
from tuneforge.testing.fuzzer.blocks import BLOCKS
from tuneforge.testing.fuzzer.mutants import MUTANTS
from tuneforge.testing.fuzzer.network import TRAITS
from tuneforge.testing.fuzzer.program import LOSSES
from tuneforge.testing.fuzzer.reduction import reduce_program
from tuneforge.testing.fuzzer.samples import INPUTS, SOURCES

FROZEN = FuzzProgram(
    seed=2,
    blocks=("batch-norm", "dropout"),
    strategy=(Phase("a", train=("body.1", "head"), epochs=2, lr=0.1),),
    settings={"batch_size": 8, "cache": "memory", "checkpoint_steps": 1},
)


def test_a_seed_gives_the_same_program_and_json_stores_it():
    for seed in range(50):
        program = draw_program(seed)
        assert draw_program(seed) == program
        assert FuzzProgram.from_json(program.to_json()) == program


def test_every_kind_is_drawn_within_600_seeds():
    drawn = {kind for seed in range(600) for kind in draw_program(seed).kinds()}
    losses = {f"loss {loss}" for loss in LOSSES}
    assert not {*BLOCKS, *TRAITS, *INPUTS, *SOURCES, *losses} - drawn


def test_the_relations_of_a_sound_program_hold_on_cached_features():
    outcomes = check_program(FROZEN)
    assert {name: each.verdict for name, each in outcomes.items()} == {
        "cache": "equal", "resume": "equal", "micro-batches": "equal", "freezing": "equal"
    }  # fmt: skip
    assert outcomes["resume"].bitwise
    assert outcomes["cache"].cached


@pytest.mark.parametrize(
    ("mutant", "relation"),
    [
        ("cache serves the next row", "cache"),
        ("restore forgets buffers", "resume"),
        ("restore forgets the position in the epoch", "resume"),
        ("freeze check compares nothing", "freezing"),
    ],
)
def test_a_planted_defect_breaks_its_relation(mutant, relation):
    program = FROZEN if relation != "resume" else attrs.evolve(FROZEN, strategy=(Phase("a", epochs=2, lr=0.1),))
    with MUTANTS[mutant].plant():
        outcome = check_program(program, [relation])[relation]
    assert outcome.verdict == "different"


def test_a_program_is_reduced_to_what_breaks_the_relation():
    program = next(each for each in map(draw_program, range(500)) if "dropout" in each.blocks and len(each.blocks) > 2)
    smallest = reduce_program(program, lambda each: "dropout" in each.blocks)
    assert smallest == FuzzProgram(
        seed=program.seed, blocks=("dropout",), num_train=smallest.num_train, micro_batch=program.micro_batch,
        settings={"batch_size": program.settings["batch_size"]},
    )  # fmt: skip
    assert smallest.num_train == 4


def test_a_stopped_fuzzer_continues_with_the_seeds_that_are_missing(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    first = list(fuzz(range(2), ["freezing"], results=results))
    with results.open("a") as file:
        file.write('{"seed": 2, "outcomes"')  # the process was killed while it wrote
    monkeypatch.setattr(fuzz_module, "check_program", lambda program, relations: {})
    again = list(fuzz(range(3), ["freezing"], results=results))
    assert again[:2] == first
    assert again[2].outcomes == {}
    assert list(fuzz(range(3), ["freezing"], results=results)) == again


@pytest.mark.slow
@pytest.mark.parametrize("block", ["batch-norm", "buffer-in-place", "tensor-attribute"])
def test_two_ranks_continue_in_the_middle_of_an_epoch_with_the_statistics_of_each(block):
    phase = Phase("a", epochs=2, lr=0.05)
    settings = {"batch_size": 8, "checkpoint_steps": 1}
    program = FuzzProgram(seed=2, blocks=(block,), num_train=40, strategy=(phase,), settings=settings, position=0.3)
    outcome = check_program(program, ["two-ranks"])["two-ranks"]
    assert (outcome.verdict, outcome.bitwise) == ("equal", True), outcome.reason


@pytest.mark.parametrize(
    ("relation", "program"),
    [
        # A change of the model after the last pass of an epoch ends the use of the cache, also where a run resumes.
        (
            "resume",
            FuzzProgram(
                66,
                traits=("temperature",),
                num_train=35,
                settings={"batch_size": 8, "checkpoint_steps": 3, "grad_accum_steps": 2},
            ),
        ),
        # A matrix product of three axes rounds otherwise where its weight requires a gradient, even in evaluation.
        (
            "resume",
            FuzzProgram(
                527,
                blocks=("forward-pre-hook", "attention"),
                inputs="tokens",
                num_train=12,
                position=0.989,
                strategy=use("bias-only", epochs=2),
                settings={"batch_size": 4, "cache": "memory", "checkpoint_steps": 3},
            ),
        ),
        # A model may draw from the generators of Python and numpy.
        (
            "resume",
            FuzzProgram(
                22,
                blocks=("python-random",),
                strategy=(Phase("a", train="body", epochs=2, lr=0.02),),
                settings={"batch_size": 6, "checkpoint_steps": 1},
            ),
        ),
        # A held weight whose gradient rounds to nothing is a warning.
        (
            "freezing",
            FuzzProgram(
                877,
                num_train=19,
                num_val=9,
                position=0.89,
                strategy=use("lp-ft", epochs=1),
                loss="label-smoothing",
                settings={"batch_size": 8, "cache": "off", "grad_accum_steps": 2},
            ),
        ),
    ],
)
def test_a_program_that_once_broke_a_relation_holds(relation, program):
    outcome = check_program(program, [relation])[relation]
    assert (outcome.verdict, outcome.bitwise) == ("equal", True), outcome.reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "relations"), [(range(40), ONE_PROCESS), (range(4), ["two-ranks"])], ids=["one process", "two ranks"]
)
def test_the_relations_of_random_programs_hold(seeds, relations):
    results = list(fuzz(seeds, relations, reduce=False))
    outcomes = {(each.seed, name): outcome for each in results for name, outcome in each.outcomes.items()}
    assert not {key: each.reason for key, each in outcomes.items() if each.verdict == "different"}
    assert sum(each.verdict == "equal" for each in outcomes.values()) > 0.7 * len(outcomes)
    if relations is ONE_PROCESS:
        assert sum(outcomes[seed, "cache"].cached for seed in seeds) >= 0.4 * len(seeds)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_every_planted_defect_is_found_at_its_seed(name):
    seed = MUTANTS[name].seed
    assert find_mutant(name, [seed]) == seed
