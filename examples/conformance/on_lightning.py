"""Lightning with a `BaseFinetuning` callback, as its documentation shows it; and finetuning-scheduler."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from case import BATCH, Fails, Net, NotThereError, Plan, loaders, network, optimizer_of, seeded
from lightning import pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from rows import equal_states
from torch import Tensor
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torchdata.stateful_dataloader import StatefulDataLoader

SCHEDULES: dict[str, Any] = {
    "StepLR": lambda optimizer: {"scheduler": lr_scheduler.StepLR(optimizer, 1)},
    "CosineAnnealingLR": lambda optimizer: {"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, 3)},
    "LambdaLR": lambda optimizer: {"scheduler": lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)},
    "OneCycleLR": lambda optimizer: {
        "scheduler": lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10),
        "interval": "step",
    },
    "ReduceLROnPlateau": lambda optimizer: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(optimizer),
        "monitor": "val_loss",
    },
}
RANKS_S = 180


class Module(pl.LightningModule):
    """The network in a LightningModule."""

    def __init__(self, net: Net, plan: Plan) -> None:
        super().__init__()
        self.net, self.plan, self.lr = net, plan, 0.01

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log the metric that schedules and early stopping monitor."""
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return an optimizer of what requires a gradient, as the callback's documentation asks."""
        optimizer = optimizer_of(self.plan, filter(lambda each: each.requires_grad, self.parameters()))
        if self.plan.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": SCHEDULES[self.plan.schedule](optimizer)}


class Phases(BaseFinetuning):
    """Freeze the backbone with its BatchNorm, and unfreeze it at the boundary."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def freeze_before_training(self, module: Module) -> None:
        """Freeze before the optimizer is built."""
        self.freeze(module.net.backbone, train_bn=False)

    def finetune_function(self, module: Module, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Unfreeze at the start of the second phase."""
        phases = self.plan.phases
        if epoch == 0 or phases[epoch] == phases[epoch - 1]:
            return
        if phases[epoch] == "head":
            self.freeze(module.net.backbone, train_bn=False)
            return
        backbone = module.net.backbone
        blocks = [backbone.stem, backbone.twins.one, backbone.twins.two, backbone.after]
        for place, block in enumerate(blocks if self.plan.apart else [backbone]):
            self.unfreeze_and_add_param_group(block, optimizer, lr=0.005 / (place + 1))


class Lightning:
    """Lightning without further callbacks."""

    name = "Lightning"
    packages: tuple[str, ...] = ("lightning", "lightning_fabric")
    command: str | None = "lightning.fabric.cli:_main"

    def version(self) -> str:
        """Return the version of the package."""
        return str(pl.__version__)

    def schedules(self) -> tuple[str, ...]:
        """Return schedules of torch."""
        return tuple(SCHEDULES)

    def callbacks(self, plan: Plan, folder: Path) -> list[Any]:
        """Return callbacks that freeze, and checkpoints after each step and each epoch."""
        each_step = ModelCheckpoint(folder, "step-{step}", every_n_train_steps=1, save_top_k=-1)
        each_epoch = ModelCheckpoint(folder, "epoch-{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        return [Phases(plan), each_step, each_epoch]

    def fit(self, net: Net, plan: Plan, folder: Path, *, resume: bool = False) -> None:
        """Call `Trainer.fit`, with the newest checkpoint's path to resume."""
        module = Module(net, plan)
        files = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        newest = str(files[-1]) if resume and files else None
        trainer = self.trainer(folder, self.callbacks(plan, folder), epochs=len(plan.phases))
        train, val = loaders(plan)
        loader = StatefulDataLoader(train.dataset, BATCH, shuffle=plan.shuffle)
        trainer.fit(torch.compile(module) if plan.compiled else module, loader, val, ckpt_path=newest)

    def trainer(self, folder: Path, callbacks: list[Any], *, epochs: int, **given: Any) -> pl.Trainer:
        """Return a trainer without a progress bar."""
        settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, **given}
        return pl.Trainer(
            max_epochs=epochs, default_root_dir=folder, callbacks=callbacks, enable_model_summary=False,
            num_sanity_val_steps=0, **settings,
        )  # fmt: skip

    def ranks(self, folder: Path) -> None:
        """Run two processes with strategy `ddp`, then with the one that finds unused parameters."""
        said = []
        for strategy in ("ddp", "ddp_find_unused_parameters_true"):
            place = folder / strategy
            place.mkdir()
            if not (verdict := self.one_of_ranks(strategy, place)):
                return
            said.append(f"{strategy}: {verdict}")
        raise Fails("; ".join(said))

    def one_of_ranks(self, strategy: str, folder: Path) -> str:
        """Return what goes wrong with a strategy; empty if nothing does."""
        command = [sys.executable, __file__, self.name, strategy, str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=RANKS_S, check=False)
        except subprocess.TimeoutExpired:
            return "hangs"
        files = sorted(folder.glob("rank-*.pt"))
        if done.returncode or len(files) != 2:
            return f"stops: {(done.stderr.strip().splitlines() or ['?'])[-1][:90]}"
        one, two = (torch.load(path) for path in files)  # noqa: TID251 - of our own, a moment ago
        if torch.equal(one["backbone.stem.0.weight"], network().backbone.stem[0].weight):
            return "what unfreezes never trains"
        differing = equal_states(one, two)
        return f"the ranks drift apart in {len(differing)} tensors" if differing else ""

    def rank(self, strategy: str, folder: Path) -> None:
        """Run one rank."""
        seeded()
        plan, net = Plan(), network()
        trainer = self.trainer(
            folder, self.callbacks(plan, folder), epochs=len(plan.phases), devices=2, strategy=strategy
        )
        trainer.fit(Module(net, plan), *loaders(plan))
        parameters = {name: each.detach().clone() for name, each in net.named_parameters()}
        torch.save(parameters, folder / f"rank-{trainer.global_rank}.pt")  # noqa: TID251 - read back by `ranks`

    def rates(self, net: Net, folder: Path) -> None:
        """Run `Tuner.lr_find`."""
        plan = Plan()
        module = Module(net, plan)
        trainer = self.trainer(folder, [], epochs=3, enable_checkpointing=False)
        Tuner(trainer).lr_find(module, *loaders(plan), num_training=12)

    def pattern(self, net: Net, folder: Path) -> str:
        """It names modules, not patterns."""
        raise NotThereError("freezes modules, not patterns")

    def reasons(self, net: Net, folder: Path, *, asked: bool = False) -> None:
        """Use `EarlyStopping` with its defaults, or verbose."""
        plan = Plan(phases=("head", *["all"] * 5))
        stopping = EarlyStopping("val_loss", min_delta=10.0, patience=1, verbose=asked)
        trainer = self.trainer(folder, [Phases(plan), stopping], epochs=6, enable_checkpointing=False)
        trainer.fit(Module(net, plan), *loaders(plan))


