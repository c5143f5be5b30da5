"""transformers' Trainer: `save_steps` and `resume_from_checkpoint=True`."""

import warnings
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from world import BATCH, DECAY, EPOCHS, LR, Ended, Job, Net, samples


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


class Transformers:
    """The Trainer around a plain module."""

    name, each_step, freezes, log = "transformers' Trainer", True, False, "step"
    records: tuple[str, ...] = ()

    def version(self) -> str:
        """Return the version of the package."""
        return str(transformers.__version__)

    def fit(self, net: Net, folder: Path, job: Job, *, resume: bool) -> Ended:
        """Call `Trainer.train`."""
        saving: dict[str, Any] = {"save_strategy": "no"}
        if job.interval is not None:
            saving = {"save_strategy": "steps", "save_steps": job.interval, "save_total_limit": job.keep}
        arguments = TrainingArguments(
            output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=LR,
            weight_decay=DECAY, lr_scheduler_type="cosine", logging_steps=1, eval_strategy="epoch", seed=0, data_seed=0,
            use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **saving,
        )  # fmt: skip
        trainer = Trainer(
            WithLoss(net), arguments, train_dataset=Named(*samples()), eval_dataset=Named(*samples(24, 2))
        )
        trainer.train(resume_from_checkpoint=resume)
        optimizer: Any = trainer.optimizer
        return Ended(optimizer.state_dict(), [row["step"] for row in trainer.state.log_history if "loss" in row])

    def newest(self, folder: Path) -> Path | None:
        """Return the folder with the largest number."""
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        return found[-1] if found else None


def tools() -> list[Transformers]:
    """Return the library, if it can be imported."""
    warnings.filterwarnings("ignore")
    return [Transformers()]
