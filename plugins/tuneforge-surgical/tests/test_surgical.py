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
def test_only_the_block_changes(tune, block, prefix):
    recorded = tune(Surgical(block=block, epochs=2, lr=0.01))
    parameters = {name for name in recorded.result.model.parameters() if name.startswith(prefix)}
    assert parameters <= recorded.find_changed()
    assert {name for name in recorded.find_changed() if not name.startswith(prefix)} == set()
    assert len(recorded.result.strategy_steps) == 1


def test_head_with_new_classes_trains_first_and_is_frozen_while_the_block_trains(tune):
    recorded = tune(Surgical(block="body", head_epochs=1, epochs=2, lr=0.01), known=("0", "1"))
    assert recorded.step_names() == ["new-head", "body-only"]
    assert {name.partition(".")[0] for name in recorded.find_changed(since=0)} == {"body", "head"}
    assert {name.partition(".")[0] for name in recorded.find_changed(since=1)} == {"body"}
    assert not torch.equal(recorded.starts[0]["head.weight"], recorded.starts[1]["head.weight"])


def test_new_head_has_no_phase_of_its_own_if_it_is_the_block(tune):
    assert tune(Surgical(block="last", epochs=1), known=()).step_names() == ["head-only"]


def test_unknown_block_is_refused_before_training_and_the_error_lists_the_blocks(tune, tmp_path):
    with pytest.raises(tf.UnknownNameError) as caught:
        tune(Surgical(block="conv9"))
    assert "'conv9'" in caught.value.what
    assert "stem, body, head" in caught.value.why
    assert caught.value.where == "--strategy.block"
    assert not list(tmp_path.glob("**/steps.jsonl"))
    with pytest.raises(tf.UnknownNameError, match="from 0 to 2"):
        tune(Surgical(block=3))


def test_name_of_a_group_takes_precedence():
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
    blocks = ("2", "0", "first", "last", "1", 3, "-1")
    assert [find_block_index(block, task) for block in blocks] == [0, 1, 2, 3, 1, 3, 3]


def test_strategy_is_found_by_name(tune):
    recorded = tune(tf.use("surgical", block="body", epochs=1))
    components = json.loads((recorded.result.run_dir / "run.json").read_text())["components"]
    (strategy,) = (each for each in components if each["hook"] == "finetune_strategy")
    assert (strategy["name"], strategy["distribution"]) == ("surgical", "tuneforge-surgical")
    assert recorded.result.report["strategy"] == "surgical"


def test_head_trains_first_if_there_are_no_classes(tune):
    table = torch.linspace(0, 1, 60 * 9).reshape(60, 9)
    recorded = tune(Surgical(epochs=1, head_epochs=1), data=(table[:, :6], table[:, 6:]))
    assert recorded.step_names() == ["new-head", "stem-only"]
