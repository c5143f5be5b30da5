"""Models of transformers: loading, layer groups, heads, and every strategy on them."""

from __future__ import annotations

import json
from importlib.metadata import entry_points

import pytest
import torch
import transformers
from small_models import CONTINUAL, PLAN, TEXT_MODELS, AddSampleGroups, list_strategies, make_images
from tuneforge_transformers.groups import find_layer_groups
from tuneforge_transformers.networks import build_text_network, find_head_path, load_network
from tuneforge_transformers.pretrained import read_config_text

import tuneforge as tf
from tuneforge.engine.feature_cache import build as feature_cache_build
from tuneforge.testing import small_options


@pytest.mark.parametrize("name", list_strategies())
def test_every_builtin_strategy_runs_on_bert(tune, folder, tmp_path, name):
    (tmp_path / "plan.toml").write_text(PLAN)
    cls = next(each for each in entry_points(group="tuneforge.finetune_strategy") if each.name == name).load()
    options = small_options(cls) | ({"path": str(tmp_path / "plan.toml")} if name == "plan-file" else {})
    known = ("sea", "sky") if name in CONTINUAL else ()
    result = tune(folder("bert", labels=known), strategy=tf.use(name, **options), callbacks=[AddSampleGroups()])
    assert result.strategy_steps
    assert 0 <= result.report["splits"]["test"]["accuracy"] <= 1


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_groups_are_embeddings_layers_and_head(tune, folder, kind):
    result = tune(folder(kind), strategy=tf.use("gradual-unfreeze", epochs=1))
    assert [group.name for group in result.model.groups] == ["embeddings", "layer1", "layer2", "head"]
    assert [step.train for step, _ in result.strategy_steps] == [
        ("groups[-1:]",),
        ("groups[-2:]",),
        ("groups[-3:]",),
        ("groups[-4:]",),
    ]
    members = [name for name in result.model.parameters() if result.model.groups[1].contains(name)]
    assert members
    assert all(".layer.0." in name for name in members)


def test_image_model_has_the_same_groups(tune, folder):
    result = tune(folder("vit"), data=make_images(48), strategy=tf.use("gradual-unfreeze", epochs=1))
    assert [group.name for group in result.model.groups] == ["embeddings", "layer1", "layer2", "head"]
    last = result.model.groups[-1]
    assert "vit.layernorm.weight" in [name for name in result.model.parameters() if last.contains(name)]


@pytest.mark.parametrize("kind", [*TEXT_MODELS, "vit"])
def test_frozen_backbone_has_a_feature_cache(tune, folder, kind, monkeypatch):
    free = dict.fromkeys(feature_cache_build.MACS_PER_TRACED_MODULE, 0.0)  # models this small are not worth a trace
    monkeypatch.setattr(feature_cache_build, "MACS_PER_TRACED_MODULE", free)
    lines: list[str] = []
    given = {"data": make_images(48)} if kind == "vit" else {}
    tune(folder(kind), cache="memory", strategy=tf.use("head-only", epochs=2), lines=lines, **given)
    assert any(line.startswith("  feature cache: on") for line in lines), lines


