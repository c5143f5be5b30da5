"""What leaves is proved to answer as the tuned model, or nothing leaves.

All twelve architectures: `TUNEFORGE_ARCHITECTURES=12 python -m pytest -m "" tests/exporting/test_export.py`.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
import torchvision
from bundles import data, finished
from tiny import blobs, tiny_data, tiny_net
from torch import nn

import tuneforge as tf
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import ClassTargets, MultilabelTargets, RegressionTargets
from tuneforge.exporting import load_bundle, load_inference_model
from tuneforge.exporting.exporter import export
from tuneforge.exporting.parity import BATCH_SIZES, ParityError, compare_outputs

FAMILIES = {
    "squeezenet1_1": 64, "resnet18": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64, "convnext_tiny": 64,
    "swin_t": 64, "densenet121": 64, "regnet_y_400mf": 64, "googlenet": 64, "shufflenet_v2_x0_5": 64,
    "mnasnet0_5": 64, "vit_b_32": 224,
}  # fmt: skip
TRIED = dict(list(FAMILIES.items())[: int(os.environ.get("TUNEFORGE_ARCHITECTURES", "1"))])
PLAIN = ("onnxruntime", "numpy", "numpy.libs", "PIL", "pillow.libs", "flatbuffers", "google", "packaging")
SITE = Path(importlib.util.find_spec("onnxruntime").origin).parents[1]
CLASSES = ClassTargets(names=("a", "b", "c"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digit CNN on real digits, and its ONNX bundle with the test pictures as files."""
    place = tmp_path_factory.mktemp("digits")
    tf.Engine(
        data=tf.use("digits", per_class=20, other_share=0.0), strategy=tf.use("head-only", epochs=2),
        page=False, out=place / "run",
    ).run()  # fmt: skip
    export(place / "run", to=["onnx"], out=place / "bundle", image_dir=place / "pictures")
    return place


def test_the_digit_cnn_passes_the_parity_check_at_every_batch_size(digits):
    record = json.loads((digits / "bundle" / "bundle.json").read_text())
    parity = record["formats"]["onnx"]["parity"]
    assert (parity["num_samples"], parity["batch_sizes"], parity["num_different"]) == (360, [1, 2, 7, 16], 0)
    assert parity["max_deviation"] < 1e-5
    found = load_bundle(digits / "bundle")
    assert (found.backend, found.verify()) == ("onnxruntime", 16)
    assert found.input_specs == {"": ((1, 32, 32), "uint8")}


