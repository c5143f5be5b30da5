"""LoRA trains the parameters that peft would, keeps the base bit-identical, and leaves plain weights at the end."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from small_models import TEXT_MODELS, make_images
from tuneforge_transformers import lora

import tuneforge as tf
from tuneforge.exporting import load_tensors

LORA = tf.use("lora", rank=4)


def read_saved_names(result):
    return set(load_tensors(result.run_dir / "model.safetensors")[0])


class OutputsAtPhaseEnd:
    """Records a batch and its logits at the end of training, before the factors are merged."""

    @tf.hookimpl
    def phase_ended(self, run):
        self.inputs = run.example
        run.model.module.eval()
        with torch.no_grad():
            self.logits = run.forward(run.example)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # which peft asks for
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_number_of_trained_parameters_equals_that_of_peft(tune, folder, kind):
    labels = ("kitchen", "sea", "sky")
    result = tune(folder(kind, labels=labels), adapt=[LORA], strategy=tf.use("full", epochs=1))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder(kind, labels=labels))
    modules_to_save = ["classifier", "pre_classifier"] if kind == "distilbert" else None
    targets = ["q_lin", "v_lin"] if kind == "distilbert" else None
    settings = peft.LoraConfig(
        r=4, task_type=peft.TaskType.SEQ_CLS, modules_to_save=modules_to_save, target_modules=targets
    )
    expected = peft.get_peft_model(theirs, settings).get_nb_trainable_parameters()[0]
    assert result.strategy_steps[0][1].num_trainable == expected


def test_only_adapted_layers_and_the_head_change(tune, folder):
    path = folder("bert")
    before = transformers.AutoModel.from_pretrained(path).state_dict()
    adapter = tf.use("lora", target_modules=("query",), num_top_layers=1)
    result = tune(path, adapt=[adapter], strategy=tf.use("full", epochs=1))
    after = result.model.module.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[f"bert.{name}"])}
    assert changed == {"encoder.layer.1.attention.self.query.weight"}


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_saved_weights_have_the_names_of_the_plain_model(tune, folder, kind):
    given = {"data": make_images(48)} if kind == "vit" else {}
    plain = tune(folder(kind), strategy=tf.use("full", epochs=1), **given)
    adapted = tune(folder(kind), adapt=[LORA], strategy=tf.use("full", epochs=1), **given)
    assert read_saved_names(adapted) == read_saved_names(plain)
    assert not any("lora" in name for name in adapted.model.parameters())


def test_merging_changes_logits_only_within_rounding(tune, folder):
    recorder = OutputsAtPhaseEnd()
    strategy = tf.use("full", epochs=3, lr=1e-2, restore_best=False)
    merged = tune(folder("bert"), adapt=[LORA], strategy=strategy, callbacks=[recorder]).model.module.eval()
    untouched = tune(folder("bert"), adapt=[LORA], strategy=tf.use("head-only", epochs=1)).model.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**recorder.inputs), recorder.logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(untouched(**recorder.inputs), recorder.logits, atol=1e-2)


def test_run_directory_is_evaluated_without_peft(tune, folder, monkeypatch):
    result = tune(folder("bert"), adapt=[LORA], strategy=tf.use("full", epochs=1))
    monkeypatch.setattr(lora, "_import_peft", lambda: pytest.fail("peft was imported"))
    again = tf.evaluate(result.run_dir)
    assert again["test"] == result.report["splits"]["test"]


def test_weights_with_lora_factors_are_averaged(tune, folder):
    result = tune(folder("bert"), adapt=[LORA], strategy=tf.use("wise-ft", epochs=2, weights=(0.0, 0.5, 1.0)))
    assert result.strategy_steps[-1][1].selection["weight"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_modules": ("nothing",)}, tf.UsageError, "no layer to adapt"),
        ({"num_top_layers": 3}, tf.UsageError, "has 2 layers, not 3"),
        ({"modules_to_save": ("bert.nothing",)}, tf.UsageError, "no module 'bert.nothing'"),
        ({"rank": 0}, tf.OptionError, "rank"),
    ],
)
def test_wrong_options_are_refused(tune, folder, options, error, words):
    with pytest.raises(error, match=words):
        tune(folder("bert"), adapt=[tf.use("lora", **options)])


def test_model_of_another_library_is_refused(tmp_path):
    engine = tf.Engine(
        data=make_images(12), model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3)), adapt=["lora"],
        page=False, out=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(tf.PluginError, match="a model of the transformers library"):
        engine.run()


def test_missing_peft_is_named(tune, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(tf.MissingDependencyError, match="needs peft"):
        tune(folder("bert"), adapt=[LORA])


@pytest.mark.parametrize("adapt", [[], [LORA]], ids=["plain", "lora"])
def test_saved_weights_load_into_the_class_of_transformers(tune, folder, adapt):
    result = tune(folder("roberta"), adapt=adapt, strategy=tf.use("full", epochs=1))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder("roberta"), num_labels=3).eval()
    theirs.load_state_dict(load_tensors(result.run_dir / "model.safetensors")[0])
    predictor = tf.load(result.run_dir)
    tokens = transformers.AutoTokenizer.from_pretrained(folder("roberta"))("the old boat", return_tensors="pt")
    with torch.no_grad():
        logits = theirs(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits[0]
    torch.testing.assert_close(next(predictor.predict_outputs(["the old boat"])), logits, rtol=1e-4, atol=1e-5)