def test_logits_equal_those_of_transformers(folder):
    path = folder("bert", labels=("sea", "kitchen", "sky"))
    ours, missing = load_network(path, read_config_text(path), "text", num_outputs=3, pooling="own")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    ids = torch.randint(5, 30, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, 7:] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids, mask), theirs(input_ids=ids, attention_mask=mask).logits)
    assert not missing
    assert ours.uses_attention_bias


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_logits_of_a_text_are_bit_identical_in_batches_with_and_without_padding(folder, kind):
    path = folder(kind)
    network, _ = load_network(path, read_config_text(path), "text", num_outputs=3, pooling="mean")
    ids = torch.randint(5, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    full = torch.ones_like(ids)
    padded = full.clone()
    padded[1:, 7:] = 0
    with torch.no_grad():
        unpadded_batch, padded_batch = network.eval()(ids, full)[0], network(ids, padded)[0]
    assert torch.equal(unpadded_batch, padded_batch)


def test_head_rows_are_kept_by_label_name(tune, folder):
    path = folder("bert", labels=("sky", "desert", "sea"))
    before = transformers.AutoModelForSequenceClassification.from_pretrained(path).classifier.weight
    start: dict[str, torch.Tensor] = {}

    class Recorder:
        @tf.hookimpl
        def phase_started(self, run):
            start["weight"] = run.model.head_module().weight.detach().clone()

    result = tune(path, callbacks=[Recorder()])
    assert result.model.labels == ("kitchen", "sea", "sky")
    assert result.model.pretrained_labels == ("sea", "sky")
    assert torch.equal(start["weight"][1], before[2])
    assert torch.equal(start["weight"][2], before[0])
    assert not torch.equal(start["weight"][0], before[1])


def test_all_head_rows_are_randomly_initialized_if_the_weights_have_no_head(tune, folder):
    lines: list[str] = []
    result = tune(folder("distilbert"), lines=lines)
    assert result.model.pretrained_labels == ()
    assert any(
        "head: randomly initialized, 3 outputs; also randomly initialized: pre_classifier" in line for line in lines
    )


def test_mean_pooling_ignores_padding(folder):
    path = folder("bert")
    network, _ = load_network(path, read_config_text(path), "text", num_outputs=3, pooling="mean")
    base = transformers.AutoModel.from_pretrained(path).eval()
    ids = torch.randint(5, 30, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 10, [1] * 4 + [0] * 6])
    features: list[torch.Tensor] = []
    network.classifier.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    with torch.no_grad():
        network.eval()(ids, mask)
        hidden = base(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(features[0][1], hidden[1, :4].mean(0))
    torch.testing.assert_close(features[0][0], hidden[0].mean(0))


@pytest.mark.parametrize("kind", ["albert", "electra", "mpnet", "deberta-v2", "xlnet", "gpt2", "bart", "modernbert"])
def test_groups_of_other_architectures_contain_every_parameter_once(kind):
    sizes = {
        32: ("hidden_size", "embedding_size", "d_model", "n_embd"),
        2: ("num_hidden_layers", "n_layer", "encoder_layers", "decoder_layers", "bos_token_id", "cls_token_id"),
        4: ("num_attention_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads"),
        64: ("intermediate_size", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
        60: ("vocab_size",), 0: ("pad_token_id",), 17: ("eos_token_id",), 3: ("sep_token_id",),
    }  # fmt: skip
    small = {name: size for size, names in sizes.items() for name in names}
    known = transformers.CONFIG_MAPPING[kind]().to_dict()
    config = {**{name: value for name, value in small.items() if name in known}, "model_type": kind}
    network = build_text_network(json.dumps(config), num_outputs=3, pooling="own")
    head = find_head_path(network)
    model = tf.Model(network, groups=find_layer_groups(network, head), head=head)
    assert model.groups[0].name == "embeddings"
    assert model.groups[-1].name == "head"
    assert len(model.groups) == {"bart": 6, "albert": 3}.get(kind, 4)


EMPTY = {"model.safetensors": ""}


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, tf.FolderError, "not the folder of a transformers model"),
        ({"config.json": '{"model_type": "bert"}'}, tf.FolderError, "has no .safetensors weights"),
        ({"config.json": '{"model_type": "bert"}', "pytorch_model.bin": ""}, tf.UnsafeFileError, "is not read"),
        ({"config.json": '{"model_type": "bert"}', **EMPTY}, tf.UsageError, "cannot be read"),
        ({"config.json": '{"model_type": "its-own"}', **EMPTY}, tf.UsageError, "no architecture 'its-own'"),
        ({"config.json": '{"model_type": "vit"}', **EMPTY}, tf.UsageError, "no vit that classifies texts"),
    ],
)
def test_unusable_model_folder_is_refused(tune, folder, tmp_path, table, files, error, words):
    broken = tmp_path / "model"
    broken.mkdir()
    for name, content in files.items():
        (broken / name).write_text(content)
    data = tf.use("text", path=str(table), tokenizer=str(folder("bert")))
    with pytest.raises(error, match=words):
        tune(broken, data=data)


def test_weights_of_another_model_are_refused(tune, folder, tmp_path, table):
    broken = tmp_path / "model"
    transformers.AutoModel.from_pretrained(folder("distilbert")).save_pretrained(broken)
    (broken / "config.json").write_bytes((folder("bert") / "config.json").read_bytes())
    with pytest.raises(tf.UsageError, match="the weights lack"):
        tune(broken, data=tf.use("text", path=str(table), tokenizer=str(folder("bert"))))


def test_repository_is_downloaded_from_the_hub_without_pickles(monkeypatch, folder, table, tune):
    requests = []

    def download(name, *, revision, allow_patterns):
        requests.append((name, revision, tuple(allow_patterns)))
        if name == "nobody/nothing":
            raise OSError("no network")
        return str(folder("bert"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = tf.use("transformers", pretrained="someone/bert", revision="abc")
    tune(folder("bert"), model=model)
    assert {(name, revision) for name, revision, _ in requests} == {("someone/bert", "abc")}
    assert not [
        pattern for _, _, patterns in requests for pattern in patterns if pattern.endswith((".bin", ".pt", "*"))
    ]
    with pytest.raises(tf.TryAgainError, match="could be downloaded from the hub"):
        tune(folder("bert"), model=tf.use("transformers", pretrained="nobody/nothing"))
    with pytest.raises(tf.UsageError, match="there is no folder"):
        tune(folder("bert"), model=tf.use("transformers", pretrained="./nothing"))