def test_the_graph_maps_pixels_to_probabilities_for_any_batch_size(digits):
    import onnxruntime

    session = onnxruntime.InferenceSession(digits / "bundle" / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("input", "tensor(uint8)", [1, 32, 32])
    for size in (1, 3, 100):
        (answers,) = session.run(["predictions"], {"input": np.zeros((size, 1, 32, 32), dtype=np.uint8)})
        assert answers.sum(1) == pytest.approx(np.ones(size), abs=1e-5)


def test_the_model_card_describes_stored_and_preprocessed_inputs(digits):
    lines = (digits / "bundle" / "README.md").read_text().splitlines()
    assert any(line.startswith("uint8 of shape (1, 32, 32); the rest of the way") for line in lines)
    assert "| channels | `3` | Channels of the model's input; grayscale is repeated, colors are averaged. |" in lines


def test_the_script_of_the_model_card_has_the_same_accuracy_without_torch(digits, tmp_path):
    """onnxruntime, numpy and Pillow alone are on the path; each picture gets the class that the run gives it."""
    card = (digits / "bundle" / "README.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    (tmp_path / "classify.py").write_text(script)
    done = in_plain_python(tmp_path, "classify.py", digits / "bundle", digits / "pictures")
    *lines, last = done.splitlines()
    report = json.loads((digits / "run" / "report.json").read_text())
    right = round(report["splits"]["test"]["accuracy"] * 360)
    assert last == f"right, where the folder is the class: {right} of 360"
    said = {int(re.search(r"(\d+)\.png", line)[1]): line.split(": ")[1].split(" (")[0] for line in lines}
    tuned = tf.load(digits / "run")
    test = tuned.with_data().data.test
    outputs = load_inference_model(digits / "run").outputs(test.fetch(torch.arange(360)))
    assert [said[row] for row in range(360)] == [tuned.targets.describe(each)["class"] for each in outputs]


def in_plain_python(place, script, *arguments):
    """What a script prints in an interpreter that finds no package but those of `PLAIN`."""
    site = place / "site"
    site.mkdir()
    for package in PLAIN:
        if (SITE / package).exists():
            (site / package).symlink_to(SITE / package)
    begin = (
        "import importlib.util, runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]; "
        "assert all(importlib.util.find_spec(name) is None for name in ('torch', 'torchvision', 'tuneforge', 'onnx')); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-S", "-c", begin, site, place / script, *arguments]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", TRIED)
def test_an_architecture_passes_the_parity_check(arch, tmp_path):
    """Random weights, but norms and a head that make answers differ from picture to picture as tuned ones do."""
    side = FAMILIES[arch]
    given = tf.Data(
        train=noise(12, side, 0), val=noise(3, side, 1), test=noise(18, side, 2),
        inputs=ImageInputs(ops=(f"resize {side}",), mean=(0.5,), std=(0.25,)), targets=CLASSES,
    )  # fmt: skip
    module = calibrated(arch, given)
    tf.Engine(data=given, model=module, strategy=[], page=False, out=tmp_path / "run").run()
    export(tmp_path / "run", to=["onnx"], out=tmp_path / "b", data=given, model=module)
    stored = given.test.fetch(torch.arange(18))
    wanted = load_inference_model(tmp_path / "run", model=module).outputs(stored)
    found = load_bundle(tmp_path / "b").outputs(stored)
    spread = float(wanted.std(0).mean())
    print(f"{arch}: outputs differ by {float((found - wanted).abs().max()):.1e}, and spread by {spread:.2e}")
    assert spread > 0.1
    assert float((found - wanted).abs().max()) < 1e-3 * spread


def noise(count, side, seed):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    brightness = torch.linspace(0.2, 1.0, count)[torch.randperm(count, generator=generator)]
    dimmed = (pictures * brightness[:, None, None, None]).to(torch.uint8)
    return tf.Split(dimmed, torch.arange(count) % 3)


def calibrated(arch, given):
    """Three outputs, random weights, statistics of the training pictures, and a head whose outputs vary by 3."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        more = {"aux_logits": False, "init_weights": False} if arch == "googlenet" else {}
        module = torchvision.models.get_model(arch, num_classes=3, **more)
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.momentum = None
        answering = [each for each in module.modules() if isinstance(each, (nn.Linear, nn.Conv2d))][-1]
        nn.init.normal_(answering.weight, std=0.5)
        module.train()(given.inputs.preprocess(given.train.fetch(torch.arange(12))))
        answering.weight *= 3 / module.eval()(given.inputs.preprocess(given.test.fetch(torch.arange(18)))).std()
    return tf.Model.from_module(module, head="classifier.1") if arch == "squeezenet1_1" else module


class Fixed(nn.Module):
    """A network that counts on two samples a batch."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(inputs.reshape(2, 8)) if inputs.shape[0] == 2 else self.head(inputs)


class Decides(Fixed):
    """A network that looks at its numbers to choose its way."""

    def forward(self, inputs):
        return self.head(inputs) if float(inputs.sum()) > 0 else self.head(-inputs)


def test_a_format_that_fails_at_a_batch_size_is_refused(plant, tmp_path):
    source = CROOKED.replace("return lambda stored: forward(stored)", "return lambda s: forward(s.reshape(16, 8))")
    plant("crooked", {"tuneforge.export": {"crooked": "crooked_format:Crooked"}}, crooked_format=source.format(by=0.0))
    finished(tmp_path / "run")
    with pytest.raises(ParityError, match="the crooked export cannot answer a batch of 1"):
        export(tmp_path / "run", to=["crooked"], out=tmp_path / "b", data=data())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "site"]


@pytest.mark.parametrize("module", [Fixed, Decides])
def test_a_model_without_a_graph_for_any_batch_size_is_refused_and_nothing_is_written(module, tmp_path):
    finished(tmp_path / "run", model=module())
    with pytest.raises(tf.PluginError, match="cannot be written as ONNX") as refused:
        export(tmp_path / "run", to=["onnx"], out=tmp_path / "b", data=data(), model=module())
    assert refused.value.fix == "export it as safetensors"
    if module is Fixed:
        assert refused.value.why == "its graph takes only a batch of 2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(("dtype", "can_run"), [(torch.float64, True), (torch.bfloat16, False)])
def test_weights_of_a_dtype_that_onnxruntime_cannot_run_are_refused(tmp_path, dtype, can_run):
    module = nn.Sequential(nn.Linear(8, 3)).to(dtype)
    finished(tmp_path / "run", model=module)
    if can_run:
        export(tmp_path / "run", to=["onnx"], out=tmp_path / "b", data=data(), model=module)
    else:
        with pytest.raises(tf.PluginError, match="onnxruntime cannot run its graph"):
            export(tmp_path / "run", to=["onnx"], out=tmp_path / "b", data=data(), model=module)


CROOKED = """
import torch
import tuneforge as tf
from tuneforge.builtin.exports.safetensors import SafetensorsFormat

@tf.component(api=1)
class Crooked(SafetensorsFormat):
    "Answers that are off by a little."

    def load(self, directory, *, device_name):
        forward = super().load(directory, device_name=device_name)
        return lambda stored: forward(stored) + torch.tensor([{by}, 0.0, 0.0])
"""


@pytest.mark.parametrize(("by", "passes"), [(1e-5, True), (1e-2, False), (float("nan"), False)])
def test_the_format_of_a_plugin_must_pass_the_parity_check_too(plant, tmp_path, by, passes):
    source = CROOKED.format(by=f'float("{by}")')
    plant("crooked", {"tuneforge.export": {"crooked": "crooked_format:Crooked"}}, crooked_format=source)
    finished(tmp_path / "run")
    if passes:
        export(tmp_path / "run", to=["crooked"], out=tmp_path / "b", data=data())
        assert load_bundle(tmp_path / "b").record["formats"]["crooked"]["distribution"] == "crooked"
        return
    with pytest.raises(ParityError, match="the crooked export does not answer as the tuned model"):
        export(tmp_path / "run", to=["safetensors", "crooked"], out=tmp_path / "b", data=data())
    assert "b" not in [path.name for path in tmp_path.iterdir()]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("by", "passed", "different", "near_ties"),
    [(0.0, True, 0, 0), (9e-5, True, 0, 1), (3e-4, False, 1, 0), (float("inf"), False, 1, 0)],
)
def test_the_parity_check_allows_near_ties_only(by, passed, different, near_ties):
    """In two classes the second comes out ahead by `by` in probability where the first was, barely."""
    wanted = torch.tensor([[1e-7, 0.0], [3.0, 0.0]])
    found = wanted.clone()
    found[0, 1] += 4 * by
    result = compare_outputs(wanted, {1: found}, ClassTargets(names=("a", "b")))
    assert (result.passed, result.num_different, result.num_near_ties) == (passed, different, near_ties)


