"""A bundle is enough by itself, says what changed in it, and answers as the run did."""

import json
import shutil
import threading

import pytest
import torch
from bundles import data, finished
from tiny import blobs, tiny_net

import tuneforge as tf
from tuneforge.exporting import load_bundle, load_inference_model
from tuneforge.exporting.bundle import list_backends
from tuneforge.exporting.exporter import export
from tuneforge.exporting.reference_outputs import evenly_spaced_rows, hash_samples, summarize_inputs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("run") / "blobs")


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    return export(run, to=["safetensors"], out=tmp_path_factory.mktemp("bundle") / "b", data=data())


@pytest.fixture
def bundle(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "b")


def test_a_bundle_predicts_as_its_run_and_without_it(run, bundle, request):
    stored = blobs(40, seed=9).fetch(torch.arange(40))
    expected = load_inference_model(run).outputs(stored)
    away = run.rename(run.with_name("away"))
    request.addfinalizer(lambda: away.rename(run))
    found = load_bundle(bundle)
    assert torch.equal(found.outputs(stored), expected)
    assert (found.name, found.version, found.backend, found.verify()) == ("blobs", "", "torch", 16)
    assert found.test_metrics == json.loads((away / "report.json").read_text())["splits"]["test"]
    assert found.input_specs == {"": ((8,), "float32")}
    assert torch.allclose(found.predict_batch(stored).sum(1), torch.ones(40))


def test_a_run_directory_is_loaded_as_an_inference_model(run):
    found = load_inference_model(run)
    assert (found.name, found.backend, found.verify(), found.reference_data) == ("blobs", "torch", 0, None)
    assert 0 < found.test_metrics["accuracy"] <= 1
    assert next(found.predict([[0.0] * 8]))["class"] in ("a", "b", "c")
    with pytest.raises(tf.UsageError, match="no form for 'onnxruntime'"):
        load_inference_model(run, backend="onnxruntime")


@pytest.mark.parametrize("name", ["model.safetensors", "reference.safetensors", "bundle.json", "run.json"])
def test_a_changed_byte_is_detected_and_the_file_named(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(tf.FolderError, match=name):
        load_bundle(bundle)


def test_a_missing_file_is_named(bundle):
    (bundle / "model.safetensors").unlink()
    with pytest.raises(tf.FolderError, match="model.safetensors"):
        load_bundle(bundle)


def test_a_directory_without_a_bundle_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    for load in (load_bundle, load_inference_model):
        with pytest.raises(tf.FolderError):
            load(tmp_path / "x")


def test_a_backend_without_a_format_is_refused(bundle):
    assert list_backends(bundle) == ("torch",)
    with pytest.raises(tf.UsageError, match="onnxruntime"):
        load_bundle(bundle, backend="onnxruntime")


def test_a_model_that_differs_from_its_reference_outputs_fails_verification(bundle):
    found = load_bundle(bundle)
    found.reference_data.probe_outputs[3] += torch.tensor([2.0, 0.0, -2.0])
    with pytest.raises(tf.HaltError, match="differs from its own reference outputs"):
        found.verify()
    found.reference_data.probe_outputs[3] = torch.nan
    with pytest.raises(tf.HaltError):
        found.verify()


def test_many_threads_get_the_predictions_of_one(bundle):
    found = load_bundle(bundle)
    stored = [blobs(5, seed=seed).fetch(torch.arange(5)) for seed in range(16)]
    expected = [found.outputs(each) for each in stored]
    answers = {}

    def ask(place):
        answers[place] = [found.outputs(stored[place]) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(one, expected[place]) for place, many in answers.items() for one in many)


def test_a_bundle_of_a_later_layout_is_refused(bundle):
    record = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**record, "bundle": 2, "tuneforge": "9.9"}))
    from tuneforge.exporting.atomic_dir import write_manifest

    write_manifest(bundle)
    with pytest.raises(tf.FolderError, match=r"newer tuneforge \(9.9\)"):
        load_bundle(bundle)


def test_reference_data_hold_training_digests_and_a_reference_for_drift(bundle):
    kept = load_bundle(bundle).reference_data
    assert kept.train_digests.tolist() == sorted(set(hash_samples(data().train).tolist()))
    assert not torch.isin(hash_samples(data().test), kept.train_digests).any()
    rows = evenly_spaced_rows(300, 1000)
    assert torch.equal(kept.summaries, data().test.fetch(rows))
    assert kept.predictions.shape == (300, 3)
    assert len(kept.probe_outputs) == len(kept.probe_inputs) == 16


def test_a_digest_depends_on_the_sample_only():
    one, two = blobs(20, seed=1), blobs(20, seed=1)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hash_samples(two.subset(shuffled)), hash_samples(one)[shuffled])
    named = tf.Split({"x": one.source.inputs, "y": torch.zeros(20)}, one.targets)
    assert len({*hash_samples(named).tolist(), *hash_samples(one).tolist()}) == 40


def test_the_summary_of_an_image_does_not_depend_on_its_batch():
    pictures = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = summarize_inputs(pictures)
    assert whole.shape == (6, 18)
    assert torch.equal(whole[2:3], summarize_inputs(pictures[2:3]))
    assert torch.allclose(whole[:, 0], pictures.float().mean((1, 2, 3)))


def test_a_model_given_as_an_object_is_exported_as_safetensors_with_its_graph(tmp_path):
    run = finished(tmp_path / "run", model=tiny_net())
    bundle = export(run, to=["safetensors"], out=tmp_path / "b", data=data())
    assert {"graph.json", "graph.safetensors"} <= {path.name for path in bundle.iterdir()}
    inputs = data().test.fetch(torch.arange(5))
    assert torch.equal(load_bundle(bundle).outputs(inputs), load_inference_model(run).outputs(inputs))
