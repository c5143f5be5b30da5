"""The docs are run or generated, so that they cannot drift."""

import re
import runpy
from pathlib import Path

import pytest

import tuneforge as tf
from tuneforge.plugin.declaration import get_options
from tuneforge.plugin.hooks import find_hook_methods

DOCS = Path(__file__).parent.parent / "docs"
SOURCES = re.findall(r"```python\n(.*?)```", (DOCS / "plugins.md").read_text(), flags=re.DOTALL)


def test_the_hook_reference_is_what_the_specifications_say():
    assert (DOCS / "hooks.md").read_text() == runpy.run_path(str(DOCS / "generate.py"))["reference"]()


def components(source):
    namespace = {"__name__": "docs"}
    exec(compile(source, "plugins.md", "exec"), namespace)
    return [value for value in namespace.values() if hasattr(value, "__tuneforge_api__")]


@pytest.mark.parametrize("source", SOURCES)
def test_components_in_the_docs_are_valid(source):
    (cls,) = components(source)
    assert get_options(cls)
    assert find_hook_methods(cls, "docs")


def test_components_in_the_docs_run(tune):
    (strategy,), (extension,) = map(components, SOURCES)
    free = tune(strategy())
    held = tune(strategy(), callbacks=[extension(strength=10.0)])
    assert free.strategy_steps[0][1].train["loss"] < held.strategy_steps[0][1].train["loss"]
    assert isinstance(free.strategy_steps[0][0], tf.Phase)