class Two(nn.Module):
    """Two inputs by name: (b, 8) and (b,)."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(9, 3)

    def forward(self, x, y):
        return self.head(torch.cat([x, y[:, None].float()], 1))


def by_name(split):
    return tf.Split({"x": split.source.inputs, "y": split.targets.clone()}, split.targets)


def of_targets(targets, change):
    parts = {name: tf.Split(each.source.inputs, change(each)) for name, each in data().splits().items()}
    return attrs.evolve(tiny_data(), **parts, targets=targets)


@pytest.mark.parametrize("kind", ["mapping", "numbers", "label-sets"])
def test_tables_and_other_targets_are_exported_by_the_same_code(kind, tmp_path):
    module = tiny_net()
    if kind == "mapping":
        splits = {name: by_name(each) for name, each in data().splits().items()}
        given, module = attrs.evolve(tiny_data(), **splits, inputs=TensorInputs()), Two()
    elif kind == "numbers":
        names = RegressionTargets(names=("x", "y", "z"), means=(100.0, 0.0, -3.0), scales=(40.0, 1.0, 2.0))
        given = of_targets(names, lambda each: each.source.inputs[:, :3].clone())
    else:
        given = of_targets(
            MultilabelTargets(names=("x", "y", "z")), lambda each: (each.source.inputs[:, :3] > 0).float()
        )
    finished(tmp_path / "run", model=module, given=given)
    export(tmp_path / "run", to=["onnx"], out=tmp_path / "b", data=given, model=module)
    found, tuned = load_bundle(tmp_path / "b"), tf.load(tmp_path / "run", model=module)
    assert found.verify() == 16
    stored = given.test.fetch(torch.arange(7))
    wanted = load_inference_model(tmp_path / "run", model=module)
    assert torch.allclose(found.outputs(stored), wanted.outputs(stored), atol=1e-5)
    described = [tuned.targets.describe(each) for each in wanted.outputs(stored)]
    numbers = described[0].get("values") or described[0]["probabilities"]
    assert found.predict_batch(stored)[0].tolist() == pytest.approx(list(numbers.values()), rel=1e-4, abs=1e-4)


def test_a_bundle_is_never_overwritten_and_changed_data_are_refused(tmp_path):
    finished(tmp_path / "run")
    other = data(test=blobs(300, seed=77))
    with pytest.raises(tf.DataError, match="the test split is not what the run was made with"):
        export(tmp_path / "run", to=["safetensors"], out=tmp_path / "b", data=other)
    assert not (tmp_path / "b").exists()
    export(tmp_path / "run", to=["safetensors"], out=tmp_path / "b", data=data())
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    with pytest.raises(tf.FolderError, match="is not empty"):
        export(tmp_path / "run", to=["safetensors"], out=tmp_path / "b", data=data())
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before


def test_a_missing_package_is_named_with_its_install_command(tmp_path, monkeypatch):
    finished(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(tf.MissingDependencyError, match="onnxscript is not installed") as missing:
        export(tmp_path / "run", to=["onnx"], out=tmp_path / "b", data=data())
    assert missing.value.fix == "pip install 'tuneforge[export]'"
    assert not (tmp_path / "b").exists()


def test_the_batch_sizes_are_the_documented_ones():
    assert BATCH_SIZES == (1, 2, 7, 16)
