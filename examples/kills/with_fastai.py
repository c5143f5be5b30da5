"""fastai: `SaveModelCallback(every_epoch=True, with_opt=True)`, `load` and `start_epoch`: it saves between epochs."""

import csv
import warnings
from functools import partial
from pathlib import Path

import fastai
import torch
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import Learner  # with its schedules
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import DataLoader
from world import BATCH, DECAY, EPOCHS, LR, Ended, Job, Net, train_set, val_set


class Fastai:
    """fastai's Learner; each phase is a call of `fit_one_cycle`, and the script counts them."""

    deletes = False
    name, each_step, freezes, log = "fastai", False, True, "epoch"
    records: tuple[str, ...] = ()

    def version(self) -> str:
        """Return the version of the package."""
        return str(fastai.__version__)

    def fit(self, net: Net, folder: Path, job: Job, *, resume: bool) -> Ended:
        """Train phase after phase; a resume loads the last file, and `start_epoch` skips completed epochs."""
        loaders = DataLoaders(DataLoader(train_set(), BATCH, shuffle=True), DataLoader(val_set(), BATCH))
        learner = Learner(
            loaders, net, loss_func=nn.CrossEntropyLoss(), path=folder, wd=DECAY, train_bn=False,
            opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=BnFreeze() if job.phases else None,
            splitter=lambda model: [list(model.body.parameters()), list(model.head.parameters())],
        )  # fmt: skip
        phases = [("head", EPOCHS // 2), ("all", EPOCHS // 2)] if job.phases else [("all", EPOCHS)]
        number, done = self.found(folder) if resume else (0, 0)
        file = f"phase-{number}_{done - 1}" if done else ""
        if done == phases[number][1]:  # the phase is over; the next one begins with its weights
            number, done = number + 1, 0
        log = resume
        for place, (what, epochs) in enumerate(phases[number:], start=number):
            learner.unfreeze() if what == "all" else learner.freeze()
            if file:
                learner.load(file, with_opt=done > 0)
            saving = SaveModelCallback(every_epoch=True, with_opt=True, fname=f"phase-{place}")
            kept = [CSVLogger(append=log), *([saving] if job.interval is not None else [])]
            with learner.no_bar():
                learner.fit_one_cycle(epochs, LR if what == "head" else LR / 2, cbs=kept, start_epoch=done)
            file, done, log = "", 0, True
        return Ended(learner.opt.state_dict(), self.logged(folder, phases[0][1]))

    def found(self, folder: Path) -> tuple[int, int]:
        """Return the phase of the last file and its completed epochs."""
        files = sorted((folder / "models").glob("phase-*.pth"), key=lambda path: path.stat().st_mtime_ns)
        if not files:
            return 0, 0
        phase, _, epoch = files[-1].stem.removeprefix("phase-").partition("_")
        return int(phase), int(epoch) + 1

    def logged(self, folder: Path, first: int) -> list[int]:
        """Return the epochs of the log, counted over both phases.

        Each call of `fit` writes a header; epochs that `start_epoch` skips have a line without
        values, which is ignored.
        """
        found: list[int] = []
        with (folder / "history.csv").open() as file:
            rows = [row[0] for row in csv.reader(file) if len(row) > 2 and row[0].isdigit()]
        for place, epoch in enumerate(map(int, rows)):
            later = first < EPOCHS and place > 0 and (found[-1] >= first or epoch < int(rows[place - 1]))
            found.append(epoch + 1 + (first if later else 0))
        return found

    def newest(self, folder: Path) -> Path | None:
        """Return the last file."""
        found = (folder / "models").glob("phase-*.pth")
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def tools() -> list[Fastai]:
    """Return the library, if it can be imported."""
    warnings.filterwarnings("ignore")
    return [Fastai()]
