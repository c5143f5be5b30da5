"""The README's Python runs as it stands, and its commands run in order, on little data."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from safetensors.torch import save_file

from tuneforge.__main__ import main
from tuneforge.cli import cli
from tuneforge.plugin import registry

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
CONSOLE = "\n".join(re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^\$ tuneforge (.+)", CONSOLE, flags=re.MULTILINE)]

PATHS = ("photos", "other-photos", "houses.csv")
"""Values of --data that are paths."""

NOT_RUN = ("import", "resume", "serve", "test-endpoint", "retrain")
"""Verbs that need a foreign file, a killed run or a server; the tests of these verbs run them."""

SHORT = {
    "digits": ["--data.per-class", "3", "--data.other-share", "0"],
    "photos": [
        *("--model", "torchvision", "--model.arch", "resnet18", "--model.weights", "resnet18.safetensors"),
        *("--data.size", "32", "--strategy", "full", "--strategy.epochs", "15"),
    ],
    "image-csv": ["--strategy", "full", "--strategy.epochs", "1", "--data.val", "0.2", "--data.test", "0.2"],
    "houses.csv": ["--strategy.epochs", "1"],
}
"""Flags that make a command short, by the data it names; the last flag of a name counts."""


@pytest.mark.parametrize("source", PYTHON)
def test_python_in_the_readme_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    exec(compile(source, "README.md", "exec"), namespace)
    assert namespace.keys() & {"HeadThenMaybeAll", "result", "search"}


def test_the_first_two_bash_blocks_are_what_ci_runs():
    install, test = re.findall(r"```bash\n(.*?)\n```", README, flags=re.DOTALL)
    assert install.endswith(" && .venv/bin/tuneforge run --strategy freeze-then-unfreeze")
    assert test.endswith(" && .venv/bin/python -m pytest -n auto")
    assert all(f"-e 'plugins/{plugin}[dev]'" in test for plugin in ("tuneforge-serve", "tuneforge-datacheck"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_verbs_flags_and_components_in_the_readme_exist(command):
    verb = cli.get_command(None, command[0])
    assert verb is not None
    while hasattr(verb, "commands"):
        command = command[1:]
        verb = verb.commands[command[0]]
    flags = {flag for parameter in verb.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for flag, value in zip(command, [*command[1:], ""], strict=True):
        if flag.startswith("--") and "." not in flag:
            assert flag in flags
        group = {flag: group for group, flag in registry.FLAG_BY_GROUP.items()}.get(flag)
        if group and ":" not in value and value not in PATHS:
            registry.find_component(group, value)


@pytest.mark.slow
def test_commands_in_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_inputs(tmp_path)
    for command in COMMANDS:
        if command[0] not in NOT_RUN:
            code = main([*command, *short_flags(command)])
            assert code == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "runs" / "photos" / "report.html").exists()
    champion = json.loads((tmp_path / "models" / "photos" / "champion.json").read_text())
    assert champion["version"] == 1


def short_flags(command):
    if command[0] not in ("run", "lr-find", "compare") or "--resume" in command or "--help" in command:
        return []
    if command[0] == "compare" and "--strategies" not in command:
        return []
    data = command[command.index("--data") + 1] if "--data" in command else "digits"
    flags = SHORT[data] if command[0] == "run" or data == "digits" else []
    budget = ["--budget", "1epoch"] if "--budget" in command else []
    return [*flags, *budget, *(["--seeds", "2"] if command[0] == "compare" else [])]


def write_inputs(folder):
    """Write the files that the README's commands read: images, a table, weights and a strategy."""
    random = np.random.default_rng(0)
    for root in ("photos", "other-photos"):
        for label, shade in (("dog", 60), ("cat", 190)):
            (folder / root / label).mkdir(parents=True)
            for number in range(12):
                pixels = random.integers(shade - 60, shade + 60, size=(40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / root / label / f"{number}.png")
    (folder / "photo.png").write_bytes((folder / "photos" / "dog" / "0.png").read_bytes())
    rows = [f"{1 + n % 5},{30 + 3 * n},{('Lund', 'Ystad')[n % 2]},{900 + 40 * n}" for n in range(40)]
    (folder / "houses.csv").write_text("\n".join(["rooms,area,town,price", *rows]) + "\n")
    save_file(torchvision.models.resnet18(weights=None).state_dict(), folder / "resnet18.safetensors")
    (folder / "mine.py").write_text(next(source for source in PYTHON if "HeadThenMaybeAll" in source))


def test_the_table_of_what_ships_is_complete():
    shipped = [entry for entry in registry.list_components() if entry.distribution == "tuneforge"]
    hidden = {"arrays", "report-page"}
    for entry in shipped:
        if entry.group not in ("inputs", "targets") and entry.name not in hidden:
            assert f"`{entry.name}`" in README, entry
