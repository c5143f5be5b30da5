"""The feature cache: one pass over the data, the same results, and no cache where it would be wrong or slower."""

import os
import random
import shutil
from collections import Counter

import attrs
import pytest
import torch
from tiny import blobs, tiny_data, tiny_net
from torch import nn
from torch.nn import functional as F

import tuneforge as tf
from tuneforge.engine.feature_cache import build as feature_cache_build
from tuneforge.engine.feature_cache import disk as store
from tuneforge.engine.feature_cache import extract as fill
from tuneforge.engine.feature_cache.graph_split import trace_with_export, trace_with_fx
from tuneforge.engine.storage import fault_injection as faults

TRACERS = (trace_with_fx, trace_with_export)


@pytest.fixture(autouse=True)
def cache_cheap_layers(monkeypatch):
    """Cache the layers of small models, although that would not pay."""
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE", 0.0)
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE_ON_DISK", 0.0)
    monkeypatch.setattr(feature_cache_build, "MACS_PER_TRACED_MODULE", dict.fromkeys(TRACERS, 0.0))


def run_and_log(tune, strategy, **given):
    messages = []
    result = tune(strategy, log=messages.append, **given)
    return result, [line.strip() for line in messages if line.strip().startswith("feature cache: o")]


def weights(result):
    return {name: tensor.clone() for name, tensor in result.model.module.state_dict().items()}


PHASES = [tf.Phase("head", train="head", epochs=3, lr=0.02), tf.Phase("top", train="groups[-2:]", epochs=3, lr=0.02)]


def test_cached_and_uncached_phases_agree_and_are_deterministic(tune):
    cached, messages = run_and_log(tune, PHASES, optimizer="sgd")
    again, _ = run_and_log(tune, PHASES, optimizer="sgd")
    plain, silent = run_and_log(tune, PHASES, cache="off", optimizer="sgd")
    assert [line.partition(" (")[0] for line in messages] == ["feature cache: on", "feature cache: on"]
    assert [line.partition(",")[0] for line in silent] == ["feature cache: off", "feature cache: off"]
    for name, tensor in weights(cached).items():
        assert torch.equal(tensor, weights(again)[name])
        assert torch.allclose(tensor, weights(plain)[name], atol=1e-5)


class CountingSource:
    """A source that counts the samples that are fetched."""

    def __init__(self, split):
        self.split, self.looks = split, 0

    def __len__(self):
        return len(self.split)

    def fetch(self, indices):
        self.looks += len(indices)
        return self.split.fetch(indices)


def test_each_sample_is_fetched_once_for_any_number_of_epochs(tune):
    looks = {}
    for epochs in (2, 20):
        train = blobs(960, seed=1)
        source = CountingSource(train)
        data = attrs.evolve(tiny_data(), train=tf.Split(source, train.targets))
        tune([tf.Phase("head", train="head", epochs=epochs)], data=data)
        looks[epochs] = source.looks
    assert looks[2] == looks[20] < 2.25 * 960  # once for the fingerprint, once for the features


def reason(tune, network, phase=None, **given):
    _, messages = run_and_log(tune, [phase or tf.Phase("head", train="head", epochs=2)], model=network, **given)
    (line,) = messages
    assert line.startswith("feature cache: off, because ")
    return line


class Body(nn.Module):
    """The base of the cases below: (batch, 8) -> (batch, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.between(self.body(inputs)))

    def between(self, features):
        return features


class Mixes(Body):
    def between(self, features):
        return features - features.mean(0, keepdim=True)


class Branches(Body):
    def between(self, features):
        return features if features.sum() > 0 else -features


class Skips(Body):
    def forward(self, inputs):
        return self.head(self.body(inputs)) + inputs[:, :3]


class Functional(Body):
    def between(self, features):
        return F.dropout(features, 0.5, training=self.training)


class Always(Body):
    def between(self, features):
        return features + torch.rand_like(features)


class InPlace(Body):
    """A frozen value that a trained part overwrites in place, and that is read again afterwards."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def forward(self, inputs):
        features = self.body(inputs)
        features += self.middle(features.clone())
        return self.head(features * features)


class Viewer(Body):
    """A shape crosses the cut."""

    def forward(self, inputs):
        features = self.body(inputs)
        count = features.size(0)
        return self.head(features.view(count, -1))


class DrawsInPython(Body):
    """Layer drop with a generator that a trace does not see: it would record one branch for good."""

    def between(self, features):
        return features if random.random() < 0.5 else -features


