"""The default run on the real digits reaches the metrics that the README states."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import tuneforge as tf
from tuneforge.builtin.datasets.demo.digit_images import real_digits
from tuneforge.builtin.datasets.demo.digits import Digits


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return tf.Engine(out=tmp_path_factory.mktemp("main") / "run").run()


@pytest.mark.slow
def test_default_run_recognizes_digits_others_and_printed_digits(result):
    splits = result.report["splits"]
    assert len(splits["test"]["per_class"]) == 11
    assert splits["test"]["f1_macro"] >= 0.95
    assert splits["real digits"]["f1_macro"] >= 0.95
    assert splits["unseen font"]["accuracy"] >= 0.85


@pytest.mark.slow
def test_digit_on_paper_is_recognized_with_other_ink_margin_and_size(result):
    """Real digits of the test split as photographed: dark on white, large, with a margin and off center."""
    images, labels = real_digits()
    test = [int(name.removeprefix("real/")) for name in _test_ids()][:60]
    predictions = list(tf.predict(result.run_dir, [_draw_on_paper(images[index]) for index in test]))
    correct = [each["class"] == str(labels[index]) for index, each in zip(test, predictions, strict=True)]
    assert np.mean(correct) >= 0.85


def _test_ids():
    run = SimpleNamespace(config=SimpleNamespace(seed=0), data_seed=0)
    return Digits().data_prepare(run).extra_test_splits["real digits"].ids


def _draw_on_paper(image):
    ink = Image.fromarray((255 - image * 15.9).astype("uint8")).resize((80, 80), Image.Resampling.BICUBIC)
    paper = Image.new("L", (200, 160), 255)
    paper.paste(ink, (90, 30))
    return np.asarray(paper)
