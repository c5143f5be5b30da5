"""The command line as a user meets it: messages, exit codes, and the same run as from Python."""

import json
import sys

import forked
import pytest

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.plugin import registry


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SHORT = """
import tuneforge as tf
@tf.component(api=1)
class Short:
    'x'
    only: int = tf.option(default=1, help='x')
    @tf.hookimpl
    def finetune_strategy(self): return []
"""
LOCAL = """
import tuneforge as tf
@tf.component(api=1)
class Mine:
    'x'
    epochs: int = tf.option(default=1, help='x')
    @tf.hookimpl
    def finetune_strategy(self):
        yield tf.Phase('mine', train='head', epochs=self.epochs)
"""
FEW = ["--data.per-class", "4", "--data.other-share", "0", "--strategy.epochs", "1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--strategy", "freze-then-unfreeze"], ["did you mean 'freeze-then-unfreeze'", "--strategy"]),
        (["run", "--strategy.head-epoch", "2"], ["--strategy.head-epochs"]),
        (["run", "--strategy.lr", "fast"], ["'fast'", "--strategy.lr", "number"]),
        (["run", "--strategy.lr", "-1"], ["greater than 0"]),
        (["run", "--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["run", "--batch-size", "many"], ["--batch-size", "integer"]),
        (["run", "--precision", "float8"], ["--precision", "'bf16'"]),
        (["run", "--device", "abacus"], ["'abacus'", "doctor"]),
        (["run", "--callback", "emma"], ["did you mean 'ema'"]),
        (["run", "--schedule", "cosin"], ["did you mean 'cosine'"]),
        (["run", "--strategy", "gradual-unfreeze", "--strategy.patience", "1"], ["No such option"]),
        (["run", "--config", "none.toml"], ["none.toml"]),
        (["run", "--strategy", "no_such_module:Strategy"], ["no_such_module", "current folder"]),
        (["rum"], ["did you mean 'run'"]),
        (["plugins", "show", "emma"], ["did you mean 'ema'"]),
        (["plugins", "list", "--hook", "evaluat"], ["did you mean 'evaluate'"]),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_clear_message_and_exit_2(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert not (tmp_path / "runs").exists() or arguments[1] == "--device"


def test_a_short_form_that_the_strategy_lacks_says_what_it_has(run, plant):
    plant("short-pkg", {"tuneforge.finetune_strategy": {"short": "short_mod:Short"}}, short_mod=SHORT)
    code, _, err = run("run", "--strategy", "short", "--epochs", "3")
    assert code == 2
    assert "--strategy.only" in err


def test_help_shows_options_with_the_files_values_as_defaults(run, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[strategy]\nname = "freeze-then-unfreeze"\nhead-epochs = 5\n')
    _, out, _ = run("run", "--config", path, "--help")
    assert "--strategy.head-epochs INTEGER" in out
    assert "[default: 5]" in " ".join(out.split())


def test_plugins_are_listed_as_json(run):
    _, out, _ = run("plugins", "list", "--json")
    rows = {(row["hook"], row["name"]): row for row in json.loads(out)}
    assert rows["finetune_strategy", "freeze-then-unfreeze"]["aliases"] == ["fine_tune", "freeze_unfreeze"]
    assert rows["data_prepare", "digits"]["distribution"] == "tuneforge"


def test_a_components_schema_is_printed(run):
    _, out, _ = run("plugins", "show", "ema", "--json-schema")
    assert json.loads(out)["properties"]["decay"]["maximum"] == 1


BROKEN = {
    "raises": "raise ImportError('planted')",
    "exits": "raise SystemExit(3)",
    "old": "import tuneforge as tf\n@tf.component(api=99)\nclass X:\n    'x'\n",
    "misspelt": """
import tuneforge as tf
@tf.component(api=1)
class X:
    'x'
    @tf.hookimpl
    def finetune_stratagem(self): return []
""",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_command_survives_a_broken_distribution_and_names_it(run, plant, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    plant(
        "planted-pkg",
        {"tuneforge.finetune_strategy": {"planted": f"planted_{kind}:X", "full": f"planted_{kind}:X"}},
        **{f"planted_{kind}": BROKEN[kind]},
    )
    for arguments in (["--help"], ["plugins", "list"], ["run", "--help"], ["doctor"], ["plugins", "show", "ema"]):
        assert run(*arguments)[0] == 0, arguments
    code, _, err = run("run", "--strategy", "planted")
    assert code == 2
    assert "planted-pkg 1.0" in err
    assert "Traceback" not in err
    code, out, _ = run("plugins", "check")
    assert code == 2
    assert "planted-pkg 1.0" in out


def test_the_command_line_and_python_give_the_same_weights(run, tmp_path):
    code, out, err = run(
        "run", "--strategy", "full", *FEW, "--seed", "3", "--no-page", "--json", "--out", tmp_path / "a"
    )
    assert code == 0, err
    result = tf.Engine(
        data=tf.use("digits", per_class=4, other_share=0.0),
        strategy=tf.use("full", epochs=1),
        seed=3,
        page=False,
        out=tmp_path / "b",
    ).run()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (result.run_dir / "model.safetensors").read_bytes()
    assert json.loads(out)["report"]["splits"]["test"]["accuracy"] == result.report["splits"]["test"]["accuracy"]


def test_a_printed_configuration_runs_the_same(run, tmp_path):
    _, toml, _ = run(
        "run", "--strategy", "full", *FEW, "--callback", "ema", "--ema.decay", "0.5", "--no-page", "--print-config"
    )
    (tmp_path / "c.toml").write_text(toml)
    for name, arguments in {
        "a": ["--config", tmp_path / "c.toml"],
        "b": ["--strategy", "full", *FEW, "--callback", "ema", "--ema.decay", "0.5", "--no-page"],
    }.items():
        assert run("run", *arguments, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_finished_run_is_evaluated_and_predicts_from_its_folder_alone(run, tmp_path):
    folder = tmp_path / "r"
    assert run("run", "--strategy", "full", *FEW, "--out", folder)[0] == 0
    report = json.loads((folder / "report.json").read_text())
    code, out, _ = run("evaluate", folder, "--json")
    assert code == 0
    assert json.loads(out)["test"]["accuracy"] == report["splits"]["test"]["accuracy"]
    split = tf.load(folder)
    from tuneforge.builtin.datasets.demo.digit_images import real_digits

    picture = split.inputs.render_image(split.inputs.decode((real_digits()[0][0] * 15).astype("uint8")))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(picture)
    (tmp_path / "pictures" / "broken.png").write_bytes(picture[:40])
    code, out, err = run("predict", folder, tmp_path / "pictures", "--csv")
    assert code == 65
    assert "broken.png" in err
    header, row = out.splitlines()
    assert header == "input,class,probability," + ",".join(f"probabilities.{digit}" for digit in range(10))
    assert sum(float(cell) for cell in row.split(",")[3:]) == pytest.approx(1)
    assert (folder / "report.html").exists()
    assert run("report", folder)[0] == 0


def test_a_strategy_in_a_local_file_runs(tmp_path):
    (tmp_path / "mine.py").write_text(LOCAL)
    command = [
        sys.executable,
        "-m",
        "tuneforge",
        "run",
        "--strategy",
        "mine:Mine",
        "--strategy.epochs",
        "2",
        "--data.per-class",
        "4",
        "--data.other-share",
        "0",
        "--out",
        "r",
    ]
    done = forked.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "phase 'mine'" in done.stdout
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 2


def test_doctor_says_what_there_is(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    assert json.loads(out)["missing"] == []


def test_an_unwritable_folder_exits_73(run, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = run("run", "--out", tmp_path / "file" / "below")
    assert code == 73
    assert "--out" in err


def test_a_folder_that_holds_no_run_exits_73(run, tmp_path):
    code, _, err = run("evaluate", tmp_path)
    assert code == 73
    assert "not a finished run" in err


def test_names_of_groups_have_flags_and_nouns():
    assert set(registry.NOUN_BY_GROUP) == set(registry.GROUPS)
    assert set(registry.FLAG_BY_GROUP) <= set(registry.GROUPS)


def test_options_of_local_extensions_are_keyed_by_the_class_name(run, plant):
    source = LOCAL.replace("Mine", "StayNear").replace("finetune_strategy(self)", "phase_started(self, run)")
    plant("unrelated", {}, near_mod=source)
    _, out, _ = run("run", "--callback", "near_mod:StayNear", "--help")
    assert "--stay-near.epochs INTEGER" in out
    code, toml, err = run("run", "--callback", "near_mod:StayNear", "--stay-near.epochs", "7", "--print-config")
    assert code == 0, err
    assert "epochs = 7" in toml


def test_a_name_that_two_distributions_install_is_listed_as_a_clash(run, plant):
    plant("planted-pkg", {"tuneforge.finetune_strategy": {"full": "planted_full:Short"}}, planted_full=SHORT)
    _, out, _ = run("plugins", "check")
    assert "clash: strategy 'full'" in out
    assert "planted-pkg/full" in out


def test_a_run_that_is_not_done_is_neither_reported_nor_used(run, tmp_path):
    code, _, _ = run("run", "--data", "image-folder", "--data.path", tmp_path / "none", "--out", tmp_path / "r")
    assert code == 65
    for arguments in (["report", tmp_path / "r"], ["predict", tmp_path / "r", tmp_path], ["evaluate", tmp_path / "r"]):
        code, _, err = run(*arguments)
        assert code == 73
        assert "it is failed" in err
        assert "start a new one with tuneforge run" in err


def test_nothing_to_resume_is_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("resume")
    assert code == 2
    assert "no run to resume" in err


@pytest.mark.parametrize(
    ("arguments", "offered"),
    [
        (["resume", "runs/godo"], "did you mean 'runs/good'?"),
        (["resume", "good"], "did you mean 'runs/good'?"),
        (["report", "runs/godo"], "did you mean 'runs/good'?"),
        (["evaluate", "runs/entirely-else"], "check its name"),
    ],
)
def test_a_run_that_is_not_there_exits_2_and_the_nearest_is_offered(run, tmp_path, monkeypatch, arguments, offered):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "good").mkdir(parents=True)
    (tmp_path / "runs" / "good" / "run.json").write_text("{}")
    code, _, err = run(*arguments)
    assert (code, offered in err) == (2, True), err


def test_an_option_of_an_extension_is_named_as_it_was_typed(run):
    code, _, err = run("run", "--callback", "ema", "--ema.decay", "2")
    assert code == 2
    assert "--ema.decay" in err


def test_the_cache_is_listed_and_cleared_by_key(run, tmp_path, monkeypatch):
    import torch

    from tuneforge.engine.feature_cache.disk import DiskCache

    monkeypatch.setenv("TUNEFORGE_CACHE", str(tmp_path))
    for letter in "ab":
        about = {"model": "Net", "split": "train", "samples": 9}
        DiskCache(tmp_path, 10).put(letter * 64, [(torch.zeros(1 << 18),)], about)
    code, out, _ = run("cache", "list")
    assert (code, out.count("Net, 9 samples of train")) == (0, 2)
    assert "2 entries, 2.0 MB" in out
    code, out, _ = run("cache", "list", "--json")
    assert {json.loads(line)["key"][0] for line in out.splitlines()} == {"a", "b"}
    code, _, err = run("cache", "clear", "c")
    assert code == 2
    assert "no entry has a key that starts with 'c'" in err
    assert run("cache", "clear", "aaa")[1].startswith("1.0 MB freed")
    assert run("cache", "clear")[1].startswith("1.0 MB freed")
    assert "0 entries" in run("cache", "list", "--cache-dir", str(tmp_path / "none"))[1]
