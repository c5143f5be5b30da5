"""accelerate: a hand-written loop with `save_state`, `load_state`, `skip_first_batches`; it does not freeze."""

import warnings
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from case import STEPS_AN_EPOCH, Net, NotThereError, Plan, loaders, optimizer_of
from torch.nn import functional as F
from torch.optim import lr_scheduler

SCHEDULES: dict[str, Any] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 1),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 9),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10),
}


class Progress:
    """The number of completed steps, registered for checkpointing."""

    done = 0

    def state_dict(self) -> dict[str, int]:
        """Return the state for the checkpoint."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Load the state."""
        self.done = state["done"]


class Accelerate:
    """The loop of its guide, with its seedable sampler."""

    name, freezes = "accelerate", False
    packages, command = ("accelerate",), "accelerate.commands.accelerate_cli:main"

    def version(self) -> str:
        """Return the version of the package."""
        return str(accelerate.__version__)

    def schedules(self) -> tuple[str, ...]:
        """Return schedules of torch."""
        return tuple(SCHEDULES)

    def fit(self, net: Net, plan: Plan, folder: Path, *, resume: bool = False) -> None:
        """Run the loop, with a checkpoint after each step."""
        project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
        loading = DataLoaderConfiguration(use_seedable_sampler=True)
        accelerator = Accelerator(cpu=True, project_config=project, dataloader_config=loading)
        optimizer = optimizer_of(plan, net.parameters())
        schedule = SCHEDULES[plan.schedule](optimizer) if plan.schedule else lr_scheduler.ConstantLR(optimizer, 1.0)
        prepared: Any = accelerator.prepare(net, optimizer, loaders(plan)[0], schedule)
        model, optimizer, train, schedule = prepared
        progress = Progress()
        accelerator.register_for_checkpointing(progress)
        if resume and (folder / "checkpoints").exists():
            accelerator.load_state()
            accelerator.project_configuration.iteration = progress.done
        for epoch in range(progress.done // STEPS_AN_EPOCH, len(plan.phases)):
            train.set_epoch(epoch)
            model.train()
            skipped = progress.done % STEPS_AN_EPOCH
            for x, y in accelerator.skip_first_batches(train, skipped) if skipped else train:
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                schedule.step()
                progress.done += 1
                accelerator.save_state()

    def rates(self, net: Net, folder: Path) -> None:
        """It has no learning-rate finder."""
        raise NotThereError("has no finder")

    def reasons(self, net: Net, folder: Path, *, asked: bool = False) -> None:
        """The loop is the user's, so there is nothing to test."""
        raise NotThereError("its loop is the user's")


def peers() -> list[Accelerate]:
    """Return the library, if it is installed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    return [Accelerate()]
