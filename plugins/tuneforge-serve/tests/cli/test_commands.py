"""The commands `tuneforge export`, `promote` and `models`."""

import json
import subprocess
import sys

import pytest

import tuneforge as tf
from tuneforge.__main__ import main


@pytest.fixture
def run(capsys, monkeypatch, workspace):
    monkeypatch.chdir(workspace)

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A directory with a table and two finished runs on it; the second one is far better."""
    path = tmp_path_factory.mktemp("workspace")
    lines = [f"{n % 211 / 100},{n % 37},{'low' if n % 211 < 100 else 'high'}\n" for n in range(600)]
    (path / "t.csv").write_text("x,y,size\n" + "".join(lines))
    for name, epochs in (("poor", 0), ("good", 12)):
        tf.Engine(
            data=tf.use("table-csv", path=str(path / "t.csv"), target="size"), model=tf.use("mlp", hidden=(8,)),
            strategy=[tf.Phase("all", epochs=epochs, lr=0.02)] if epochs else [], seed=3, page=False,
            out=path / "runs" / name,
        ).run()  # fmt: skip
    return path


def test_export_writes_a_bundle_with_its_model_card(run, workspace):
    code, out, err = run("export", "runs/good", "--format", "safetensors", "--out", "b", "--name", "sizes")
    assert (code, err) == (0, "")
    assert out.startswith("safetensors: answers as the tuned model does, 90 test samples in batches of 1, 2, 7, 16")
    assert out.endswith("card: b/README.md\ndone: b\n")
    card = (workspace / "b" / "README.md").read_text()
    assert card.startswith("# sizes\n")
    for words in ("| low |", "- Run `good`:", "table-row", "safetensors | torch | 90 samples"):
        assert words in card
    code, out, _ = run("export", "runs/good", "--format", "safetensors", "--out", "b2", "--json")
    assert (code, json.loads(out)["directory"]) == (0, "b2")
    code, _, err = run("export", "runs/good", "--format", "safetensors", "--out", "b")
    assert (code, "'b' is not empty" in err) == (73, True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", "runs/good", "--format", "onxx"], 2, "did you mean 'onnx'"),
        (["export", "runs/nothing"], 2, "there is no directory 'runs/nothing'"),
        (
            ["export", "runs/good", "--format", "safetensors", "--format", "safetensors"],
            2,
            "each export format is named once",
        ),
        (["export", "runs/good", "--format", "safetensors", "--images", "p"], 65, "the inputs are not images"),
        (["promote", "runs/good", "--name", "../x"], 2, "cannot be the name of a model"),
        (["promote", "runs/good", "--name", ""], 2, "cannot be the name of a model"),
        (["promote", "runs/nothing"], 2, "there is no directory 'runs/nothing'"),
        (["promote", "runs/good", "--min-recall", "much"], 2, "--min-recall"),
        (["models", "list", "--registry", "nowhere"], 73, "there is no model registry 'nowhere'"),
        (["models", "rollback", "x", "--registry", "nowhere"], 73, "there is no model registry 'nowhere'"),
    ],
)
def test_wrong_use_is_reported_and_leaves_nothing(run, workspace, arguments, code, words):
    before = sorted(path.name for path in workspace.iterdir())
    found, _, err = run(*arguments)
    assert (found, words in err) == (code, True), err
    left = [path for path in workspace.rglob(".*") if path.is_dir()]
    assert not left
    if "promote" not in arguments:
        assert sorted(path.name for path in workspace.iterdir()) == before


def test_promote_list_show_and_rollback(run, workspace):
    options = ["--registry", "s", "--name", "sizes", "--format", "safetensors", "--min-recall", "0"]
    code, out, _ = run("promote", "runs/poor", *options)
    assert code == 0
    assert out.endswith("done: s/sizes/1 is the champion of sizes\n")
    code, out, _ = run("promote", "runs/good", *options)
    assert code == 0
    assert "promoted: it is significantly better on the old test set" in out

    code, out, _ = run("promote", "runs/good", *options)
    assert code == 3
    assert "not promoted: there is no significant difference on the old test set" in out
    assert "used for 2 decision(s) before" in out
    code, out, _ = run("promote", "runs/poor", *options, "--json")
    decision = json.loads(out)
    assert (code, decision["version"], decision["previous_champion"], decision["promoted"]) == (3, None, 2, False)

    code, out, _ = run("models", "list", "--registry", "s")
    assert [line.split()[:2] for line in out.splitlines()] == [["NAME", "VERSION"], ["sizes", "1"], ["sizes", "2"]]
    rows = json.loads(run("models", "list", "--registry", "s", "--json")[1])
    assert [(row["version"], row["champion"], row["run"]) for row in rows] == [(1, False, "poor"), (2, True, "good")]

    code, out, _ = run("models", "show", "sizes", "--registry", "s")
    assert code == 0
    assert out.startswith("sizes 2 (champion)\n")
    assert "promoted 2, champion before: 1 (runs/good): it is significantly better" in out
    code, out, _ = run("models", "show", "sizes", "1", "--registry", "s", "--json")
    assert (json.loads(out)["version"], json.loads(out)["champion"]) == (1, 2)

    code, out, _ = run("models", "rollback", "sizes", "--registry", "s")
    assert (code, out) == (0, "done: version 1 is the champion of sizes; the previous champion is version 2\n")
    code, _, err = run("models", "rollback", "sizes", "--version", "9", "--registry", "s")
    assert (code, "has no version 9" in err) == (73, True)
    code, _, err = run("models", "show", "size", "--registry", "s")
    assert (code, "did you mean 'sizes'?" in err) == (73, True)


def test_new_test_set_of_files_decides(run, workspace):
    options = ["--registry", "n", "--format", "safetensors", "--min-recall", "0"]
    for number in range(40):
        name = "low" if number % 2 else "high"
        (workspace / "new" / name).mkdir(parents=True, exist_ok=True)
        row = {"x": 0.1 + number / 100 if name == "low" else 1.5 + number / 100, "y": number % 37}
        (workspace / "new" / name / f"{number}.json").write_text(json.dumps(row))
    assert run("promote", "runs/poor", *options)[0] == 0
    code, out, _ = run("promote", "runs/good", *options, "--new-test-set", "new")
    assert code == 0
    assert "it is significantly better on the new test set" in out
    assert "new test set: 40 samples; not used before" in out
    code, _, err = run("promote", "runs/good", *options, "--new-test-set", "runs/none")
    assert (code, "there is no directory" in err) == (65, True)
    assert sorted(path.name for path in (workspace / "n" / "table-csv").iterdir()) == [
        ".lock", "1", "2", "champion.json", "log.jsonl",
    ]  # fmt: skip


def test_help_imports_no_torch(tmp_path):
    lines = "; ".join(f"main([{verb!r}, '--help'])" for verb in ("export", "promote", "models"))
    code = f"import sys; from tuneforge.__main__ import main; {lines}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    for words in ("--format FORMAT", "--accept-equal", "rollback"):
        assert words in done.stdout
