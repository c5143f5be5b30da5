"""`tuneforge run --data PATH` chooses data source, model and strategy, and every choice is a flag."""

from __future__ import annotations

import tomllib

import pytest

from tuneforge.__main__ import main


@pytest.fixture
def run(capsys):
    """Run the command line; return its exit code and everything it printed."""

    def call(*arguments):
        code = main([str(each) for each in arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{number % 7},{number % 5},{'xyz'[number % 3]}\n" for number in range(60))
    (tmp_path / "points.csv").write_text(f"a,b,label\n{rows}")
    return tmp_path


def config_of(run, *flags):
    code, said = run("run", *flags, "--print-config")
    assert code == 0, said
    return tomllib.loads(said)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ("table-csv", "label", "mlp", "full")),
        (("--data.target", "b"), ("table-csv", "b", "mlp", "full")),
        (("--strategy", "lp-ft"), ("table-csv", "label", "mlp", "lp-ft")),
        (("--epochs", "2"), ("table-csv", "label", "mlp", "full")),
        (("--model", "mlp", "--model.hidden", "8"), ("table-csv", "label", "mlp", "full")),
    ],
)
def test_choices_are_written_and_flags_override_them(table, run, flags, expected):
    config = config_of(run, "--data", "points.csv", *flags)
    data = config["data"]
    assert (data["name"], data["target"], config["model"]["name"], config["strategy"]["name"]) == expected
    assert data["path"] == "points.csv"
    assert config["strategy"]["epochs"] == (2 if "--epochs" in flags else 8)


def test_a_path_in_a_configuration_file_is_inferred_too(table, run):
    (table / "run.toml").write_text('[data]\nname = "./points.csv"\ntarget = "b"\n')
    config = config_of(run, "--config", "run.toml")
    assert (config["data"]["name"], config["data"]["target"], config["model"]["name"]) == ("table-csv", "b", "mlp")


def test_what_was_chosen_is_said_and_the_data_of_an_evaluation_may_be_a_path(table, run):
    code, said = run("run", "--data", "points.csv", "--epochs", 1, "--out", "run", "--no-page")
    assert code == 0, said
    assert "the same as --data table-csv --data.path points.csv --data.target label" in said
    assert "strategy: full, because the model has no pretrained weights" in said
    assert "the same as --data table-csv" in (table / "run/log.txt").read_text()
    assert run("evaluate", "run", "--data", "points.csv")[0] == 0


def test_an_unclear_path_is_an_error_of_the_data(table, run):
    (table / "empty").mkdir()
    code, said = run("run", "--data", "empty")
    assert code == 65
    assert "is an empty folder" in said


def test_a_folder_with_the_name_of_a_data_source_is_noted_once(table, run):
    (table / "digits").mkdir()
    flags = ("--data.per-class", 3, "--data.other-share", 0, "--strategy", "head-only", "--epochs", 1)
    code, said = run("run", "--data", "digits", *flags, "--out", "run", "--no-page")
    assert code == 0, said
    assert said.count("the folder of that name is ./digits") == 1
