"""The engine works without images and classes: regression on a table, and a model with a mapping as input."""

import csv

import pytest
import torch
from torch import nn

import tuneforge as tf
from tuneforge.__main__ import main


class Reader(nn.Module):
    """Averages the embeddings of unmasked ids and classifies them: ids and mask (batch, 6) -> (batch, 2)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 8)
        self.mix = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.1))
        self.head = nn.Linear(8, 2)

    def forward(self, ids, mask):
        shown = self.words(ids) * mask.unsqueeze(2)
        return {"logits": self.head(self.mix(shown.sum(1) / mask.sum(1, keepdim=True)))}


def sentences(count):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 20, (count, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(1, 7, (count, 1), generator=generator)).float()
    counts = ((ids < 10) * mask).sum(1) / mask.sum(1)
    return {"ids": ids, "mask": mask}, (counts > 0.5).long()


@pytest.fixture
def fine_tuned(tmp_path):
    inputs, labels = sentences(300)
    network = Reader()
    result = tf.Engine(
        data=(inputs, labels),
        model=network,
        strategy=tf.use("freeze-then-unfreeze", head_epochs=2, epochs=12, lr=0.04, lr_mult=2.0),
        callbacks=["grad-clip"],
        out=tmp_path / "run",
    ).run()
    return result, network


def test_model_with_a_mapping_as_input_is_fine_tuned_and_evaluated(fine_tuned):
    result, _ = fine_tuned
    (head, first), *_, (_, second), _ = result.strategy_steps
    assert head.train == ("head",)
    assert first.num_trainable == 18
    assert first.num_frozen == sum(p.numel() for p in Reader().parameters()) - 18
    assert second.num_frozen == 0
    assert result.report["splits"]["test"]["accuracy"] > 0.75
    assert "page" not in result.report
    assert (result.run_dir / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_model_with_a_mapping_as_input_predicts_after_load(fine_tuned):
    result, network = fine_tuned
    predictor = tf.load(result.run_dir, model=network)
    rows = [{"ids": [1, 2, 3, 15, 0, 0], "mask": [1.0, 1, 1, 1, 0, 0]}, {"ids": [12] * 6, "mask": [1.0] * 6}]
    assert [each["class"] for each in predictor.predict(rows)] == ["1", "0"]


def test_regression_on_a_table_is_fine_tuned_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "flats.csv"
    generator = torch.Generator().manual_seed(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "kind", "price"])
        for size in (torch.rand(200, generator=generator) * 100 + 20).tolist():
            kind = "old" if int(size) % 2 else "new"
            writer.writerow([f"{size:.1f}", kind, f"{size * 30 + (500 if kind == 'new' else 0):.0f}"])
    arguments = ["run", "--data", "table-csv", "--data.path", str(path), "--data.target", "price", "--model", "mlp"]
    strategy = [
        "--strategy",
        "freeze-then-unfreeze",
        "--strategy.epochs",
        "40",
        "--lr",
        "0.02",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*arguments, *strategy]) == 0
    out = capsys.readouterr().out
    assert "head fit 'head'" in out
    assert "r2 0.9" in out
    assert "mae" in (tmp_path / "r" / "report.html").read_text()
    assert main(["predict", str(tmp_path / "r"), '{"size": "50", "kind": "new"}']) == 0
    price = float(capsys.readouterr().out.rpartition(": ")[2].split()[0])
    assert price == pytest.approx(2000, rel=0.15)
