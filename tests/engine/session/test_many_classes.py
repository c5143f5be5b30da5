"""Runs with very many classes write text that grows with the classes, not with their square."""

import json

import torch
from torch import nn

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import ClassTargets


def run_with(num_classes, out):
    """Train a small net on six samples of each class for one epoch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6 * num_classes) % num_classes
    splits = [tf.Split(torch.randn(len(labels), 8, generator=generator), labels) for _ in range(3)]
    data = tf.Data(*splits, inputs=TensorInputs(), targets=ClassTargets(names=tuple(map(str, range(num_classes)))))
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, num_classes))
    phase = tf.Phase("all", train="all", epochs=1)
    return tf.Engine(data=data, model=net, strategy=[phase], batch_size=512, page=False, out=out, cache="off").run()


def test_text_of_a_run_grows_with_the_number_of_classes(tmp_path, capsys):
    sizes = []
    for number in (250, 1000):
        result = run_with(number, tmp_path / str(number))
        sizes.append(sum(path.stat().st_size for path in result.run_dir.iterdir() if "json" in path.suffix))
    assert sizes[1] < 5 * sizes[0]
    assert (result.run_dir / "report.json").stat().st_size < 500_000
    prediction = json.loads((result.run_dir / "hardest_samples.json").read_text())[0]["prediction"]
    assert len(prediction["probabilities"]) in (100, 101)
    assert max(prediction["probabilities"].values()) == prediction["probability"]
    assert main(["report", str(result.run_dir)]) == 0
    assert "970 more in report.json" in capsys.readouterr().out
