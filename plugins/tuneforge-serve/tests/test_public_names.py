"""The public names of tuneforge_serve are documented, typed, and no modules."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import tuneforge_serve


def test_public_names_are_documented_functions_and_classes_after_every_import():
    for module in pkgutil.walk_packages(tuneforge_serve.__path__, "tuneforge_serve."):
        importlib.import_module(module.name)
    for name in set(tuneforge_serve.__all__) - {"__version__"}:
        value = getattr(tuneforge_serve, name)
        assert inspect.isfunction(value) or inspect.isclass(value), name
        assert value.__doc__, name


def test_type_checkers_see_the_public_names():
    tree = ast.parse(Path(tuneforge_serve.__file__).with_suffix(".pyi").read_text())
    typed = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(tuneforge_serve.__all__) - {"__version__"}
