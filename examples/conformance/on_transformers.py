"""transformers' Trainer around a plain module: `save_steps=1`, `resume_from_checkpoint`; it does not freeze."""

import warnings
from pathlib import Path
from typing import Any

import transformers
from case import BATCH, Net, NotThereError, Plan, optimizer_of, samples
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class Named(Dataset[Any]):
    """Samples by the names of the model's arguments."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"inputs": self.x[row], "labels": self.y[row]}


class WithLoss(nn.Module):
    """The network as the Trainer calls it."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits."""
        logits = self.net(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class InOrder(Trainer):
    """Samples in order, if the plan does not shuffle."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)


class Transformers:
    """The Trainer."""

    name, freezes = "transformers' Trainer", False
    packages, command = ("transformers",), "transformers.cli.transformers:main"

    def version(self) -> str:
        """Return the version of the package."""
        return str(transformers.__version__)

    def schedules(self) -> tuple[str, ...]:
        """Return its own names."""
        return ("linear", "cosine", "polynomial", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")

    def trainer(self, net: Net, plan: Plan, folder: Path, **given: Any) -> Trainer:
        """Return a trainer that saves after each step."""
        callbacks = given.pop("callbacks", [])
        settings = {
            "num_train_epochs": len(plan.phases), "save_steps": 1, "eval_strategy": "epoch", "logging_steps": 1,
            "lr_scheduler_type": plan.schedule or "constant", **given,
        }  # fmt: skip
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=BATCH, learning_rate=0.01, seed=0, data_seed=0,
            use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        own = (None, None) if plan.schedule else (optimizer_of(plan, net.parameters()), None)
        return (Trainer if plan.shuffle else InOrder)(
            WithLoss(net), arguments, train_dataset=Named(*samples()), eval_dataset=Named(*samples(24, seed=2)),
            callbacks=callbacks, optimizers=own,
        )  # fmt: skip

    def fit(self, net: Net, plan: Plan, folder: Path, *, resume: bool = False) -> None:
        """Call `Trainer.train`."""
        newest = get_last_checkpoint(str(folder)) if resume else None
        self.trainer(net, plan, folder).train(resume_from_checkpoint=newest)

    def rates(self, net: Net, folder: Path) -> None:
        """It has no learning-rate finder."""
        raise NotThereError("has no finder")

    def reasons(self, net: Net, folder: Path, *, asked: bool = False) -> None:
        """Use `EarlyStoppingCallback` with its defaults."""
        stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_strategy": "epoch"}
        plan = Plan(phases=("all",) * 6)
        self.trainer(net, plan, folder, callbacks=[stopping], **best).train()


def peers() -> list[Transformers]:
    """Return the library, if it is installed."""
    warnings.filterwarnings("ignore")
    return [Transformers()]
