"""The command `tuneforge compare`."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import forked
import pytest

from tuneforge.__main__ import main

FEW = ["--data.per-class", "3", "--data.other-share", "0", "--no-page", "--budget", "1epoch"]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_study_ends_in_a_table_and_its_runs_can_be_compared_again(run, tmp_path):
    strategies = "head-only,full:lr=3e-4:warmup=0,greedy-soup"
    code, out, err = run("compare", "--strategies", strategies, "--seeds", "2", *FEW, "--out", "r")
    assert (code, err) == (0, "")
    assert re.search(r"^head-only, seed 1: f1_macro 0\.\d{4} on validation, 1 epoch\(s\)", out, re.MULTILINE)
    assert re.search(r"^full:lr=0\.0003:warmup=0\.0 .* 2 +1 ", out, re.MULTILINE)
    assert "best on validation: " in out
    assert "done: r" in out
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert results["baseline"] == "head-only"
    config = json.loads((tmp_path / "r" / "full-lr=0.0003-warmup=0.0" / "seed-1" / "run.json").read_text())["config"]
    assert (config["strategy"]["lr"], config["seed"], config["data-seed"]) == (3e-4, 1, 0)

    code, out, _ = run("compare", "--resume", "r", "--json")
    assert code == 0
    output = json.loads(out)
    assert {key: output[key] for key in results} == results
    assert (output["study_dir"], set(output["costs"])) == ("r", {"head-only", "full:lr=0.0003:warmup=0.0"})

    runs = [f"r/{name}/seed-{seed}" for name in ("head-only", "full-lr=0.0003-warmup=0.0") for seed in (0, 1)]
    code, out, _ = run("compare", *runs, "--json")
    assert code == 0
    again = json.loads(out)
    assert (again["decision"], again["study_dir"]) == (
        results["decision"].replace("full:lr=0.0003:warmup=0.0", "full"),
        None,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["there are no strategies to compare", "--strategies"]),
        (["--strategies", "full,lp-tf"], ["did you mean 'lp-ft'"]),
        (["--strategies", "full:lrs=1"], ["no option 'lrs'", "did you mean 'lr'"]),
        (["--strategies", "full", "--seeds", "many"], ["--seeds", "integer"]),
        (["--strategies", "full", "--strategy.epochs", "3"], ["--strategy.epochs"]),
        (["runs/a", "--strategies", "full", "--seed", "3"], ["compared as they are", "--strategies, --seed"]),
        (["--resume", "r", "--halving"], ["is resumed with its own options", "--halving"]),
    ],
)
def test_wrong_arguments_are_refused(run, arguments, words, tmp_path):
    code, _, err = run("compare", *arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert not (tmp_path / "runs").exists()


def test_a_directory_without_a_study_is_refused(run):
    code, _, err = run("compare", "--resume", "nothing")
    assert (code, "nothing" in err) == (2, True)


def test_help_does_not_import_torch(tmp_path):
    code = "import sys; from tuneforge.__main__ import main; main(['compare', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--strategies NAME[:OPTION=VALUE]" in done.stdout
    assert "--strategy " not in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_study_and_the_same_command_resumes_it(tmp_path, number, code):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ["--data.per-class", "3", "--data.other-share", "0", "--no-page", "--budget", "5epochs", "--seeds", "1"]
    command = [sys.executable, "-m", "tuneforge", "compare", "--strategies", "full,layer-decay", *flags]
    started = forked.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if list(tmp_path.glob("runs/study-*/full/seed-0/metrics.jsonl")):
            break
        time.sleep(0.1)
    started.send_signal(number)
    out, err = started.communicate(timeout=60)
    assert started.returncode == code, out + err
    (study,) = (tmp_path / "runs").iterdir()
    assert f"resume with: tuneforge compare --resume runs/{study.name}" in err
    done = forked.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"done: runs/{study.name}" in done.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [study.name]
