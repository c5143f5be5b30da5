"""The differential fuzzer: it finds planted defects, reduces what it finds, and can be continued."""

import os

import attrs
import pytest

from tuneforge import Phase
from tuneforge.testing import fuzz as fuzz_module
from tuneforge.testing.fuzz import FuzzProgram, check_program, draw_program, find_mutant, fuzz
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
    with MUTANTS[mutant]():
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


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("TUNEFORGE_SLOW_CHECKS"), reason="takes minutes; CONTRIBUTING.md has the command"
)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_planted_defect_is_found_within_300_seeds(mutant):
    assert find_mutant(mutant, range(300)) is not None
