import json

import pytest
import torch
from tuneforge_surgical import Surgical
from tuneforge_surgical.surgical import find_block_index

import tuneforge as tf
from tuneforge.plugin import LayerGroupInfo


@pytest.mark.parametrize(
    ("block", "prefix"),
    [("first", "stem."), ("last", "head."), ("body", "body."), ("head", "head."), (1, "body."), ("-3", "stem.")],
)
def test_exactly_the_block_trains_and_all_else_is_equal_to_the_bit(tune, block, prefix):
    tuned = tune(Surgical(block=block, epochs=2, lr=0.01))
    parameters = {name for name in tuned.result.model.parameters() if name.startswith(prefix)}
    assert parameters <= tuned.find_changed()
    assert {name for name in tuned.find_changed() if not name.startswith(prefix)} == set()
    assert len(tuned.result.strategy_steps) == 1


def test_a_head_with_fresh_rows_trains_first_and_is_frozen_while_the_block_trains(tune):
    tuned = tune(Surgical(block="body", head_epochs=1, epochs=2, lr=0.01), known=("0", "1"))
    assert tuned.step_names() == ["fresh-head", "body-only"]
    assert {name.partition(".")[0] for name in tuned.find_changed(since=0)} == {"body", "head"}
    assert {name.partition(".")[0] for name in tuned.find_changed(since=1)} == {"body"}
    assert not torch.equal(tuned.starts[0]["head.weight"], tuned.starts[1]["head.weight"])


def test_fresh_rows_need_no_phase_of_their_own_where_the_head_is_the_block(tune):
    assert tune(Surgical(block="last", epochs=1), known=()).step_names() == ["head-only"]


def test_an_unknown_block_is_an_error_that_lists_the_blocks_before_anything_trains(tune, tmp_path):
    with pytest.raises(tf.UnknownNameError) as caught:
        tune(Surgical(block="conv9"))
    assert "'conv9'" in caught.value.what
    assert "stem, body, head" in caught.value.why
    assert caught.value.where == "--strategy.block"
    assert not list(tmp_path.glob("**/steps.jsonl"))
    with pytest.raises(tf.UnknownNameError, match="from 0 to 2"):
        tune(Surgical(block=3))


def test_a_groups_own_name_beats_the_other_ways_to_say_it():
    groups = [LayerGroupInfo(name, 1, (f"{name}.weight",)) for name in ("2", "0", "first", "head")]
    task = tf.TaskInfo(
        groups=groups,
        classes=(),
        num_train=1,
        num_val=1,
        batch_size=1,
        device="cpu",
        seed=0,
        monitor="loss",
        monitor_mode="min",
    )
    said = ("2", "0", "first", "last", "1", 3, "-1")
    assert [find_block_index(block, task) for block in said] == [0, 1, 2, 3, 1, 3, 3]


def test_it_runs_by_its_name(tune):
    tuned = tune(tf.use("surgical", block="body", epochs=1))
    components = json.loads((tuned.result.run_dir / "run.json").read_text())["components"]
    (strategy,) = (each for each in components if each["hook"] == "finetune_strategy")
    assert (strategy["name"], strategy["distribution"]) == ("surgical", "tuneforge-surgical")
    assert tuned.result.report["strategy"] == "surgical"


def test_it_trains_the_head_first_where_answers_have_no_names(tune):
    numbers = torch.linspace(0, 1, 60 * 9).reshape(60, 9)
    tuned = tune(Surgical(epochs=1, head_epochs=1), data=(numbers[:, :6], numbers[:, 6:]))
    assert tuned.step_names() == ["fresh-head", "stem-only"]