class DrawsAConstant(Body):
    def between(self, features):
        return features + torch.rand(1)


class Odd(Body):
    def between(self, features):
        return features * len(str(features.shape)) if isinstance(features, torch.Tensor) else features.odd(1)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (DrawsInPython, "draws random numbers"),
        (DrawsAConstant, "draws random numbers"),
        (Odd, "parts of the model cannot run"),
        (Mixes, "mixes samples"),
        (Branches, "cannot be traced"),
    ],
)
def test_model_that_cannot_be_split_trains_uncached_and_logs_why(tune, network, words):
    assert words in reason(tune, network())


@pytest.mark.parametrize("network", [Viewer, Body, Skips, Functional, Always])
def test_model_that_can_be_split_is_cached_and_trains_the_same(tune, network):
    phase = [tf.Phase("head", train="head", epochs=2, lr=0.05)]
    one, messages = run_and_log(tune, phase, model=network())
    two, _ = run_and_log(tune, phase, model=network(), cache="off")
    assert messages[0].startswith("feature cache: on")
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-5)


def test_value_overwritten_in_place_by_training_is_not_cached(tune):
    phase = tf.Phase("x", train=("middle", "head"), epochs=2, lr=0.05)
    one, messages = run_and_log(tune, [phase], model=tf.Model.from_module(InPlace(), head="head"))
    two, _ = run_and_log(tune, [phase], model=tf.Model.from_module(InPlace(), head="head"), cache="off")
    assert messages[0].startswith("feature cache: on")
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-6)


def test_forward_hooks_and_updating_batchnorm_are_not_cached(tune):
    hooked = tiny_net()
    hooked.first.register_forward_hook(lambda module, args, output: None)
    assert "forward hooks" in reason(tune, hooked)
    moving = tf.Phase("head", train="head", epochs=2, batchnorm_stats="updating")
    _, messages = run_and_log(tune, [moving], model=tiny_net())
    assert messages[0].startswith("feature cache: on")  # for the layers before the first norm that updates


def test_component_that_needs_inputs_turns_the_cache_off(tune):
    class Teacher:
        needs_inputs = True

        @tf.hookimpl(wrapper=True)
        def train_step(self, batch):
            assert batch.inputs.shape[1] == 8
            result = yield
            return result

    assert "needs the model's inputs" in reason(tune, tiny_net(), callbacks=[Teacher()])


def test_cheap_backbone_or_large_features_are_not_cached(tune, monkeypatch):
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE", 1e9)
    assert "so cheap" in reason(tune, tiny_net())
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE", 0.0)
    assert "more than --cache-mb 0" in reason(tune, tiny_net(), cache_mb=0, cache="memory")
    assert "more than --cache-mb 0" in reason(tune, tiny_net(), cache_mb=0, cache_disk_mb=0)


def test_class_weights_and_sampling_apply_to_cached_batches(tune):
    phase = tf.Phase("head", train="head", epochs=2, class_weights={"b": 3.0}, sampling={"a": 0.0})
    one, messages = run_and_log(tune, [phase])
    two, _ = run_and_log(tune, [phase], cache="off")
    assert messages[0].startswith("feature cache: on")
    assert torch.allclose(weights(one)["head.weight"], weights(two)["head.weight"], atol=1e-6)


def test_split_of_odd_size_is_cached_to_the_last_sample(tune):
    data = attrs.evolve(tiny_data(), train=tiny_data().train.subset(torch.arange(67)))
    one, _ = run_and_log(tune, PHASES[:1], data=data)
    two, _ = run_and_log(tune, PHASES[:1], data=data, cache="off")
    assert torch.allclose(weights(one)["head.weight"], weights(two)["head.weight"], atol=1e-6)


def count_samples(network):
    """Return the network, and the samples that its first layer gets, counted by its own forward."""
    count = Counter()
    plain = network.first[0].forward

    def forward(inputs):
        if isinstance(inputs, torch.Tensor):
            count["samples"] += len(inputs)
        return plain(inputs)

    network.first[0].forward = forward
    return network, count


HEAD = tf.Phase("head", train="head", epochs=3, lr=0.02)
VERIFICATION_SAMPLES = 2 * 96 + 40  # each of three batches passes the whole model and its parts, and a few samples more


