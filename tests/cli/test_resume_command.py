"""`tuneforge resume` as a user meets it: which run, which flags, what it says, and signals to real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import forked
import pytest

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.run_dir import RunDir

FEW = ["--data.per-class", "4", "--data.other-share", "0"]
TOLD = [*FEW, "--strategy", "full", "--strategy.epochs", "2", "--seed", "3", "--callback", "ema", "--ema.decay", "0.9"]
BYTES = ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json")


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def half(tmp_path, monkeypatch):
    """Run a command until its second step, in a folder of its own: `half("runs/a", *flags)`."""
    monkeypatch.chdir(tmp_path)

    def begin(out, *flags, at=2):
        steps = 0

        def hook(name):
            nonlocal steps
            steps += name == "step-saved"
            if steps == at:
                raise Killed

        faults.hook = hook
        with pytest.raises(Killed):
            main(["run", *flags, "--checkpoint-s", "0", "--no-page", "--out", str(out)])
        faults.hook = None
        return tmp_path / out

    yield begin
    faults.hook = None


def state(folder):
    return json.loads((folder / "status.json").read_text())["state"]


def test_flags_that_agree_are_taken_and_the_run_goes_on(run, half):
    told = [*TOLD, "--batch-size", "32"]
    folder = half("runs/a", *told)
    code, out, err = run("resume", "runs/a", *told, "--precision", "fp32", "--out", "runs/a")
    assert code == 0, err
    assert "resumed from checkpoint '000002-step-2': in strategy step 1, 2 optimizer steps done" in out
    assert "continuing with the evaluation after optimizer step 2, epoch 1" in out
    assert state(folder) == "done"


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (["--seed", "4"], ["--seed: the run has 3, given 4"]),
        (["--strategy.epochs", "5"], ["--strategy.epochs: the run has 2, given 5"]),
        (["--epochs", "5"], ["--strategy.epochs: the run has 2, given 5"]),
        (["--strategy", "head-only"], ["--strategy: the run has full, given head-only"]),
        (["--strategy", "head-only", "--lr", "1"], ["--strategy: the run has full, given head-only"]),
        (["--ema.decay", "0.5"], ["--ema.decay: the run has 0.9, given 0.5"]),
        (["--callback", "grad-clip"], ["--callback: the run has ema, given grad-clip"]),
        (["--optimizer", "sgd"], ["--optimizer: the run has none, given sgd"]),
        (["--data.per-class", "5", "--no-page"], ["--data.per-class: the run has 4, given 5"]),
        (["--page"], ["--page: the run has false, given true"]),
        (["--out", "runs/b"], ["--out: the run has runs/a, given runs/b"]),
        (["--seed", "4", "--device", "cpu"], ["--seed: the run has 3", "--device: the run has auto, given cpu"]),
        (["--budget", "5m"], ["--budget: the run has none, given 5m"]),
    ],
)  # fmt: skip
def test_a_flag_that_contradicts_the_run_is_an_error_with_the_difference(run, half, flags, lines):
    folder = half("runs/a", *TOLD)
    before = (folder / "log.txt").read_text()
    code, _, err = run("resume", "runs/a", *flags)
    assert code == tf.UsageError.exit_code == 2
    assert err.startswith("error: the command line contradicts the run in 'runs/a'\n")
    for line in lines:
        assert f"  {line}" in err
    assert err.count("the run has") == len(lines)
    assert (folder / "log.txt").read_text() == before, "nothing was touched"


def test_an_alias_agrees_with_the_name(run, half):
    half("runs/a", *FEW, "--strategy", "fine_tune", "--epochs", "1", at=1)
    code, _, err = run("resume", "runs/a", "--strategy", "freeze-then-unfreeze")
    assert code == 0, err


def test_the_file_is_compared_too_and_flags_beat_it(run, half, tmp_path):
    half("runs/a", *TOLD)
    (tmp_path / "c.toml").write_text('seed = 4\nout = "runs/a"\n[strategy]\nname = "full"\nepochs = 2\n')
    code, _, err = run("resume", "--config", "c.toml")
    assert (code, err.count("the run has")) == (2, 1)
    assert "--seed: the run has 3, given 4" in err
    code, _, err = run("resume", "--config", "c.toml", "--seed", "3")
    assert code == 0, err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "many"], ["--seed", "integer"]),
        (["--strategy", "ful"], ["did you mean 'full'"]),
        (["--strategy.epoch", "1"], ["--strategy.epochs"]),
        (["--budget", "soon"], ["--budget", "60s, 5m, 2h, 20epochs or 500steps"]),
    ],
)
def test_a_flag_that_is_wrong_in_itself_is_said_as_ever(run, half, flags, words):
    half("runs/a", *TOLD)
    code, _, err = run("resume", "runs/a", *flags)
    assert code == 2
    for word in words:
        assert word in err


def test_without_a_name_it_is_the_newest_run_that_is_neither_done_nor_running(run, half, tmp_path):
    for number, name in enumerate(("oldest", "older", "in-use", "broken")):
        folder = half(f"runs/{name}", *TOLD)
        os.utime(folder / "status.json", (1000 + number, 1000 + number))
    (tmp_path / "runs" / "broken" / "status.json").write_text("{")
    with RunDir(tmp_path / "runs" / "in-use", resume=True):
        code, out, err = run("resume")
    assert code == 0, err
    assert "run: runs/older" in out
    assert [state(tmp_path / "runs" / name) for name in ("oldest", "older")] == ["stopped", "done"]


def test_help_is_there_without_any_run_and_without_torch(tmp_path):
    code = "import sys; from tuneforge.__main__ import main; main(['resume', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--strategy.head-epochs INTEGER" in done.stdout
    assert done.stdout.endswith("False\n")


def test_what_the_run_was_told_can_be_printed(run, half):
    folder = half("runs/a", *TOLD)
    code, out, _ = run("resume", "--print-config")
    assert code == 0
    assert "decay = 0.9" in out
    assert state(folder) == "stopped"


def test_a_run_of_python_objects_says_what_to_give_again(run, tmp_path, tune, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tune([tf.Phase("head", train="head", epochs=1)]).run_dir
    (folder / "status.json").write_text('{"state": "stopped"}')
    code, _, err = run("resume", folder)
    assert code == 73
    assert "was given this component as a Python object" in err


# Signals, to real processes

HANGS = """
import hashlib
import os
import time
import tuneforge as tf

