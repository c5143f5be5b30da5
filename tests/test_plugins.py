"""A stranger's package: installed by pip into a folder of its own, its strategies are found and run by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "plugins" / "tuneforge-surgical"
FEW = ["--data.per-class", "4", "--data.other-share", "0", "--strategy.epochs", "1"]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run Python where the package is installed: `python("-m", "tuneforge", ...)`."""
    site = tmp_path_factory.mktemp("site")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *offline, "--target", site, PACKAGE], check=True)

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, check=False)

    return run


def test_an_installed_package_is_listed_with_its_distribution_and_version(python):
    done = python("-m", "tuneforge", "plugins", "list", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout) if row["hook"] == "finetune_strategy"}
    for name in ("surgical", "auto-rgn"):
        assert (rows[name]["distribution"], rows[name]["version"]) == ("tuneforge-surgical", "0.1.0")
    lines = python("-m", "tuneforge", "plugins", "list").stdout.splitlines()
    assert any(
        line.split()[:2] == ["finetune_strategy", "surgical"] and "tuneforge-surgical 0.1.0" in line for line in lines
    )


def test_its_options_are_shown_without_importing_torch(python):
    script = "import sys; from tuneforge.__main__ import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    done = python("-c", script, "run", "--strategy", "surgical", "--help")
    assert done.returncode == 0, done.stderr
    for option in (
        "--strategy.block TEXT",
        "--strategy.epochs INTEGER",
        "--strategy.head-epochs",
        "--strategy.patience",
        "[default: first]",
    ):
        assert option in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["surgical", "auto-rgn"])
def test_it_runs_by_name_from_the_command_line(python, tmp_path, name):
    done = python("-m", "tuneforge", "run", "--strategy", name, *FEW, "--no-page", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["strategy"] == name


@pytest.mark.slow
def test_its_own_tests_pass_where_it_is_installed(python):
    done = python("-m", "pytest", PACKAGE / "tests", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
