"""What the README shows is run: its Python as it stands, its commands by CI."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tuneforge.cli import cli
from tuneforge.plugin import registry

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("source", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_in_the_readme_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    exec(compile(source, "README.md", "exec"), namespace)
    assert "HeadThenMaybeAll" in namespace or namespace["result"].run_dir.exists()


def test_commands_in_the_readme_name_what_exists():
    lines = README.replace("\\\n", " ")
    commands = re.findall(r"\$ tuneforge (.+)", lines)
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command)
        assert words[0] in cli.list_commands(None)
        for flag, name in pairwise(words):
            group = {flag: group for group, flag in registry.FLAG_BY_GROUP.items()}.get(flag)
            if group and ":" not in name:
                registry.find_component(group, name)


def test_the_table_of_what_ships_is_complete():
    shipped = [entry for entry in registry.list_components() if entry.distribution == "tuneforge"]
    hidden = {"arrays", "report-page"}
    for entry in shipped:
        if entry.group not in ("inputs", "targets") and entry.name not in hidden:
            assert f"`{entry.name}`" in README, entry
