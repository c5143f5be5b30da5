"""accelerate: a hand-written loop with `save_state`, `load_state` and `skip_first_batches`, as its guide shows."""

import warnings
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from world import BATCH, DECAY, EPOCHS, LR, STEPS, STEPS_AN_EPOCH, Ended, Job, Net, train_set, val_set


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

    own_generator = False
    name, each_step, freezes, log = "accelerate", True, False, ""
    records: tuple[str, ...] = ()

    def version(self) -> str:
        """Return the version of the package."""
        return str(accelerate.__version__)

    def fit(self, net: Net, folder: Path, job: Job, *, resume: bool) -> Ended:
        """Run the loop."""
        project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=job.keep)
        loading = DataLoaderConfiguration(use_seedable_sampler=True)
        accelerator = Accelerator(cpu=True, project_config=project, dataloader_config=loading)
        optimizer: Any = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAY)
        schedule: Any = lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        generator = torch.Generator().manual_seed(0) if self.own_generator else None
        train: Any = DataLoader(train_set(), BATCH, shuffle=True, generator=generator)
        val: Any = DataLoader(val_set(), BATCH)
        model, optimizer, train, val, schedule = accelerator.prepare(net, optimizer, train, val, schedule)
        progress = Progress()
        accelerator.register_for_checkpointing(progress)
        if resume:
            accelerator.load_state()
            accelerator.project_configuration.iteration = progress.done // (job.interval or 1)
        for epoch in range(progress.done // STEPS_AN_EPOCH, EPOCHS):
            train.set_epoch(epoch)
            model.train()
            skipped = progress.done % STEPS_AN_EPOCH
            for x, y in accelerator.skip_first_batches(train, skipped) if skipped else train:
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                schedule.step()
                progress.done += 1
                if job.interval is not None and progress.done % job.interval == 0:
                    accelerator.save_state()
            self.validate(model, val)
        return Ended(optimizer.state_dict(), None)

    def validate(self, model: nn.Module, val: Any) -> None:
        """Validate after each epoch."""
        model.eval()
        with torch.no_grad():
            for x, _ in val:
                model(x)

    def newest(self, folder: Path) -> Path | None:
        """Return the folder with the largest number."""
        found = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("_")[2]))
        return found[-1] if found else None


class AccelerateAndGenerator(Accelerate):
    """With a generator for the loader, so that starting a loader does not draw from torch's generator."""

    name, own_generator = "accelerate + loader's generator", True


def tools() -> list[Accelerate]:
    """Return both variants."""
    warnings.filterwarnings("ignore")
    return [Accelerate(), AccelerateAndGenerator()]
