"""Every example runs, in a folder of its own, on less data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "quick_start.py": ["--epochs", "1", "--per-class", "10"],
    "own_strategy.py": ["--enough", "0.5", "--per-class", "10"],
    "programmatic_api.py": ["--epochs", "5"],
    "digits_and_others.py": ["--epochs", "1", "--per-class", "10"],
    "image_folder.py": ["--count", "120", "--epochs", "1"],
    "table_regression.py": ["--epochs", "3"],
    "recipe_plain_torch.py": ["--epochs", "1", "--per-class", "10"],
    "recipe_tuneforge.py": ["--strategy.epochs", "1", "--data.per-class", "10"],
    "why_tuning.py": ["--seeds", "2", "--epochs", "1"],
    "pretrain_digit_cnn.py": ["--count", "700", "--epochs", "1"],
}


def test_every_example_is_run_and_short():
    scripts = {path.name: path for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == set(SMALL)
    assert max(len(path.read_text().splitlines()) for path in scripts.values()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_example_runs(name, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(EXAMPLES / name), *SMALL[name]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
