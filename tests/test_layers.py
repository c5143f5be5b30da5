"""The house stays as its plan says: imports point one way, and the engine knows neither images nor classes."""

import ast
import inspect
from pathlib import Path

import pytest

import tuneforge

ROOT = Path(tuneforge.__file__).parent
FLOORS = ["errors", "plugin", "engine", "check", "judge", "ship", "cli"]


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; without `everywhere`, only when it is imported itself."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else _at_import(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _at_import(body):
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from _at_import(node.body)


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("**/*.py"))


@pytest.mark.parametrize("floor", FLOORS[1:])
def test_imports_point_one_way(floor):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for path in files(floor):
        wrong = {
            name for name in imports(path, everywhere=False) for top in above if name.startswith(f"tuneforge.{top}")
        }
        assert not wrong, f"{path}: {wrong}"


def test_builtins_import_only_what_is_exported():
    private = tuple(f"tuneforge.{floor}" for floor in FLOORS)
    for path in files("builtin"):
        assert not {name for name in imports(path) if name.startswith(private)}, path


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
