"""The pages of docs/ are run or generated, and their links lead somewhere."""

import json
import re
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

import tuneforge as tf
from tuneforge.plugin.declaration import get_options
from tuneforge.plugin.hooks import find_hook_methods

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "plugins/*/*.md", "plugins/*/docs/*.md", "examples/*/*.md")
    for path in ROOT.glob(pattern)
)
*COMPONENTS, COMMAND = re.findall(r"```python\n(.*?)```", (DOCS / "plugins.md").read_text(), flags=re.DOTALL)


def execute(source):
    namespace = {"__name__": "docs"}
    exec(compile(source, "plugins.md", "exec"), namespace)
    return namespace


def components(source):
    return [value for value in execute(source).values() if hasattr(value, "__tuneforge_api__")]


def test_the_hook_reference_is_generated_from_the_specifications():
    assert (DOCS / "hooks.md").read_text() == runpy.run_path(str(DOCS / "generate.py"))["reference"]()


@pytest.mark.parametrize("source", COMPONENTS)
def test_components_in_the_docs_are_valid(source):
    (cls,) = components(source)
    assert get_options(cls)
    assert find_hook_methods(cls, "docs")


def test_components_in_the_docs_run(tune):
    (strategy,), (callback,) = map(components, COMPONENTS)
    free = tune(strategy())
    penalized = tune(strategy(), callbacks=[callback(strength=10.0)])
    assert free.strategy_steps[0][1].train["loss"] < penalized.strategy_steps[0][1].train["loss"]
    assert isinstance(free.strategy_steps[0][0], tf.Phase)


def test_the_command_in_the_docs_runs(tune):
    run_dir = tune([tf.Phase("all", epochs=1)]).run_dir
    hello = execute(COMMAND)["hello"]
    printed = CliRunner().invoke(hello, [str(run_dir), "--json"], standalone_mode=False, catch_exceptions=False)
    assert printed.return_value == 0
    assert json.loads(printed.stdout).keys() == {"accuracy"}
    with pytest.raises(tf.UsageError):
        CliRunner().invoke(hello, [str(run_dir.parent)], standalone_mode=False, catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["tuneforge-serve", "tuneforge-datacheck"])
def test_python_in_the_readme_of_a_plugin_runs(plugin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "plugins" / plugin / "README.md").read_text(), flags=re.DOTALL
    )
    execute(source)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings], link
