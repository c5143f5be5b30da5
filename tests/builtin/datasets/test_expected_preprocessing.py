"""Images follow the pretrained weights where the user gives no value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import tuneforge as tf
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.plugin import ImagePreprocessing

EXPECTED = ImagePreprocessing(
    name="birds.v1",
    size=(24, 24),
    resize=27,
    interpolation="bicubic",
    mean=(0.5, 0.25, 0.125),
    std=(0.5, 0.25, 0.2),
)


@tf.component(api=1)
class Pretrained:
    """A network whose weights expect EXPECTED, unless it is asked for missing ones."""

    asked: str = tf.option(default="", help="The weights.")

    @tf.hookimpl
    def model_inputs(self, run: tf.Run) -> ImagePreprocessing:
        if self.asked == "missing":
            raise tf.UsageError("there are no weights 'v2'", where="--model.weights", fix="use v1")
        return EXPECTED

    @tf.hookimpl
    def model_adapt(self, run: tf.Run, model: tf.Model | None) -> tf.Model:
        module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(run.example.shape[1], 2))
        return tf.Model.from_module(module, head="2")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(16):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def tune(photos: Path, tmp_path: Path) -> Any:
    def run(lines: list[str] | None = None, **options: Any) -> tf.Result:
        return tf.Engine(
            data=tf.use("image-folder", path=str(photos), **options),
            model=Pretrained(),
            strategy=[tf.Phase("head", train="head", steps=1)],
            page=False,
            out=tmp_path / f"run{len(list(tmp_path.iterdir()))}",
            log=None if lines is None else lines.append,
        ).run()

    return run


def inputs_of(result: tf.Result) -> ImageInputs:
    inputs = tf.load(result.run_dir).inputs
    assert isinstance(inputs, ImageInputs)
    return inputs


def transform(image: Image.Image) -> torch.Tensor:
    """The evaluation transform of EXPECTED, as torchvision and timm write it."""
    steps = [
        v2.Resize(27, interpolation=v2.InterpolationMode.BICUBIC),
        v2.CenterCrop(24),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(EXPECTED.mean, EXPECTED.std),
    ]
    return v2.Compose(steps)(image)


def test_images_are_prepared_as_the_weights_expect_and_that_is_logged(tune, photos):
    lines: list[str] = []
    inputs = inputs_of(tune(lines))
    assert inputs.ops == ("resize 27 bicubic", "center-crop 24")
    assert any(
        "images as the weights birds.v1 expect them: 24x24 pixels, resized to 27 and center-cropped (bicubic), "
        "mean 0.5, 0.25, 0.125, std 0.5, 0.25, 0.2" in line
        for line in lines
    )
    for path in photos.rglob("*.png"):
        prepared = inputs.preprocess(inputs.decode(path)[None])[0]
        difference = (prepared - transform(Image.open(path))) * torch.tensor(EXPECTED.std)[:, None, None]
        assert difference.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "ops", "note"),
    [
        ({"size": 12}, ("resize 14 bicubic", "center-crop 12"), "24x24 pixels instead of 12x12 (--data.size 24)"),
        ({"fit": "stretch"}, ("resize 27x27 bicubic", "center-crop 24"), "crop instead of stretch (--data.fit)"),
        ({"interpolation": "bilinear"}, ("resize 27 bilinear", "center-crop 24"), "bicubic instead of bilinear"),
        ({"resize": 24}, ("resize 24 bicubic", "center-crop 24"), "a shorter side of 27 before the crop instead of 24"),
        (
            {"normalize": "data"},
            ("resize 27 bicubic", "center-crop 24"),
            "another normalization (--data.mean 0.5,0.25,0.125 --data.std 0.5,0.25,0.2)",
        ),
        ({"mean": (0.4,)}, ("resize 27 bicubic", "center-crop 24"), "another normalization"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_user_says_is_used_and_noted(tune, options, ops, note):
    lines: list[str] = []
    inputs = inputs_of(tune(lines, **options))
    assert inputs.ops == ops
    assert any("note: the weights birds.v1 expect other images" in line and note in line for line in lines), lines
    if "mean" in options:
        assert (inputs.mean, inputs.std) == ((0.4,), EXPECTED.std)
    if "normalize" not in options and "mean" not in options:
        assert (inputs.mean, inputs.std) == (EXPECTED.mean, EXPECTED.std)


def test_values_of_the_weights_that_the_user_repeats_need_no_note(tune):
    lines: list[str] = []
    tune(lines, size=24, resize=27, fit="crop", interpolation="bicubic", mean=EXPECTED.mean, std=EXPECTED.std)
    assert not any("expect other images" in line for line in lines)


def test_one_channel_has_the_mean_over_the_channels(tune):
    inputs = inputs_of(tune(channels=1, grayscale=True))
    assert (inputs.mean, inputs.std) == ((0.2917,), (0.3167,))


def test_other_data_is_evaluated_with_the_inputs_of_the_run(tune, photos):
    result = tune()
    other = tf.evaluate(result.run_dir, data=tf.use("image-folder", path=str(photos), val=0.25, test=0.25))
    predictor = tf.load(result.run_dir)
    assert predictor.inputs.size == (24, 24)
    assert other
    probabilities = next(iter(predictor.predict([next(photos.rglob("*.png"))])))["probabilities"]
    assert set(probabilities) == {"a", "b"}


def test_a_large_jpeg_is_decoded_as_the_transform_decodes_it(tune, tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).resize((700, 501))
    image.save(tmp_path / "large.jpg", quality=95)
    inputs = inputs_of(tune())
    with Image.open(tmp_path / "large.jpg") as opened:
        difference = inputs.preprocess(inputs.decode(tmp_path / "large.jpg")[None])[0] - transform(opened)
    assert difference.abs().max() < 1e-5
    assert inputs_of(tune(jpeg_margin=2)).jpeg_margin == 2


def test_wrong_weights_are_an_error_before_data_is_read(tmp_path):
    engine = tf.Engine(
        data=tf.use("image-folder", path=str(tmp_path / "missing")), model=Pretrained(asked="missing"), page=False
    )
    with pytest.raises(tf.UsageError, match="there are no weights 'v2'"):
        engine.prepare()


def test_without_weights_images_have_32_pixels_and_their_own_normalization(photos, tmp_path):
    result = tf.Engine(
        data=tf.use("image-folder", path=str(photos)),
        model=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
        strategy=[tf.Phase("head", train="head", steps=1)],
        page=False,
        out=tmp_path / "run",
    ).run()
    inputs = inputs_of(result)
    assert inputs.ops == ("resize 32", "center-crop 32")
    assert inputs.mean == pytest.approx((0.5, 0.5, 0.5), abs=0.02)


@pytest.mark.parametrize("size", [12, 24, 48, 224])
def test_the_size_before_the_crop_keeps_its_ratio(size):
    expected = attrs.evolve(EXPECTED, size=(224, 224), resize=256)
    assert expected.resize_for(size) == round(size * 256 / 224)


@pytest.mark.parametrize("side", [12, 24])
def test_data_that_does_not_follow_the_weights_says_their_size(tmp_path, side):
    lines: list[str] = []
    images, labels = torch.randn(12, 3, side, side), torch.arange(12) % 2
    tf.Engine(
        data=(images, labels),
        model=Pretrained(),
        strategy=[tf.Phase("head", train="head", steps=1)],
        page=False,
        out=tmp_path / "run",
        log=lines.append,
    ).run()
    said = [line for line in lines if "birds.v1" in line]
    assert said == [
        "note: the weights birds.v1 expect images of 24x24 pixels, mean 0.5, 0.25, 0.125, std 0.5, 0.25, 0.2, and the "
        f"data does not follow them: its images have {side}x{side} pixels"
    ] * (side != 24)


def test_images_that_follow_the_weights_or_the_user_are_described_once(tune):
    for options in ({}, {"size": 12}):
        lines: list[str] = []
        tune(lines, **options)
        assert len([line for line in lines if "birds.v1" in line]) == 1
