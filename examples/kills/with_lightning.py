"""Lightning: `ModelCheckpoint(every_n_train_steps=...)` and `ckpt_path="last"`, with a loader that can resume."""

import csv
import importlib.util
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from world import BATCH, DECAY, EPOCHS, LR, STEPS, Ended, Job, Net, train_set, val_set


class Module(pl.LightningModule):
    """The network in a LightningModule."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss, logged each step."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        """Log a metric of each epoch."""
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Return AdamW with a cosine schedule by step."""
        trained = [each for each in self.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Phases(BaseFinetuning):
    """The head first, then all layers."""

    def freeze_before_training(self, module: Module) -> None:
        """Freeze before the optimizer is built."""
        self.freeze(module.net.body, train_bn=False)

    def finetune_function(self, module: Module, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Unfreeze at the start of the second phase."""
        if epoch == EPOCHS // 2:
            self.unfreeze_and_add_param_group(module.net.body, optimizer, lr=LR / 2)


class RandomStates(Callback):
    """Saves the random states in the checkpoint, and restores them before the first batch."""

    def __init__(self) -> None:
        self.found: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of torch, numpy and Python."""
        kind, keys, *rest = np.random.get_state()
        numbers = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]  # what a load without pickled code takes
        return {"torch": torch.get_rng_state(), "numpy": numbers, "python": random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep them until the first batch, because the trainer draws numbers before it."""
        self.found = state

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Restore them before the loader starts, if the checkpoint is from the end of an epoch."""
        self.put_back()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Restore them after the loader has started, if the checkpoint is from the middle of an epoch."""
        if batch_idx > 0:
            self.put_back()
        self.found = None

    def put_back(self) -> None:
        """Restore what was loaded, if anything was."""
        if self.found is not None:
            kind, keys, *rest = self.found["numpy"]
            torch.set_rng_state(self.found["torch"])
            np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
            random.setstate(self.found["python"])


class Lightning:
    """Lightning without further callbacks."""

    name, each_step, freezes, log = "Lightning", True, True, "step"
    records: tuple[str, ...] = ("run/logs/",)

    def version(self) -> str:
        """Return the version of the package."""
        return str(pl.__version__)

    def callbacks(self, folder: Path, job: Job) -> list[Any]:
        """Return the checkpoint callback: the last ones by step, and `last.ckpt`."""
        found: list[Any] = [Phases()] if job.phases else []
        if job.interval is not None:
            saving = {"monitor": "step", "mode": "max", "save_top_k": job.keep, "save_last": True}
            found.append(ModelCheckpoint(folder, every_n_train_steps=job.interval, **saving))
        return found

    def fit(self, net: Net, folder: Path, job: Job, *, resume: bool) -> Ended:
        """Call `Trainer.fit`."""
        logger = CSVLogger(folder, name="logs", flush_logs_every_n_steps=1)
        trainer = pl.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=logger, log_every_n_steps=1,
            callbacks=self.callbacks(folder, job), enable_checkpointing=job.interval is not None,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        )  # fmt: skip
        train = (StatefulDataLoader if self.each_step else DataLoader)(train_set(), BATCH, shuffle=True)
        trainer.fit(Module(net), train, DataLoader(val_set(), BATCH), ckpt_path="last" if resume else None)
        return Ended(trainer.optimizers[0].state_dict(), self.logged(folder))

    def logged(self, folder: Path) -> list[int]:
        """Return the steps of all versions of the log."""
        found: list[int] = []
        for path in sorted(folder.glob("logs/version_*/metrics.csv")):
            with path.open() as file:
                found += [int(row["step"]) + 1 for row in csv.DictReader(file) if row.get("loss")]
        return found

    def newest(self, folder: Path) -> Path | None:
        """Return the checkpoint of `"last"`; the file of the same step is beside it."""
        return max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


class LightningAndRandomStates(Lightning):
    """With a callback for the random states."""

    name = "Lightning + random states"

    def callbacks(self, folder: Path, job: Job) -> list[Any]:
        """Return the callbacks, with that one."""
        return [RandomStates(), *super().callbacks(folder, job)]


class Scheduler(Lightning):
    """finetuning-scheduler: a schedule of two phases; its checkpoint is by epoch."""

    name, each_step, only_phases = "finetuning-scheduler", False, True

    def version(self) -> str:
        """Return the version of the package."""
        import finetuning_scheduler

        return str(finetuning_scheduler.__version__)

    def callbacks(self, folder: Path, job: Job) -> list[Any]:
        """Return phases by epoch, without restoring the best, so that every library takes the same steps."""
        from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

        schedule = {
            0: {"params": [r"net.head.*"], "max_transition_epoch": EPOCHS // 2},
            1: {"params": [r"net.body.*"], "lr": LR / 2, "max_transition_epoch": EPOCHS},
        }
        found: list[Any] = [RandomStates()]
        found += [FinetuningScheduler(ft_schedule=schedule, epoch_transitions_only=True, restore_best=False)]
        if job.interval is not None:
            keeping = {"save_top_k": job.keep, "save_last": True, "save_on_train_epoch_end": True}
            found.append(FTSCheckpoint(folder, monitor="val_loss", **keeping))
        return found


def tools() -> list[Lightning]:
    """Return both variants of Lightning, and finetuning-scheduler if it is installed."""
    warnings.filterwarnings("ignore")  # about workers and devices that the case does without
    installed = importlib.util.find_spec("finetuning_scheduler") is not None
    return [Lightning(), LightningAndRandomStates(), *([Scheduler()] if installed else [])]
