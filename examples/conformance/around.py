"""Rows 14 to 16: broken plugins, start-up, and validation folders with other classes than training.

The first two run in a new interpreter, which runs this file as a script.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
FRESH_S = 300


def row_14(peer: Any) -> None:
    """A distribution whose plugin raises on import breaks nothing that does not name it.

    The entry-point groups that a library reads are found by running it, unless it names them (`groups`); a plugin that
    raises is then installed in each.
    """
    from case import Fails, NotThereError

    groups = getattr(peer, "groups", None) or json.loads(
        _fresh("groups", _module(peer), peer.name, *peer.packages).splitlines()[-1]
    )
    if not groups:
        raise NotThereError("looks for no plugins")
    with TemporaryDirectory() as place:
        _plant(Path(place), groups)
        try:
            _fresh("use", _module(peer), peer.name, path=place)
        except RuntimeError as error:
            raise Fails(f"with a broken plugin in {', '.join(groups)}: {str(error)[:120]}") from None


def row_15(peer: Any) -> None:
    """`--help` of the command line does not import torch."""
    from case import Fails, NotThereError

    if peer.command is None:
        raise NotThereError("has no command line that trains")
    if json.loads(_fresh("help", peer.command).splitlines()[-1]):
        raise Fails("torch is imported")


def row_16(peer: Any) -> None:
    """A validation folder with a class that training lacks is refused; one that lacks a class is matched by name."""
    from case import Fails, NotThereError, PassesWithNote

    if not hasattr(peer, "folders"):
        raise NotThereError("takes data sets; their classes are the user's")
    with TemporaryDirectory() as place:
        root = Path(place)
        for split, names in {"train": "abc", "val": "bc", "other": "bd"}.items():
            _pictures(root / split, names)
        scored = peer.folders(root, "val")
        if scored != {"b": 1, "c": 2}:
            raise Fails(f"classes of validation are scored as {scored}")
        try:
            scored = peer.folders(root, "other")
        except Exception as error:  # noqa: BLE001 - a refusal, of whatever kind
            if "d" in str(error).replace("did", ""):
                raise PassesWithNote(f"refused: {str(error).partition(chr(10))[0][:70]}") from None
            raise Fails(f"refused without naming the class: {type(error).__name__}") from None
        raise Fails(f"a class that training lacks is scored as {scored}")


def _pictures(folder: Path, names: str) -> None:
    from PIL import Image

    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (16, 16), (40 * shade, 10 * number, 0)).save(folder / name / f"{number}.png")


def _module(peer: Any) -> str:
    return str(type(peer).__module__)


def _fresh(*arguments: str, path: str = "") -> str:
    """Run this script in a new interpreter, and return its output.

    Raises:
        RuntimeError: It failed; with the last line of its output.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in (path, *sys.path) if each)}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=FRESH_S, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "?").splitlines()[-1])
    return done.stdout


def _plant(place: Path, groups: list[str]) -> None:
    """Install a distribution with an entry in each group, whose module raises."""
    about = place / "broken_plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    entries = "".join(f"[{group}]\nbroken = broken_plugin:plugin\n" for group in groups)
    (about / "entry_points.txt").write_text(entries)
    (place / "broken_plugin.py").write_text("raise ImportError('a plugin that is broken')\n")


def _used(module: str, name: str) -> None:
    """Run a small training job with a library."""
    sys.path.insert(0, str(HERE))
    (peer,) = (each for each in importlib.import_module(module).peers() if each.name == name)
    with TemporaryDirectory() as folder:
        if hasattr(peer, "use"):
            peer.use(Path(folder))
        else:
            from case import Plan, network

            plan = Plan() if getattr(peer, "freezes", True) else Plan(phases=("all",))
            peer.fit(network(), plan, Path(folder))


def _groups(module: str, name: str, packages: tuple[str, ...]) -> list[str]:
    """Return the entry-point groups that the library's own code reads while it is imported and used."""
    import importlib.metadata as metadata

    asked: set[str] = set()

    def noted(original: Any) -> Any:
        def call(**given: Any) -> Any:
            frame: Any = sys._getframe(1)
            if frame.f_globals.get("__name__", "").partition(".")[0] in packages:
                asked.add(str(given.get("group", "every group")))
            return original(**given)

        return call

    metadata.entry_points = noted(metadata.entry_points)
    metadata.distributions = noted(metadata.distributions)
    _used(module, name)
    return sorted(asked)


def _help(command: str) -> bool:
    """Return whether `--help` imports torch."""
    module, _, function = command.partition(":")
    sys.argv = [module.partition(".")[0], "--help"]
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as left:
        if left.code not in (0, None):
            raise
    return "torch" in sys.modules


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "groups":
        print("\n" + json.dumps(_groups(rest[0], rest[1], tuple(rest[2:]))))
    elif what == "use":
        _used(rest[0], rest[1])
    else:
        print("\n" + json.dumps(_help(rest[0])))