class Deaf:
    def __del__(self):
        time.sleep(60)  # what a handler raises here is lost

@tf.component(api=1)
class Hangs:
    'Stays where the environment says.'

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run):
        result = yield
        if run.step == 5 and os.environ["HANG"] in ("python", "foreign", "destructor"):
            print("hanging", flush=True)
            while os.environ["HANG"] == "python":
                time.sleep(0.01)
            while os.environ["HANG"] == "destructor":
                Deaf()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # foreign code: no instruction of Python runs
        return result

    @tf.hookimpl
    def evaluation_started(self, run):
        if run.epoch == 2 and os.environ["HANG"] == "evaluation":
            print("hanging", flush=True)
            time.sleep(2)
"""
COMMAND = [
    "run", "--data.per-class", "8", "--data.other-share", "0.2", "--strategy.epochs", "2", "--no-page",
    "--checkpoint-s", "1e9", "--checkpoint-steps", "2", "--callback", "hangs:Hangs", "--callback", "ema",
]  # fmt: skip


def start(folder, *arguments, hang=""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HANG": hang}
    return forked.Popen(
        [sys.executable, "-m", "tuneforge", *arguments], cwd=folder, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(process):
    out = process.communicate(timeout=120)[0]
    return process.returncode, out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "hangs.py").write_text(HANGS)
    code, out = ended(start(folder, *COMMAND, "--out", "runs/r", hang=""))
    assert code == 0, out
    return {name: (folder / "runs" / "r" / name).read_bytes() for name in BYTES}


def hanging(folder, hang):
    (folder / "hangs.py").write_text(HANGS)
    process = start(folder, *COMMAND, "--out", "runs/r", hang=hang)
    for line in process.stdout:
        if line == "hanging\n":
            return process
    raise AssertionError("it never came there")


def check_resumed(folder, whole):
    code, out = ended(start(folder, "resume"))
    assert code == 0, out
    assert {name: (folder / "runs" / "r" / name).read_bytes() for name in BYTES} == whole
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hang", "first", "second", "code"),
    [
        ("python", signal.SIGINT, signal.SIGINT, 130),
        ("foreign", signal.SIGTERM, signal.SIGTERM, 143),
        ("destructor", signal.SIGINT, signal.SIGTERM, 143),
    ],
)
def test_the_second_signal_leaves_at_once_wherever_the_process_is(tmp_path, whole, hang, first, second, code):
    process = hanging(tmp_path, hang)
    os.killpg(process.pid, first)
    time.sleep(0.5)
    assert process.poll() is None, "the first one waits for the step"
    began = time.monotonic()
    os.killpg(process.pid, second)
    assert ended(process)[0] == code
    assert time.monotonic() - began < 5
    assert "in strategy step 2, 4 optimizer steps done" in check_resumed(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_during_the_evaluation_of_an_epoch_is_saved_at_its_end(tmp_path, whole, number, code):
    process = hanging(tmp_path, "evaluation")
    os.killpg(process.pid, number)
    ended_with, out = ended(process)
    assert ended_with == code, out
    assert "tuneforge resume runs/r" in out
    assert state(tmp_path / "runs" / "r") == "stopped"
    assert "continuing at the end of the phase, after optimizer step 22" in check_resumed(tmp_path, whole)
