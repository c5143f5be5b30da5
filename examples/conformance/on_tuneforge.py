"""tuneforge: the checks of its conformance kit, on a strategy that does the same."""

import re
import shutil
from pathlib import Path

from case import Fails

import tuneforge as tf

STRATEGY = "freeze-then-unfreeze"
GROUPS = (
    "data_prepare", "model_adapt", "train_step", "evaluate", "finetune_strategy", "callback", "lr_schedule",
    "optimizer", "augment", "export",
)  # fmt: skip


class Tuneforge:
    """A known issue is one check of the kit, or several."""

    name = "tuneforge"
    packages, command = ("tuneforge",), "tuneforge.__main__:main"
    groups = tuple(f"tuneforge.{name}" for name in GROUPS)

    def version(self) -> str:
        """Return the version of the package."""
        return tf.__version__

    def row(self, number: int) -> None:
        """Run the checks of the known issue with that number."""
        from tuneforge.testing import strategy_checks

        checks = [*strategy_checks(STRATEGY), *strategy_checks(STRATEGY, slow=True)]
        for each in checks:
            if re.match(rf"Known issue {number}\b", each.check.__doc__ or ""):
                try:
                    each()
                except AssertionError as error:
                    raise Fails(str(error)) from error

    def use(self, folder: Path) -> None:
        """Row 14: commands that list and show, and a run; `plugins check` exists to find what is broken."""
        from tuneforge.__main__ import main

        few = ["--data.per-class", "2", "--data.other-share", "0", "--strategy", "head-only", "--strategy.epochs", "1"]
        run = ["run", *few, "--no-page", "--cache", "off", "--out", str(folder / "run")]
        for command in (["--help"], ["plugins", "list"], ["run", "--help"], ["doctor"], run):
            if main(command):
                raise RuntimeError(f"tuneforge {' '.join(command)} fails")

    def folders(self, root: Path, val: str) -> dict[str, int]:
        """Row 16: `image-folder`; return the index of each class of the validation folder."""
        place = root / f"only-{val}"
        place.mkdir()
        for name, split in {"train": "train", "val": val, "test": "val"}.items():
            shutil.copytree(root / split, place / name)
        data = (
            tf.Engine(data=tf.use("image-folder", path=place, size=16), model=tf.use("torchvision", weights="none"))
            .prepare()
            .data
        )
        names = data.targets.names
        return {names[answer]: answer for answer in data.val.targets.tolist()}


def peers() -> list[Tuneforge]:
    """Return tuneforge, if it is installed."""
    try:
        import tuneforge.testing  # noqa: F401
    except ImportError:
        return []
    return [Tuneforge()]
