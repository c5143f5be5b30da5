"""skorch: `Freezer` and `Unfreezer` by name patterns, `Checkpoint` and `LoadInitState`."""

import warnings
from pathlib import Path
from typing import Any

import skorch
import torch
from case import BATCH, Net, NotThereError, Plan, samples
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint, EarlyStopping, Freezer, LoadInitState, LRScheduler, Unfreezer
from skorch.dataset import Dataset
from skorch.helper import predefined_split
from torch import nn

SCHEDULES: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 1},
    "CosineAnnealingLR": {"T_max": 3},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "OneCycleLR": {"max_lr": 0.01, "total_steps": 10, "step_every": "batch"},
    "ReduceLROnPlateau": {"monitor": "valid_loss"},
}


class Skorch:
    """skorch's classifier."""

    name = "skorch"
    packages, command = ("skorch",), None

    def version(self) -> str:
        """Return the version of the package."""
        return str(skorch.__version__)

    def schedules(self) -> tuple[str, ...]:
        """Return schedules of torch, through its `LRScheduler`."""
        return tuple(SCHEDULES)

    def classifier(self, net: Net, plan: Plan, callbacks: list[Any], *, epochs: int, verbose: int = 0) -> Any:
        """Return a classifier around the network, validated on the job's split."""
        groups = [(f"backbone.{name}*", {"lr": 0.005 / n}) for n, name in enumerate(("stem", "twins.one", "twins"), 1)]
        momentum = {"optimizer__momentum": 0.9} if plan.optimizer == "sgd" else {}
        more = {"verbose": verbose, "compile": plan.compiled, **momentum}
        return NeuralNetClassifier(
            net, criterion=nn.CrossEntropyLoss, max_epochs=epochs, lr=0.01, batch_size=BATCH, callbacks=callbacks,
            optimizer=torch.optim.SGD if plan.optimizer == "sgd" else torch.optim.AdamW,
            optimizer__weight_decay=plan.decay, iterator_train__shuffle=plan.shuffle,
            train_split=predefined_split(Dataset(*samples(24, seed=2))), **more,
            **({"optimizer__param_groups": groups} if plan.apart else {}),
        )  # fmt: skip

    def callbacks(self, plan: Plan) -> list[Any]:
        """Return callbacks that freeze and unfreeze where the phases change; epochs count from 1."""
        found: list[Any] = []
        for epoch, what in enumerate(plan.phases, start=1):
            if epoch == 1 or what != plan.phases[epoch - 2]:
                found.append((Freezer if what == "head" else Unfreezer)("backbone.*", at=epoch))
        if plan.schedule is not None:
            policy = getattr(torch.optim.lr_scheduler, plan.schedule)
            found.append(LRScheduler(policy, **SCHEDULES[plan.schedule]))
        return [(f"callback-{number}", each) for number, each in enumerate(found)]

    def fit(self, net: Net, plan: Plan, folder: Path, *, resume: bool = False) -> None:
        """Call `fit`; a resume starts from the checkpoint with `LoadInitState`, for the remaining epochs."""
        saving = Checkpoint(dirname=str(folder), monitor=None)
        last = [("saving", saving), *([("loading", LoadInitState(saving))] if resume else [])]
        done = 0
        if resume and (folder / "history.json").exists():
            done = len(skorch.history.History.from_file(str(folder / "history.json")))
        self.classifier(net, plan, [*self.callbacks(plan), *last], epochs=len(plan.phases) - done).fit(*samples())

    def ranks(self, folder: Path) -> None:
        """It leaves this to accelerate, which has its own column."""
        raise NotThereError("left to Accelerate")

    def rates(self, net: Net, folder: Path) -> None:
        """It has no learning-rate finder."""
        raise NotThereError("has no finder")

    def pattern(self, net: Net, folder: Path) -> str:
        """Use a `Freezer` whose pattern matches nothing."""
        self.classifier(net, Plan(), [Freezer("backbon.*")], epochs=1).fit(*samples())
        return "ignored in silence"

    def reasons(self, net: Net, folder: Path, *, asked: bool = False) -> None:
        """Use `EarlyStopping` with its defaults."""
        stopping = EarlyStopping(patience=1, threshold=10.0, threshold_mode="abs")
        self.classifier(net, Plan(), [Freezer("backbone.*"), stopping], epochs=5, verbose=1).fit(*samples())


def peers() -> list[Skorch]:
    """Return the library, if it is installed."""
    warnings.filterwarnings("ignore")  # about what the case does without
    return [Skorch()]
