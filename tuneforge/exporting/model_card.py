"""The model card of a bundle: what it is, how good it is, where it comes from, and how to use it without tuneforge."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from tuneforge.engine.loop.metric_set import scalar_metrics
from tuneforge.plugin import registry
from tuneforge.plugin.declaration import get_options

EXAMPLE_SCRIPT = '''\
"""Classify images with onnxruntime, numpy and Pillow alone: python classify.py BUNDLE FOLDER|FILE..."""

import json
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
import onnxruntime
from PIL import Image

bundle, paths = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
record = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
names = record["targets"]["options"]["names"]
(channels, height, width), _ = record["input_specs"][""]
session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])

files = [file for path in paths for file in (sorted(path.rglob("*.png")) if path.is_dir() else [path])]
num_correct = 0
for file in files:
    image = Image.open(file).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        sys.exit(f"{file}: {image.size} pixels, and the model takes {(width, height)}; prepare it as the card says")
    pixels = np.asarray(image).reshape(1, height, width, channels).transpose(0, 3, 1, 2)
    (predictions,) = session.run(["predictions"], {"input": np.ascontiguousarray(pixels)})
    name = names[int(predictions[0].argmax())]
    num_correct += quote(name, safe=" ") == file.parent.name
    print(f"{file}: {name} ({predictions[0].max():.4f})")
if len(paths) == 1 and paths[0].is_dir():
    print(f"right, where the folder is the class: {num_correct} of {len(files)}")
'''
"""Part of the model card of an image classifier in ONNX; the tests run it where torch is not installed."""


def render_card(record: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        record: The content of `bundle.json`.
    """
    return (
        "\n".join(
            [
                *_header_section(record),
                *_metrics_section(record),
                *_usage_section(record),
                *_inputs_section(record),
                *_provenance_section(record),
            ]
        )
        + "\n"
    )


def _header_section(record: Mapping[str, Any]) -> Iterator[str]:
    labels = record["labels"]
    yield f"# {record['name']}"
    yield ""
    answers = f"one answer over {len(labels)} names: {', '.join(labels)}" if labels else "numbers"
    yield f"A model tuned with tuneforge {record['tuneforge']} by the strategy `{record['strategy']}`."
    yield f"It gives {answers}."
    yield ""
    yield "| form | computed by | compared with the tuned model on the test split |"
    yield "| --- | --- | --- |"
    for name, form in record["formats"].items():
        parity = form["parity"]
        batches = ", ".join(map(str, parity["batch_sizes"]))
        yield (
            f"| {name} | {form['backend']} | {parity['num_samples']:,} samples, batches of {batches}: "
            f"off by at most {parity['max_deviation']:.1e}, {parity['num_different']} other classes |"
        )
    yield ""


def _metrics_section(record: Mapping[str, Any]) -> Iterator[str]:
    test = record["metrics"]["test"]
    yield f"## How good it is: {record['num_samples']['test']:,} test samples, looked at once, at the end of the run"
    yield ""
    yield "| figure | test |"
    yield "| --- | --- |"
    yield from (f"| {name} | {value:.4f} |" for name, value in scalar_metrics(test).items())
    yield ""
    if classes := test.get("per_class"):
        yield "| class | precision | recall | f1-score | support |"
        yield "| --- | --- | --- | --- | --- |"
        for name, row in classes.items():
            scores = " | ".join(_number(row.get(key)) for key in ("precision", "recall", "f1-score"))
            yield f"| {_cell(name)} | {scores} | {row.get('support')} |"
        yield ""
        hardest = test.get("hardest_class")
        yield f"It is weakest at `{hardest}`. It calls anything by one of these names, whatever it is."
        yield ""


def _usage_section(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## Use"
    yield ""
    if "onnx" in record["formats"]:
        name = "" if "" not in record["input_specs"] else "`input`, "
        specs = _format_input_specs(record, batch="batch")
        yield f"`model.onnx` takes {name}{specs}; what follows on that is inside the graph."
        yield "It gives `outputs`, as the network does, and `predictions`: probabilities, or numbers in their own unit."
        yield "Any batch size will do."
        yield ""
    if _has_example_script(record):
        yield "Classify the images of a folder, or files, with onnxruntime, numpy and Pillow alone (`classify.py`):"
        yield ""
        yield f"```python\n{EXAMPLE_SCRIPT}```"
        yield ""
        yield "It takes images as they are stored; `tuneforge export --images DIR` writes those of the test split."
        yield ""
    yield "With tuneforge, from raw files or rows:"
    yield ""
    yield "```py"
    yield "import tuneforge as tf"
    yield ""
    yield 'print(*load_bundle("BUNDLE").predict(["image.png"]))'
    yield "```"
    yield ""


def _inputs_section(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## How inputs are prepared"
    yield ""
    yield f"By `{record['inputs']['name']}`, the same for training, test and use. It makes of each input"
    yield f"{_format_input_specs(record)}; the rest of the way to what the network takes is part of the model."
    yield ""
    yield from _options_table("inputs", record)
    yield f"Outputs are decoded by `{record['targets']['name']}`:"
    yield ""
    yield from _options_table("targets", record)
    if told := (*record["notes"], *record["changes"]):
        yield "What the run says of its data and of its model:"
        yield ""
        yield from (f"- {note}" for note in told)
        yield ""


def _provenance_section(record: Mapping[str, Any]) -> Iterator[str]:
    run = record["run"]
    yield "## Where it comes from"
    yield ""
    yield f"- Run `{run['run_dir']}`: `{shlex.join(run['environment']['command'])}`. All options are in `bundle.json`."
    yield f"- Samples: {', '.join(f'{count:,} {name}' for name, count in record['num_samples'].items())}."
    yield from (f"- Fingerprint of {name}: `{digest}`." for name, digest in record["fingerprints"].items())
    versions = ", ".join(f"{name} {each}" for name, each in record["versions"].items())
    yield f"- Exported {record['created']} with {versions}."
    parts = [each for each in run["components"] if each.get("distribution") not in ("tuneforge", "", None)]
    for each in parts:
        yield f"- Component `{each['name']}` of {each['distribution']} {each.get('version', '')}."


def _has_example_script(record: Mapping[str, Any]) -> bool:
    """Return whether this is an image classifier in ONNX with one input size."""
    contracts = (record["inputs"]["name"], record["targets"]["name"])
    return "onnx" in record["formats"] and contracts == ("images", "classes")


def _options_table(group: str, record: Mapping[str, Any]) -> Iterator[str]:
    """The options of a contract with what each means."""
    known = get_options(registry.load_component(registry.find_component(group, record[group]["name"])))
    yield "| option | value | meaning |"
    yield "| --- | --- | --- |"
    for name, value in record[group]["options"].items():
        yield f"| {name} | `{_cell(str(value))}` | {_cell(known[name].help) if name in known else ''} |"
    yield ""


def _format_input_specs(record: Mapping[str, Any], *, batch: str = "") -> str:
    """Type and shape of the stored tensors."""
    return ", ".join(
        f"{f'`{name}`, ' if name else ''}{dtype.removeprefix('torch.')} of shape "
        f"({', '.join([*filter(None, [batch]), *map(str, shape)])})"
        for name, (shape, dtype) in record["input_specs"].items()
    )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(name: str) -> str:
    return name.replace("|", "\\|")
