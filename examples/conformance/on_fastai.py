"""fastai: `freeze`, `unfreeze` and `fit`, with `train_bn=False` and `BnFreeze`, which freezes BatchNorm statistics."""

import warnings
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import fastai
import torch
from case import Net, NotThereError, Plan, loaders
from fastai.callback.schedule import Learner  # with its schedules
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD, Adam
from torch import nn


class Fastai:
    """fastai's Learner; each phase is a call of `fit`."""

    name = "fastai"
    packages, command = ("fastai", "fastcore"), None

    def version(self) -> str:
        """Return the version of the package."""
        return str(fastai.__version__)

    def schedules(self) -> tuple[str, ...]:
        """Return its own schedules."""
        return ("fit_one_cycle", "fit_flat_cos")

    def learner(self, net: Net, plan: Plan, folder: Path) -> Any:
        """Return a learner with two parameter groups, or with one for each block."""

        def blocks(model: nn.Module) -> list[list[nn.Parameter]]:
            backbone = net.backbone
            apart = [backbone.stem, backbone.twins.one, backbone.twins.two, backbone.after, net.head]
            return [list(each.parameters()) for each in (apart if plan.apart else [backbone, net.head])]

        made = {"adamw": partial(Adam, eps=1e-8), "sgd": partial(SGD, mom=0.9)}[plan.optimizer]
        return Learner(
            DataLoaders(*loaders(plan)), torch.compile(net) if plan.compiled else net, path=folder, wd=plan.decay,
            loss_func=nn.CrossEntropyLoss(), opt_func=made, train_bn=False, splitter=blocks, cbs=BnFreeze(),
        )  # fmt: skip

    def fit(self, net: Net, plan: Plan, folder: Path, *, resume: bool = False) -> None:
        """Train phase after phase; a resume loads the last file, and `start_epoch` skips completed epochs."""
        learner = self.learner(net, plan, folder)
        phases = [(what, len(list(epochs))) for what, epochs in groupby(plan.phases)]
        number, done = self.found(folder) if resume else (0, 0)
        file = f"phase-{number}_{done - 1}" if done else ""
        if done == phases[number][1]:  # the phase is over; the next one begins with its weights
            number, done = number + 1, 0
        for place, (what, epochs) in enumerate(phases[number:], start=number):
            learner.unfreeze() if what == "all" else learner.freeze()
            if file:
                learner.load(file, with_opt=done > 0)
            saving = SaveModelCallback(every_epoch=True, with_opt=True, fname=f"phase-{place}")
            train = getattr(learner, plan.schedule or "fit")
            with learner.no_bar(), learner.no_logging():
                train(epochs, 0.01 if what == "head" else 0.005, cbs=saving, start_epoch=done)
            file, done = "", 0

    def found(self, folder: Path) -> tuple[int, int]:
        """Return the phase of the last file and its completed epochs."""
        files = sorted((folder / "models").glob("phase-*.pth"), key=lambda path: path.stat().st_mtime_ns)
        if not files:
            return 0, 0
        phase, _, epoch = files[-1].stem.removeprefix("phase-").partition("_")
        return int(phase), int(epoch) + 1

    def ranks(self, folder: Path) -> None:
        """It leaves this to accelerate, which has its own column."""
        raise NotThereError("left to Accelerate")

    def rates(self, net: Net, folder: Path) -> None:
        """Run `lr_find`."""
        learner = self.learner(net, Plan(), folder)
        with learner.no_bar():
            learner.lr_find(num_it=12, show_plot=False)

    def pattern(self, net: Net, folder: Path) -> str:
        """It names parameter groups by number."""
        raise NotThereError("freezes groups by number")

    def reasons(self, net: Net, folder: Path, *, asked: bool = False) -> None:
        """Use `EarlyStoppingCallback` with its defaults."""
        learner = self.learner(net, Plan(), folder)
        learner.freeze()
        stopping = EarlyStoppingCallback("valid_loss", min_delta=10.0, patience=1)
        with learner.no_bar(), learner.no_logging():
            learner.fit(5, 0.01, cbs=stopping)

    def folders(self, root: Path, val: str) -> dict[str, int]:
        """Row 16: `ImageDataLoaders.from_folder`; return the index of each class of the validation folder."""
        from fastai.vision.data import ImageDataLoaders

        found = ImageDataLoaders.from_folder(root, train="train", valid=val, bs=4, num_workers=0)
        answers = [int(answer) for _, batch in found.valid for answer in batch]
        return {path.parent.name: answer for path, answer in zip(found.valid_ds.items, answers, strict=True)}


def peers() -> list[Fastai]:
    """Return the library, if it is installed."""
    warnings.filterwarnings("ignore")  # about devices and workers that the case does without
    return [Fastai()]