def test_another_strategy_or_seed_reuses_features_from_disk(tune):
    _, messages = run_and_log(tune, [HEAD], model=count_samples(tiny_net())[0])
    assert messages[0].endswith("the frozen backbone runs once per sample")
    for given in ({"seed": 5}, {"optimizer": "sgd"}):
        network, count = count_samples(tiny_net())
        looks = {}

        def before(task, count=count, looks=looks):
            looks["before"] = count["samples"]
            yield attrs.evolve(HEAD, name="other", epochs=2)
            looks["after"] = count["samples"]

        _, messages = run_and_log(tune, before, model=network, **given)
        assert messages[0].endswith("features computed earlier are reused")
        assert looks["after"] - looks["before"] <= VERIFICATION_SAMPLES + 2 * 64  # one batch of each split is verified


def test_features_from_disk_give_bit_identical_weights(tune):
    one, _ = run_and_log(tune, [HEAD])
    two, messages = run_and_log(tune, [HEAD])
    three, memory = run_and_log(tune, [HEAD], cache="memory")
    assert messages[0].endswith("features computed earlier are reused")
    assert memory[0].endswith("the frozen backbone runs once per sample")
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name])
        assert torch.equal(tensor, weights(three)[name])


def test_memory_mapped_features_give_bit_identical_weights(tune):
    one, _ = run_and_log(tune, [HEAD])
    two, messages = run_and_log(tune, [HEAD], cache_mb=0)
    three, _ = run_and_log(tune, [HEAD], cache_mb=0)
    assert messages[0].startswith("feature cache: on")
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name])
        assert torch.equal(tensor, weights(three)[name])


A, B, C, D = (letter * 64 for letter in "abcd")


def make_disk_cache(tmp_path, limit_mb=100):
    return store.DiskCache(tmp_path / "cache", limit_mb)


def test_changed_features_are_found_by_recomputing_one_batch(tune, tmp_path):
    run_and_log(tune, [HEAD], cache_dir=tmp_path)
    for entry in store.DiskCache(tmp_path, 100).entries():
        (value,), _ = store.DiskCache(tmp_path, 100).get(entry.path.name, use_mmap=False)
        changed = value * (1 + 1e-6)
        shutil.rmtree(entry.path)
        store.DiskCache(tmp_path, 100).put(entry.path.name, [(changed,)], entry.metadata)
    with pytest.raises(tf.HaltError, match="not what the model computes now"):
        run_and_log(tune, [HEAD], cache_dir=tmp_path)


def test_damaged_entry_is_detected_and_computed_again(tune, tmp_path):
    expected = weights(run_and_log(tune, [HEAD], cache_dir=tmp_path)[0])
    chance = random.Random(0)
    for number in range(40):
        entries = store.DiskCache(tmp_path, 100).entries()
        assert len(entries) == 2
        file = chance.choice(sorted(entries[number % 2].path.iterdir()))
        content = bytearray(file.read_bytes())
        if number % 5 == 4:
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        assert (
            sum(store.DiskCache(tmp_path, 100).get(each.path.name, use_mmap=False)[0] is None for each in entries) == 1
        )
        assert len(store.DiskCache(tmp_path, 100).entries()) == 1
        result, _ = run_and_log(tune, [HEAD], cache_dir=tmp_path)
        for name, tensor in weights(result).items():
            assert torch.equal(tensor, expected[name])


def test_least_recently_used_entry_and_leftovers_are_deleted(tmp_path):
    kept = make_disk_cache(tmp_path, limit_mb=2)
    others = [kept.entry_dir("notes"), kept.directory / "photos", kept.entry_dir(".x.1.part")]
    for other in others:
        other.mkdir(parents=True)
    for place, key in enumerate((A, B, C)):
        kept.put(key, [(torch.zeros(200_000),)], {})
        os.utime(kept.entry_dir(key), (place, place))
    assert [entry.path.name for entry in kept.entries()] == [B, C]
    kept.entry_dir(f".{D}.999999.part").mkdir()
    kept.get(B, use_mmap=False)
    kept.put(D, [(torch.zeros(200_000),)], {})
    assert [entry.path.name for entry in kept.entries()] == [B, D]
    assert not kept.entry_dir(f".{D}.999999.part").exists()
    kept.clear()
    assert all(other.is_dir() for other in others)  # other directories are never touched


def test_entry_that_another_process_wrote_first_stays(tmp_path):
    kept = make_disk_cache(tmp_path)
    kept.put(A, [(torch.arange(3.0),)], {"by": "first"})
    kept.put(A, [(torch.arange(3.0),)], {"by": "second"})
    (entry,) = kept.entries()
    assert entry.metadata == {"by": "first"}
    assert [path.name for path in kept.entry_dir("").iterdir()] == [A]


