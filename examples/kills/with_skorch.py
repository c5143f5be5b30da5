"""skorch: `Checkpoint` and `LoadInitState`: it saves between epochs."""

import warnings
from pathlib import Path
from typing import Any

import skorch
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint, Freezer, LoadInitState, LRScheduler, Unfreezer
from skorch.dataset import Dataset
from skorch.helper import predefined_split
from torch import nn
from world import BATCH, DECAY, EPOCHS, LR, STEPS, Ended, Job, Net, samples


class Skorch:
    """skorch's classifier."""

    name, each_step, freezes, log = "skorch", False, True, "epoch"
    records: tuple[str, ...] = ()

    def version(self) -> str:
        """Return the version of the package."""
        return str(skorch.__version__)

    def fit(self, net: Net, folder: Path, job: Job, *, resume: bool) -> Ended:
        """Call `fit`; a resume starts from the checkpoint with `LoadInitState`, for the remaining epochs."""
        policy = torch.optim.lr_scheduler.CosineAnnealingLR
        callbacks: list[Any] = [("schedule", LRScheduler(policy, T_max=STEPS, step_every="batch"))]
        if job.phases:
            callbacks += [("freeze", Freezer("body.*", at=1)), ("unfreeze", Unfreezer("body.*", at=EPOCHS // 2 + 1))]
        saving = Checkpoint(dirname=str(folder), monitor=None)
        callbacks += [("saving", saving)] if job.interval is not None else []
        resume, done = resume and (folder / "history.json").exists(), 0
        if resume:
            done = len(skorch.history.History.from_file(str(folder / "history.json")))
            callbacks += [("loading", LoadInitState(saving))]
        classifier: Any = NeuralNetClassifier(
            net, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, optimizer__weight_decay=DECAY, lr=LR,
            batch_size=BATCH, iterator_train__shuffle=True, max_epochs=EPOCHS - done, callbacks=callbacks, verbose=0,
            train_split=predefined_split(Dataset(*samples(24, 2))),
        )  # fmt: skip
        classifier.fit(*samples())
        return Ended(classifier.optimizer_.state_dict(), [row["epoch"] for row in classifier.history])

    def newest(self, folder: Path) -> Path | None:
        """Return the only checkpoint: the whole folder."""
        return folder if any(folder.iterdir()) else None


def tools() -> list[Skorch]:
    """Return the library, if it can be imported."""
    warnings.filterwarnings("ignore")
    return [Skorch()]
