"""The house stays as its plan says: imports point one way, and the engine knows neither images nor classes."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import tuneforge

ROOT = Path(tuneforge.__file__).parent
PLUGINS = Path(__file__).parent.parent / "plugins"
LAYERS = [
    "lazy_names", "errors", "sandbox", "plugin",
    "engine/storage", "engine/data", "engine/model", "engine/context", "engine/feature_cache", "engine/loop",
    "engine/session",
    "exporting", "convert", "report", "comparison", "builtin", "sklearn", "testing", "cli",
]  # fmt: skip
"""Files and folders of the package, each of which imports only what stands before it."""


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports, but for those that only type checkers see; without `everywhere`, only when it is
    imported itself.
    """
    found = set()
    for node in _nodes(ast.parse(path.read_text()).body, everywhere=everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _nodes(body, *, everywhere):
    for node in body:
        yield node
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if is_typing:
            yield from _nodes(node.orelse, everywhere=everywhere)
        elif everywhere or isinstance(node, ast.If):
            yield from _nodes(ast.iter_child_nodes(node), everywhere=everywhere)


def files(layer: str) -> list[Path]:
    module = ROOT / f"{layer}.py"
    return [module] if module.exists() else sorted((ROOT / layer).glob("**/*.py"))


def layer_of(name: str) -> str | None:
    """The layer of a module or of a name that the package exports; None for the package itself and what is foreign."""
    top, _, exported = name.rpartition(".")
    if top == "tuneforge" and exported in tuneforge.__all__:
        name = getattr(getattr(tuneforge, exported), "__module__", name)
    path = name.replace(".", "/") + "/"
    return next((layer for layer in LAYERS if path.startswith(f"tuneforge/{layer}/")), None)


def test_every_file_is_in_a_layer():
    known = {path for layer in LAYERS for path in files(layer)}
    rest = {str(path.relative_to(ROOT)) for path in set(ROOT.glob("**/*.py")) - known}
    assert rest == {"__init__.py", "__main__.py", "engine/__init__.py"}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    found = {(str(path.relative_to(ROOT)), layer_of(name)) for path in files(layer) for name in imports(path)}
    upward = {(path, other) for path, other in found if other in above}
    assert not upward


PUBLIC = ("tuneforge.errors", "tuneforge.plugin", "tuneforge.exporting", "tuneforge.convert", "tuneforge.comparison",
          "tuneforge.testing", "tuneforge.sklearn")  # fmt: skip
"""Modules whose `__all__` is public, beside that of `tuneforge` itself."""


def private_names(path: Path, own: str) -> set[str]:
    """What a file imports from tuneforge that is neither public nor of its own folder `own`."""
    found = set()
    for node in _nodes(ast.parse(path.read_text()).body, everywhere=True):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("tuneforge.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tuneforge":
            if node.module != "tuneforge" and node.module not in PUBLIC:
                found |= {node.module}
            else:
                public = importlib.import_module(node.module).__all__
                found |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name not in public}
    return {name for name in found if not name.startswith(own)}


def test_builtins_import_only_public_names():
    for path in files("builtin"):
        assert not private_names(path, "tuneforge.builtin"), path


@pytest.mark.parametrize("plugin", sorted(path.name for path in PLUGINS.iterdir()))
def test_plugins_import_only_public_names(plugin):
    for path in sorted((PLUGINS / plugin).glob(f"{plugin.replace('-', '_')}/**/*.py")):
        assert not private_names(path, "tuneforge_"), path


def test_the_engine_imports_neither_torchvision_nor_scikit_learn():
    for path in files("engine"):
        assert not {
            name for name in imports(path) if name.split(".")[0] in ("torchvision", "sklearn", "PIL", "matplotlib")
        }, path


def test_the_plugin_folder_imports_no_torch():
    for path in files("plugin"):
        assert "torch" not in {name.split(".")[0] for name in imports(path, everywhere=False)}, path


def test_every_exported_name_exists_and_is_documented():
    for name in tuneforge.__all__:
        value = getattr(tuneforge, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