def test_entry_in_use_stays_readable_after_deletion(tmp_path):
    kept = make_disk_cache(tmp_path)
    kept.put(A, [(torch.arange(5.0),), (torch.arange(2.0),)], {})
    (value,), _ = kept.get(A, use_mmap=True)
    assert kept.clear() > 0
    assert value.tolist() == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("kill", range(1, 5))
def test_process_killed_while_writing_leaves_no_partial_entry(tmp_path, kill):
    kept = make_disk_cache(tmp_path)
    passed = iter(range(1, 10))

    class Killed(BaseException):
        pass

    def hook(name):
        if next(passed) == kill:
            raise Killed

    faults.hook = hook
    with pytest.raises(Killed):
        kept.put(A, [(torch.arange(3.0),)], {})
    faults.hook = None
    values, trouble = kept.get(A, use_mmap=False)
    assert (values is None or values[0].tolist() == [0, 1, 2], trouble) == (True, "")


def test_full_disk_prevents_sharing_but_not_the_run(tune, tmp_path):
    def full(name):
        if name == "cache.values-written":
            raise OSError(28, "No space left on device")

    expected = weights(run_and_log(tune, [HEAD], cache="memory")[0])
    messages = []
    faults.hook = full
    result = tune([HEAD], cache_dir=tmp_path, log=messages.append)
    faults.hook = None
    assert any(
        "feature cache: not written to disk, because the cache cannot be written (No space left" in line
        for line in messages
    )
    assert list((tmp_path / "features").iterdir()) == []
    for name, tensor in weights(result).items():
        assert torch.equal(tensor, expected[name])


def test_unwritable_cache_prevents_sharing_but_not_the_run(tune, tmp_path):
    (tmp_path / "file").write_text("")
    _, messages = run_and_log(tune, [HEAD], cache_dir=tmp_path / "file")
    assert messages[-1].startswith("feature cache: on")


def test_augmented_copies_are_reused_and_exact_if_there_is_one_per_epoch(tune):
    ways = {"augment": [tf.use("tiny:GaussianJitter")], "optimizer": "sgd"}
    six = attrs.evolve(HEAD, epochs=6)
    banked, messages = run_and_log(tune, [six], cache_copies=3, **ways)
    assert "3 copies per sample" in messages[0]
    assert banked.strategy_steps[0][1].num_augmented_copies == 3
    exact, messages = run_and_log(tune, [six], cache_copies=6, **ways)
    assert "random augmentation cost no more than 6 cached augmented copies" in messages[0]
    assert exact.strategy_steps[0][1].num_augmented_copies == 0
    again, messages = run_and_log(tune, [six], cache_copies=3, **ways)
    assert messages[0].endswith("features computed earlier are reused")
    first = attrs.evolve(HEAD, epochs=4, schedule="constant")
    short, _ = run_and_log(tune, [first], cache_copies=3, **ways)
    assert torch.equal(weights(banked)["head.weight"], weights(again)["head.weight"])
    losses = [
        [entry["train"]["loss"] for entry in each.strategy_steps[0][1].history] for each in (banked, exact, short)
    ]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-5)  # the first copies are the epochs' own augmentations
    assert losses[0][3] != pytest.approx(losses[1][3], rel=1e-5)  # the fourth epoch uses the first copy again


def test_augmentation_that_mixes_samples_is_not_cached(tune):
    class Pairs:
        def augment(self, run, batch):
            return batch

    given = {"augment": [tf.use("mix-up")]}
    assert "'mix-up' may combine several samples" in reason(tune, tiny_net(), attrs.evolve(HEAD, epochs=9), **given)


