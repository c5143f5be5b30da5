"""Runs of Python objects are used without them: what only trains is not needed, and the model is kept as a graph."""

import json

import pytest
import tiny
import torch
from tiny import TinyNet, tiny_data, tiny_net
from torch import nn

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.engine.session.predictor import load
from tuneforge.engine.storage.run_files import read_json
from tuneforge.errors import FolderError, PluginError


@tf.component(api=1)
class EpochCounter:
    """A callback that no other process can import."""

    @tf.hookimpl
    def epoch_ended(self, run):
        run.state(self)["epochs"] = run.epoch


EpochCounter.__module__ = "__main__"
ROWS = tiny_data().test.source.inputs


class OwnLoss:
    @tf.hookimpl
    def train_step(self, run, batch):
        outputs = run.forward(batch.inputs)
        return nn.functional.cross_entropy(outputs, batch.targets), outputs


class Cooling:
    """Changes a plain attribute of the model in training."""

    @tf.hookimpl
    def epoch_ended(self, run):
        run.model.module.temperature /= 2


class Tempered(TinyNet):
    temperature = 1.0

    def forward(self, inputs):
        return super().forward(inputs) / self.temperature


class Branching(TinyNet):
    def forward(self, inputs):
        return super().forward(inputs if inputs.sum() > -1e9 else -inputs)


def train(out, **changes):
    """Train on objects for two epochs; returns the result and the lines of the log."""
    lines = []
    given = {"data": tiny_data(), "model": tiny_net(), "strategy": [tf.Phase("all", epochs=2)], "page": False}
    result = tf.Engine(**{**given, "cache": "off", "out": out, "log": lines.append, **changes}).run()
    return result, lines


def predict_outputs(result):
    """Return the outputs of the trained module in memory for the test split."""
    with torch.no_grad():
        return result.model.module.eval()(ROWS)


def test_a_run_of_objects_predicts_and_evaluates_without_them(tmp_path):
    result, _ = train(tmp_path / "run", loss=OwnLoss(), callbacks=[EpochCounter()])
    loaded = load(result.run_dir)
    assert torch.equal(torch.stack(list(loaded.predict_outputs(ROWS))), predict_outputs(result))
    assert loaded.model.group_infos() == result.model.group_infos()
    assert tf.evaluate(result.run_dir, data=tiny_data())["test"] == result.report["splits"]["test"]


def test_the_graph_of_a_model_is_not_trained(tmp_path):
    result, _ = train(tmp_path / "run")
    with pytest.raises(tf.UsageError, match="cannot be trained"):
        tf.Engine(data=tiny_data(), model=load(result.run_dir).model)
    model = load(result.run_dir, model=tiny_net()).model
    assert train(tmp_path / "again", model=model)[0].report["splits"]


def test_a_run_of_objects_predicts_from_the_command_line(tmp_path, capsys):
    result, _ = train(tmp_path / "run", loss=OwnLoss())
    row = tmp_path / "row.json"
    row.write_text(json.dumps(ROWS[0].tolist()))
    assert main(["predict", str(result.run_dir), str(row), "--json"]) == 0
    best = "abc"[int(predict_outputs(result)[0].argmax())]
    assert json.loads(capsys.readouterr().out)["class"] == best


def test_a_kept_model_holds_what_training_has_changed(tmp_path):
    result, _ = train(tmp_path / "run", model=Tempered(), callbacks=[Cooling()])
    outputs = torch.stack(list(load(result.run_dir).predict_outputs(ROWS)))
    assert torch.allclose(outputs, predict_outputs(result))
    assert result.model.module.temperature == 0.25


def test_log_says_before_training_what_needs_the_objects_again(tmp_path):
    _, lines = train(tmp_path / "run", loss=OwnLoss(), callbacks=[EpochCounter()])
    (note,) = (line for line in lines if line.startswith("note: Python objects"))
    assert "data, model, loss, strategy, callback" in note
    assert "Engine.resume(path, data=..., model=..., loss=..., strategy=..., callbacks=[...])" in note
    assert lines.index(note) < next(index for index, line in enumerate(lines) if line.startswith("phase "))


def test_log_says_before_training_that_a_model_cannot_be_kept(tmp_path):
    result, lines = train(tmp_path / "run", model=Branching())
    (note,) = (line for line in lines if "the model is not kept" in line)
    assert "control flow" in note
    assert "module:factory" in note
    assert lines.index(note) < next(index for index, line in enumerate(lines) if line.startswith("phase "))
    with pytest.raises(FolderError, match="control flow"):
        load(result.run_dir)
    outputs = torch.stack(list(load(result.run_dir, model=Branching()).predict_outputs(ROWS)))
    assert torch.equal(outputs, predict_outputs(result))


def test_log_says_that_inputs_of_a_script_cannot_be_found_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tiny_data().targets), "__module__", "__main__")
    _, lines = train(tmp_path / "run")
    assert any("the targets are of class ClassTargets of the program itself" in line for line in lines)


def test_a_run_of_names_keeps_no_graph(tmp_path):
    result, lines = train(tmp_path / "run", model=tf.use("tiny:tiny_net", seed=3), strategy="head-only")
    assert not (result.run_dir / "graph.json").exists()
    assert not any("model" in line for line in lines if line.startswith("note: Python objects"))


@pytest.mark.parametrize("factory", [tf.use("tiny:tiny_net", seed=3), tf.use("tiny:TinyNet"), tiny.tiny_net])
def test_a_model_is_named_by_a_function_or_class_and_built_again(tmp_path, factory):
    result, _ = train(tmp_path / "run", model=factory)
    recorded = read_json(result.run_dir / "run.json")["config"]["model"]
    assert recorded["name"] in ("tiny:tiny_net", "tiny:TinyNet")
    outputs = torch.stack(list(load(result.run_dir).predict_outputs(ROWS)))
    assert torch.equal(outputs, predict_outputs(result))


def test_arguments_of_a_function_that_builds_a_model_are_options(tmp_path, capsys):
    modules = [
        tf.Engine(data=tiny_data(), model=tf.use("tiny:tiny_net", seed=seed), strategy=[]).prepare().model.module
        for seed in (3, "3", 4)
    ]
    first, same, other = (module.first[0].weight for module in modules)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    with pytest.raises(tf.TuneforgeError, match=r"has no option 'sed'; at use\(\"tiny:tiny_net\", sed=...\)"):
        tf.Engine(data=tiny_data(), model=tf.use("tiny:tiny_net", sed=1), strategy=[])
    assert main(["run", "--model", "tiny:tiny_net", "--help"]) == 0
    assert "--model.seed INTEGER" in capsys.readouterr().out


def test_a_function_of_a_script_that_builds_a_model_is_called_and_kept(tmp_path):
    result, _ = train(tmp_path / "run", model=lambda: tiny_net(seed=2))
    assert (result.run_dir / "graph.json").exists()


def test_a_function_that_builds_no_model_is_refused(tmp_path):
    with pytest.raises(PluginError, match="returned Data"):
        train(tmp_path / "run", model=tf.use("tiny:tiny_data"))
