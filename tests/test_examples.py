"""Every example runs, in a folder of its own, on less data."""

import os
import sys
from pathlib import Path

import forked
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "compare_strategies.py": ["--seeds", "2", "--budget", "1epoch", "--per-class", "5"],
    "quick_start.py": ["--epochs", "1", "--per-class", "10"],
    "from_papers.py": ["freezeout", "--per-class", "10"],
    "own_strategy.py": ["--enough", "0.5", "--per-class", "10"],
    "programmatic_api.py": ["--epochs", "5"],
    "digits_and_others.py": ["--epochs", "1", "--per-class", "10"],
    "image_folder.py": ["--count", "120", "--epochs", "1"],
    "table_regression.py": ["--epochs", "3"],
    "recipe_plain_torch.py": ["--epochs", "1", "--per-class", "10"],
    "recipe_tuneforge.py": ["--strategy.epochs", "1", "--data.per-class", "10"],
    "why_tuning.py": ["--seeds", "2", "--epochs", "1"],
    "pretrain_digit_cnn.py": ["--count", "700", "--epochs", "1"],
    "sklearn_pipeline.py": ["--epochs", "1", "--folds", "2"],
    "production_loop.py": ["--count", "40", "--epochs", "1", "--only", "inverted ink"],
}
BENCHMARKS = {
    "frozen_phase.py": ["--runs", "1", "--samples", "64", "--epochs", "2"],
    "overhead.py": ["--runs", "1", "--pairs", "1", "--samples", "64", "--epochs", "2"],
    "unfrozen.py": ["--runs", "1", "--pairs", "1", "--samples", "64", "--epochs", "1"],
    "gradual.py": ["--runs", "1", "--samples", "64", "--epochs", "2"],
    "architectures.py": ["--only", "shufflenet_v2_x0_5", "--samples", "32"],
    "memory.py": ["--sizes", "100"],
    "scale.py": [],
    "sharded.py": ["--megabytes", "17"],
    "ranks.py": ["--runs", "1", "--samples", "64", "--epochs", "2"],
    "serving.py": ["--runs", "1", "--seconds", "0.5", "--count", "5", "--clients", "4"],
    "precision.py": ["--seeds", "1", "--epochs", "1", "--only", "fp32,bf16"],
}

PAPERS = {
    "lp_ft.py": ["--seeds", "2", "--epochs", "5"],
    "surgical.py": ["--seeds", "1", "--kinds", "inverted", "--epochs", "1"],
    "wise_ft.py": ["--seeds", "1", "--epochs", "1"],
    "l2_sp.py": ["--seeds", "1", "--epochs", "1"],
    "replay.py": ["--seeds", "1", "--epochs", "1"],
    "strategies.py": ["--seeds", "0-1", "--kinds", "9 - y", "--epochs", "1"],
}


def test_every_example_is_run_and_short():
    scripts = {path.name: path for path in EXAMPLES.glob("*.py")}
    del scripts["render_characters.py"]  # draws the images that ship; test_glyphs.py runs it
    assert set(scripts) == set(SMALL)
    assert max(len(path.read_text().splitlines()) for path in scripts.values()) <= 60


def output_of(script, arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = forked.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_example_runs(name, tmp_path):
    assert output_of(name, SMALL[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_benchmark_prints_a_table_and_leaves_nothing_behind(name, tmp_path):
    lines = output_of(f"../benchmarks/{name}", BENCHMARKS[name], tmp_path).splitlines()
    assert len([line for line in lines if line.startswith("|")]) > 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_the_finding_of_a_paper_is_printed_as_a_table(name, tmp_path):
    lines = output_of(f"papers/{name}", PAPERS[name], tmp_path).splitlines()
    assert len([line for line in lines if line.startswith("|")]) > 2
    assert not list(tmp_path.iterdir())
