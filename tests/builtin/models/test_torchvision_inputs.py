"""Images for weights of torchvision are prepared as torchvision's own evaluation transforms prepare them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

import tuneforge as tf
from tuneforge.builtin.datasets.images.expected_preprocessing import resolve_options
from tuneforge.builtin.datasets.images.image_datasets import ImageFolder
from tuneforge.builtin.models.torchvision_models import TorchvisionModel
from tuneforge.builtin.models.torchvision_weights import PretrainedWeights
from tuneforge.exporting import save_tensors

ARCHS = ("resnet18", "efficientnet_b0", "inception_v3", "vit_b_16", "swin_t", "convnext_tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(24):
        height, width = (int(side) for side in rng.integers(30, 300, 2))
        pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        path = folder / "ab"[number % 2] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((width, height)).save(path)
    return folder


@pytest.mark.parametrize("arch", ARCHS)
def test_prepared_images_equal_those_of_torchvision(photos, arch):
    transforms = models.get_model_weights(arch).DEFAULT.transforms()
    weights = PretrainedWeights(Path("weights.pth"), "a test", models.get_model_weights(arch).DEFAULT)
    run = SimpleNamespace(restoring=False, expected_inputs=weights.describe_preprocessing())
    options, _ = resolve_options(ImageFolder(path=photos), run)
    inputs = options.build_inputs().with_normalization(options.mean, options.std)
    std = torch.tensor(transforms.std)[:, None, None]
    for path in sorted(photos.rglob("*.png")):
        with Image.open(path) as image:
            expected = transforms(image)
        prepared = inputs.preprocess(inputs.decode(path)[None])[0]
        assert ((prepared - expected) * std).abs().max() < 1e-6


def test_every_classification_weight_of_torchvision_is_described():
    for arch in models.list_models(module=models):
        for published in models.get_model_weights(arch):
            preprocessing = PretrainedWeights(Path("weights.pth"), "a test", published).describe_preprocessing()
            assert preprocessing.resize >= preprocessing.size[0], published
            assert preprocessing.interpolation in ("bilinear", "bicubic")


def test_random_weights_expect_nothing_and_wrong_ones_are_an_error_before_data_is_read(tmp_path):
    def prepare(**options):
        engine = tf.Engine(
            data=tf.use("image-folder", path=str(tmp_path / "missing")), model=TorchvisionModel(**options), page=False
        )
        engine.prepare()

    with pytest.raises(tf.FolderError, match=r"none\.safetensors"):
        prepare(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(tf.UnknownNameError, match="resnet19"):
        prepare(arch="resnet19", weights="none")
    with pytest.raises(tf.DataError, match="missing"):
        prepare(weights="none")


ARCH = "shufflenet_v2_x0_5"
PUBLISHED = models.get_model_weights(ARCH).DEFAULT


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's folder of checkpoints, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "hub/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return models.get_model(ARCH)


def adapt(lines: list[str], **options: object) -> tf.Model:
    """Build the model as a run on three classes does, with the lines that it logs."""
    run = SimpleNamespace(
        config=SimpleNamespace(seed=0),
        data=SimpleNamespace(targets=SimpleNamespace(num_outputs=3, labels=("a", "b", "c"))),
        example=torch.zeros(2, 3, 64, 64),
        restoring=False,
        log=lines.append,
    )
    component = TorchvisionModel(arch=ARCH, **options)
    run.expected_inputs = component.model_inputs(run)
    return component.model_adapt(run, None)


@pytest.mark.parametrize(
    ("name", "converted"),
    [
        ("DEFAULT", False),
        ("DEFAULT", True),
        ("IMAGENET1K_V1", True),
        ("ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1", True),
        ("download", True),
    ],
)
def test_weights_by_name_are_those_of_torchs_folder(checkpoints, network, name, converted):
    path = checkpoints / Path(PUBLISHED.url).name
    if converted:
        path = path.with_suffix(".safetensors")
        save_tensors(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)  # noqa: TID251 - as torchvision publishes its weights
    lines: list[str] = []
    model = adapt(lines, weights=name)
    assert torch.equal(model.module.conv1[0].weight, network.conv1[0].weight)
    assert torch.equal(model.module.fc.weight, network.fc.weight)
    assert model.pretrained_labels == tuple(PUBLISHED.meta["categories"])
    assert lines == [f"weights of {ARCH}: {PUBLISHED}, from {path}"]
    assert TorchvisionModel.find_local_weights(ARCH) == str(path)


def test_weights_that_cannot_be_downloaded_say_what_to_fetch_and_where_to_put_it(checkpoints, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)  # the first call keeps the proxies of its time for all others
    assert TorchvisionModel.find_local_weights(ARCH) is None
    with pytest.raises(tf.TryAgainError) as caught:
        adapt([])
    for part in (PUBLISHED.url, str(checkpoints), "tuneforge import", "--model.weights none"):
        assert part in str(caught.value)
    assert not list(checkpoints.iterdir())


def test_random_weights_are_said_and_are_not_pretrained():
    lines: list[str] = []
    model = adapt(lines, weights="none")
    assert not model.pretrained
    assert lines == [
        f"note: all weights of {ARCH} are randomly initialized; for pretrained weights use --model.weights DEFAULT"
    ]


def test_unknown_weights_offer_the_known_ones():
    with pytest.raises(tf.UnknownNameError, match=r"no weights 'IMAGENET1K_V2' of shufflenet.*there are IMAGENET1K_V1"):
        adapt([], weights="IMAGENET1K_V2")


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        (Path(PUBLISHED.url).stem, {}, str(PUBLISHED)),
        ("net", {"labels": PUBLISHED.meta["categories"]}, str(PUBLISHED)),
        ("net", {}, f"net.safetensors (taken for {PUBLISHED})"),
    ],
)
def test_images_follow_the_weights_of_a_file(tmp_path, network, name, metadata, expected):
    path = tmp_path / f"{name}.safetensors"
    save_tensors(network.state_dict(), path, metadata=metadata)
    run = SimpleNamespace(restoring=False, log=lambda text: None)
    found = TorchvisionModel(arch=ARCH, weights=str(path)).model_inputs(run)
    assert found.name == expected
    assert (found.size, found.resize, found.mean) == ((224, 224), 256, (0.485, 0.456, 0.406))


def test_a_file_of_another_network_is_refused_before_data_is_read(tmp_path, network):
    path = tmp_path / "net.safetensors"
    save_tensors(network.state_dict(), path)
    engine = tf.Engine(
        data=tf.use("image-folder", path=str(tmp_path / "missing")),
        model=tf.use("torchvision", arch="resnet18", weights=str(path)),
        page=False,
    )
    with pytest.raises(tf.UsageError, match="the weights are not those of this ResNet"):
        engine.prepare()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_pickled_file_is_refused_with_the_command_that_converts_it(tmp_path, suffix):
    with pytest.raises(tf.UnsafeFileError, match="convert it once: tuneforge import"):
        adapt([], weights=str(tmp_path / f"net{suffix}"))


def test_downloaded_weights_are_kept_and_read(checkpoints, network, monkeypatch):
    def download(url: str, path: str, *, hash_prefix: str, progress: bool) -> None:
        assert (url, hash_prefix, progress) == (PUBLISHED.url, "f707e7126e", False)
        torch.save(network.state_dict(), path)  # noqa: TID251 - as torchvision publishes its weights

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    lines: list[str] = []
    model = adapt(lines)
    assert torch.equal(model.module.fc.weight, network.fc.weight)
    path = checkpoints / Path(PUBLISHED.url).name
    assert lines == [f"downloading the weights of {ARCH}", f"weights of {ARCH}: {PUBLISHED}, from {path}"]
