"""LoRA: what trains is what peft counts, the base stays to the bit, and the run's weights are plain at the end."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from tuneforge_transformers import lora
from world import TEXT_MODELS, make_images

import tuneforge as tf
from tuneforge.exporting import load_tensors

LORA = tf.use("lora", rank=4)


def read_saved_names(result):
    return set(load_tensors(result.run_dir / "model.safetensors")[0])


class OutputsAtPhaseEnd:
    """Keeps some inputs and their logits as the training ends, before the changes are merged."""

    @tf.hookimpl
    def phase_ended(self, run):
        self.inputs = run.example
        run.model.module.eval()
        with torch.no_grad():
            self.logits = run.forward(run.example)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # which peft asks for
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_as_many_parameters_train_as_peft_reports(tune, folder, kind):
    labels = ("kitchen", "sea", "sky")
    result = tune(folder(kind, labels=labels), adapt=[LORA], strategy=tf.use("full", epochs=1))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder(kind, labels=labels))
    outside = ["classifier", "pre_classifier"] if kind == "distilbert" else None
    targets = ["q_lin", "v_lin"] if kind == "distilbert" else None
    settings = peft.LoraConfig(r=4, task_type=peft.TaskType.SEQ_CLS, modules_to_save=outside, target_modules=targets)
    counted = peft.get_peft_model(theirs, settings).get_nb_trainable_parameters()[0]
    assert result.strategy_steps[0][1].num_trainable == counted


def test_nothing_but_the_changes_and_the_head_moves(tune, folder):
    path = folder("bert")
    before = transformers.AutoModel.from_pretrained(path).state_dict()
    changes = tf.use("lora", target_modules=("query",), num_top_layers=1)
    result = tune(path, adapt=[changes], strategy=tf.use("full", epochs=1))
    after = result.model.module.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[f"bert.{name}"])}
    assert moved == {"encoder.layer.1.attention.self.query.weight"}


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_the_weights_of_the_run_are_those_of_a_plain_model(tune, folder, kind):
    given = {"data": make_images(48)} if kind == "vit" else {}
    plain = tune(folder(kind), strategy=tf.use("full", epochs=1), **given)
    changed = tune(folder(kind), adapt=[LORA], strategy=tf.use("full", epochs=1), **given)
    assert read_saved_names(changed) == read_saved_names(plain)
    assert not any("lora" in name for name in changed.model.parameters())


def test_merging_changes_no_answer_but_in_the_last_bits(tune, folder):
    seen = OutputsAtPhaseEnd()
    strategy = tf.use("full", epochs=3, lr=1e-2, restore_best=False)
    merged = tune(folder("bert"), adapt=[LORA], strategy=strategy, callbacks=[seen]).model.module.eval()
    untouched = tune(folder("bert"), adapt=[LORA], strategy=tf.use("head-only", epochs=1)).model.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**seen.inputs), seen.logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(untouched(**seen.inputs), seen.logits, atol=1e-2)


def test_evaluating_the_folder_gives_the_report_without_peft(tune, folder, monkeypatch):
    result = tune(folder("bert"), adapt=[LORA], strategy=tf.use("full", epochs=1))
    monkeypatch.setattr(lora, "_import_peft", lambda: pytest.fail("peft was asked for"))
    again = tf.evaluate(result.run_dir)
    assert again["test"] == result.report["splits"]["test"]


def test_best_weights_are_restored_and_mixed_with_changes_in_place(tune, folder):
    result = tune(folder("bert"), adapt=[LORA], strategy=tf.use("wise-ft", epochs=2, weights=(0.0, 0.5, 1.0)))
    assert result.strategy_steps[-1][1].selection["weight"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_modules": ("nothing",)}, tf.UsageError, "find no place"),
        ({"num_top_layers": 3}, tf.UsageError, "has 2 layers, not 3"),
        ({"modules_to_save": ("bert.nothing",)}, tf.UsageError, "no module 'bert.nothing'"),
        ({"rank": 0}, tf.OptionError, "rank"),
    ],
)
def test_wrong_options_are_refused(tune, folder, options, error, words):
    with pytest.raises(error, match=words):
        tune(folder("bert"), adapt=[tf.use("lora", **options)])


def test_another_model_is_refused(tmp_path):
    engine = tf.Engine(
        data=make_images(12), model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3)), adapt=["lora"],
        page=False, out=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(tf.PluginError, match="a model of the transformers library"):
        engine.run()


def test_a_missing_peft_is_named(tune, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(tf.MissingDependencyError, match="needs peft"):
        tune(folder("bert"), adapt=[LORA])


@pytest.mark.parametrize("adapt", [[], [LORA]], ids=["plain", "lora"])
def test_the_librarys_own_class_takes_the_weights_of_the_run(tune, folder, adapt):
    result = tune(folder("roberta"), adapt=adapt, strategy=tf.use("full", epochs=1))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder("roberta"), num_labels=3).eval()
    theirs.load_state_dict(load_tensors(result.run_dir / "model.safetensors")[0])
    tuned = tf.load(result.run_dir)
    tokens = transformers.AutoTokenizer.from_pretrained(folder("roberta"))("the old boat", return_tensors="pt")
    with torch.no_grad():
        logits = theirs(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits[0]
    torch.testing.assert_close(next(tuned.predict_outputs(["the old boat"])), logits, rtol=1e-4, atol=1e-5)
