"""Names: the public ones, and that a file name and a class name mean one thing each."""

import ast
import importlib
import inspect
import pkgutil
from collections import Counter
from pathlib import Path

import pytest

import tuneforge
from tuneforge import comparison, errors, exporting, plugin

ROOT = Path(tuneforge.__file__).parent
REPOSITORY = ROOT.parent
DISTRIBUTIONS = [
    ROOT,
    *(each for each in REPOSITORY.glob("plugins/*/tuneforge_*") if each.is_dir()),
]
TOP_LEVEL = {
    "component", "option", "gt", "ge", "between", "hookimpl",
    "Phase", "HeadFit", "Diagnosis", "WeightAverage", "use", "StrategyStepResult", "TaskInfo",
    "Batch", "Data", "Inputs", "Source", "Split", "Targets", "TensorTree", "map_inputs", "SampleRNG",
    "Metrics", "LayerGroup", "Model", "Run", "Engine", "Result",
    "Predictor", "load", "evaluate", "predict", "compare", "export", "lr_find",
}  # fmt: skip
EXCEPTIONS = {"distributed", "fixed", "pretrained"}
"""Words of the field that look like participles; `fixed` strategies take no decision while they run."""
IRREGULAR_PARTICIPLES = {
    "given", "kept", "found", "told", "taken", "left", "made", "held", "known", "shown", "drawn", "frozen", "written",
    "chosen", "sent", "built", "done", "seen", "said",
}  # fmt: skip


def modules(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*.py")) if "__pycache__" not in path.parts]


def duplicates(names):
    return sorted(name for name, count in Counter(names).items() if count > 1)


def test_the_top_level_exports_35_names_and_the_errors():
    exported = set(tuneforge.__all__) - {"__version__"}
    error_names = {name for name in errors.__all__ if name.endswith("Error")}
    assert len(TOP_LEVEL) == 35
    assert exported - error_names == TOP_LEVEL
    assert error_names == {
        name for name in errors.__all__ if inspect.isclass(getattr(errors, name)) and name != "ExitCode"
    }


@pytest.mark.parametrize("package", [tuneforge, comparison, exporting, plugin], ids=lambda package: package.__name__)
def test_the_stub_of_a_package_lists_what_is_exported_and_where_it_stands(package):
    tree = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    listed = [(node.module, each.name, each.asname) for node in tree.body for each in getattr(node, "names", ())]
    assert {name for _, name, _ in listed} == set(package.__all__) - {"__version__"}
    for module, name, alias in listed:
        assert alias == name
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_public_functions_stay_functions_after_every_module_is_imported():
    for module in pkgutil.walk_packages(tuneforge.__path__, "tuneforge."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in TOP_LEVEL:
        assert callable(getattr(tuneforge, name)) or name == "TensorTree", name
        assert not inspect.ismodule(getattr(tuneforge, name)), name


def test_no_exported_name_is_a_module_directly_below_the_package():
    below = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not below & set(tuneforge.__all__)


def test_a_file_name_is_used_once_in_a_distribution():
    for root in DISTRIBUTIONS:
        names = [path.name for path in modules(root) if path.name != "__init__.py" and path.parent.name != "cli"]
        assert not duplicates(names), root.name


def test_a_class_name_is_used_once_in_all_distributions():
    names = [
        node.name
        for root in DISTRIBUTIONS
        for path in modules(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert not duplicates(names)


def test_no_module_is_named_by_a_past_participle():
    for root in DISTRIBUTIONS:
        for path in modules(root):
            last = path.stem.rpartition("_")[2]
            is_participle = path.stem in IRREGULAR_PARTICIPLES or last.endswith("ed")
            assert not is_participle or path.stem in EXCEPTIONS, path