class Scheduler(Lightning):
    """finetuning-scheduler: a schedule of two phases by regular expressions."""

    name = "finetuning-scheduler"
    freezes_again = False
    packages = ("lightning", "lightning_fabric", "finetuning_scheduler")
    command = None

    def version(self) -> str:
        """Return the version of the package."""
        import finetuning_scheduler

        return str(finetuning_scheduler.__version__)

    def callbacks(self, plan: Plan, folder: Path) -> list[Any]:
        """Return phases by epoch, and its checkpoint callback, which saves once per epoch."""
        from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

        schedule = _two_phases(plan)
        scheduler = FinetuningScheduler(
            ft_schedule=schedule, epoch_transitions_only=True, restore_best=False,
            frozen_bn_track_running_stats=False,  # with True the statistics of frozen BatchNorm change too
        )  # fmt: skip
        return [scheduler, FTSCheckpoint(folder, monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=True)]

    def pattern(self, net: Net, folder: Path) -> str:
        """Use a schedule whose expression matches nothing."""
        from finetuning_scheduler import FinetuningScheduler

        plan = Plan()
        schedule = _two_phases(plan)
        schedule[1]["params"] = [r"net.backbon\..*"]
        callback = FinetuningScheduler(ft_schedule=schedule, epoch_transitions_only=True, restore_best=False)
        self.trainer(folder, [callback], epochs=2).fit(Module(net, plan), *loaders(plan))
        return ""

    def reasons(self, net: Net, folder: Path, *, asked: bool = False) -> None:
        """Use phases that end on early stopping, its default."""
        from finetuning_scheduler import FinetuningScheduler, FTSEarlyStopping

        schedule = {0: {"params": [r"net.head.*"]}, 1: {"params": [r"net.backbone.*"], "lr": 0.005}}
        stopping = FTSEarlyStopping("val_loss", min_delta=10.0, patience=1, verbose=asked)
        callbacks = [FinetuningScheduler(ft_schedule=schedule), stopping]
        self.trainer(folder, callbacks, epochs=12).fit(Module(net, Plan()), *loaders(Plan()))


def _two_phases(plan: Plan) -> dict[int, dict[str, Any]]:
    """Return a schedule: the head until the boundary, then all layers."""
    border, end = plan.phases.index("all"), len(plan.phases)
    return {
        0: {"params": [r"net.head.*"], "max_transition_epoch": border},
        1: {"params": [r"net.backbone.*"], "lr": 0.005, "max_transition_epoch": end},
    }


def peers() -> list[Lightning]:
    """Return those that are installed."""
    warnings.filterwarnings("ignore")  # about workers, loggers and devices that the case does without
    found: list[Lightning] = [Lightning()]
    try:
        import finetuning_scheduler  # noqa: F401
    except ImportError:
        return found
    return [*found, Scheduler()]


if __name__ == "__main__":
    logging.disable(logging.INFO)
    (asked,) = (each for each in peers() if each.name == sys.argv[1])
    asked.rank(sys.argv[2], Path(sys.argv[3]))