class Exported(nn.Module):
    """A model that `torch.export` can trace and `torch.fx` cannot: Python code over a shape, and starred arguments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        size = inputs.shape[0]
        if inputs.dim() == 2 and int(inputs.shape[1]) in range(9):
            inputs = inputs.reshape(size, -1)
        parts = [*torch.chunk(self.body(inputs), 2, dim=1)]
        return self.head(self.middle(torch.cat(parts, dim=1)))


@pytest.mark.parametrize("train", ["head", ("middle", "head")])
def test_model_that_fx_cannot_trace_is_exported_and_trains_the_same(tune, train):
    with pytest.raises(Exception, match=r"symbolically traced|Proxy|proxy|iter"):
        torch.fx.Tracer().trace(Exported())
    phase = [tf.Phase("x", train=train, epochs=2, lr=0.05)]
    one, messages = run_and_log(tune, phase, model=tf.Model.from_module(Exported(), head="head"), optimizer="sgd")
    two, _ = run_and_log(tune, phase, model=tf.Model.from_module(Exported(), head="head"), optimizer="sgd", cache="off")
    assert messages[0].startswith("feature cache: on")
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-5)


GRADUAL = [
    tf.Phase(f"top{count}", train=f"groups[-{count}:]", epochs=2, lr=0.02, layer_decay=0.5) for count in (1, 2, 3)
]


@pytest.mark.parametrize("cache", ["auto", "memory"])
def test_one_pass_extracts_features_for_every_phase_of_a_plan(tune, monkeypatch, cache):
    def one_by_one(task):
        for phase in GRADUAL:
            _ = yield phase

    network, _ = count_samples(tiny_net())
    planned, messages = run_and_log(tune, GRADUAL, model=network, optimizer="sgd", cache=cache)
    assert [line.rpartition("; ")[2] for line in messages] == [
        "the frozen backbone runs once per sample",
        "features computed earlier are reused",
    ]
    monkeypatch.setenv("TUNEFORGE_CACHE", os.environ["TUNEFORGE_CACHE"] + "/other")
    asked, messages = run_and_log(tune, one_by_one, optimizer="sgd", cache=cache)
    assert [line.rpartition("; ")[2] for line in messages] == [
        "the frozen backbone runs once per sample",
        "the frozen backbone runs once per sample",
    ]
    for name, tensor in weights(planned).items():
        assert torch.equal(tensor, weights(asked)[name])


def test_head_fit_uses_features_of_the_phase_before(tune):
    _, messages = run_and_log(tune, [HEAD, tf.HeadFit("fit", l2=0.1)])
    assert [line.rpartition("; ")[2] for line in messages] == [
        "the frozen backbone runs once per sample",
        "features computed earlier are reused",
    ]


def test_phase_of_one_epoch_is_cached_only_on_disk(tune):
    once = attrs.evolve(HEAD, epochs=1)
    assert "each sample is used only once" in reason(tune, tiny_net(), once, cache="memory")
    _, messages = run_and_log(tune, [once])
    assert messages[0].endswith("the frozen backbone runs once per sample")


def test_run_stopped_while_extracting_features_resumes_bit_identical(tune, tmp_path):
    data = {"data": tiny_data(), "batch_size": 16, "page": False, "cache": "memory"}
    whole = tf.Engine(strategy=tf_plan, model=tiny_net(), out=tmp_path / "whole", **data).run()
    asked = tf.Engine(strategy=tf_plan, model=tiny_net(), out=tmp_path / "r", **data)
    blocks = fill.FeatureExtractor._compute_features

    def block(*given):
        asked.stop("SIGTERM", exit_code=143)
        return blocks(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill.FeatureExtractor, "_compute_features", block)
        with pytest.raises(tf.StoppedError):
            asked.run()
    resumed = tf.Engine.resume(tmp_path / "r", data=tiny_data(), model=tiny_net(), strategy=tf_plan).run()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name])


def tf_plan(task):
    yield HEAD


def test_features_of_a_source_that_changed_during_the_run_are_not_shared(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE", 0.0)
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE_ON_DISK", 0.0)

    class Breaks:
        def __init__(self, split, *, breaks):
            self.split, self.breaks, self.reads = split, breaks, 0

        def __len__(self):
            return len(self.split)

        def fetch(self, indices):
            self.reads += 1
            return self.split.fetch(indices)

        def fingerprint(self):
            return None if self.breaks and self.reads > 2 else self.split.source.fingerprint()

    stored = {}
    for breaks in (False, True):
        data = tiny_data()
        train = tf.Split(Breaks(data.train, breaks=breaks), data.train.targets)
        phases = [tf.Phase("head", train="head", epochs=2)]
        settings = {"cache_dir": tmp_path / f"cache-{breaks}"}
        result = tune(phases, data=attrs.evolve(data, train=train), **settings)
        stored[breaks] = len(list((tmp_path / f"cache-{breaks}").glob("features/*")))
        assert ("the data source changed during the run" in (result.run_dir / "log.txt").read_text()) is breaks
    assert stored[True] == stored[False] - 1
