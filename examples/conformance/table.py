"""Print the results for known issues 1 to 20, for each library that is installed.

Nothing is installed or downloaded. A library that cannot be imported has no column. Run it from anywhere:

    python examples/conformance/table.py [--rows 1,2,3] [--only Lightning]
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import logging
import traceback
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from case import Fails, NotThereError, PassesWithNote
from rows import OF_FREEZING, ROWS

MODULES = {
    "lightning": "on_lightning", "fastai": "on_fastai", "skorch": "on_skorch", "accelerate": "on_accelerate",
    "transformers": "on_transformers", "tuneforge": "on_tuneforge",
}  # fmt: skip
TITLES = {
    1: "resume around the boundary of two phases", 2: "frozen BatchNorm keeps its statistics",
    3: "frozen dropout is off",
    4: "decay and momentum change nothing frozen", 5: "schedules across the boundary and a resume",
    6: "equal tensors all train", 7: "optimizer state by name", 8: "order of samples after a resume",
    9: "unfrozen layers train when compiled", 10: "two ranks across the boundary",
    11: "a learning-rate finder changes nothing", 12: "a pattern that matches nothing", 13: "every stop has a reason",
    14: "a broken plugin breaks nothing else", 15: "`--help` without torch",
    16: "classes of validation folders by name",
    17: "damaged newest checkpoint", 18: "killed while old checkpoints are deleted", 19: "each step once in the record",
    20: "two runs, one folder",
}  # fmt: skip

OWN = 13
"""The last row for which tuneforge's own conformance kit has checks."""


def peers() -> Iterable[Any]:
    """Yield the libraries that can be imported."""
    for package, module in MODULES.items():
        if importlib.util.find_spec(package) is not None:
            yield from importlib.import_module(module).peers()


def verdict(peer: Any, number: int, *, debug: bool) -> str:
    """Return one cell of the table."""
    if number in OF_FREEZING and not getattr(peer, "freezes", True):
        return "n/a: does not freeze"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some tools print each step
            peer.row(number) if hasattr(peer, "row") and number <= OWN else ROWS[number](peer)
    except NotThereError as why:
        return f"n/a: {why}"
    except PassesWithNote as why:
        return f"pass, {why}"
    except Fails as why:
        return f"fail: {why}"
    except Exception as error:  # noqa: BLE001 - a tool that stops on the case fails the row
        if debug:
            traceback.print_exc()
        return f"fail: {type(error).__name__}: {str(error).partition(chr(10))[0][:90]}"
    return "pass"


def main() -> None:
    """Run every row for every library."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers, joined by commas")
    parser.add_argument("--only", help="one library, by its name")
    parser.add_argument("--debug", action="store_true", help="print the exception of a library")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = [each for each in peers() if asked.only in (None, each.name)]
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.setStream(open("/dev/null", "w"))  # noqa: SIM115 - until the process ends
    print(f"torch {torch.__version__}\n")
    print("| row | | " + " | ".join(f"{each.name} {each.version()}" for each in found) + " |")
    print("| --- | --- |" + " --- |" * len(found))
    for number in map(int, asked.rows.split(",")):
        cells = [verdict(each, number, debug=asked.debug) for each in found]
        print(f"| {number} | {TITLES[number]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
