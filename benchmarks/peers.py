"""The same work in other libraries, each as its documentation shows, with its extras turned off.

No progress bar, no logger, no checkpoint. `installed` returns those that can be imported; nothing is installed.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Mapping
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from common import Entry
from raw import accuracy, loaders, optimizer_of
from torch import Tensor, nn
from torch.nn import functional as F
from work import Network, Split, Work


def installed() -> dict[str, Entry]:
    """Return the entries whose library can be imported; print the reason for others."""
    warnings.filterwarnings("ignore")  # about devices, workers and loggers that a benchmark does without
    found = {}
    for name, (module, entry) in LIBRARIES.items():
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - whatever another library raises, its row is left out
            click.echo(f"{name} is skipped: it cannot be imported ({error!r:.200})")
        else:
            found[name] = entry
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)  # once imported, which sets it
    return found


def accelerate(work: Work, network: Network) -> None:
    """Hugging Face Accelerate: its prepared model, optimizer and loaders in a hand-written loop."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, train, val = accelerator.prepare(network, optimizer_of(work, network), *loaders(work))
    for _ in range(work.epochs):
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
        accuracy(model, val)


def skorch(work: Work, network: Network) -> None:
    """Skorch's NeuralNetClassifier, validated on the given split."""
    from skorch import NeuralNetClassifier
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split

    optimizer_of(work, network)
    (x, y), (x_val, y_val) = work.train, work.val
    net = NeuralNetClassifier(
        network, criterion=nn.CrossEntropyLoss, max_epochs=work.epochs, batch_size=work.batch, lr=0.01,
        optimizer__momentum=0.9, iterator_train__shuffle=True, train_split=predefined_split(Dataset(x_val, y_val)),
        verbose=0,
    )  # fmt: skip
    net.fit(x, y)


def lightning(work: Work, network: Network, *, callbacks: tuple[Any, ...] = ()) -> None:
    """A LightningModule and the Trainer."""
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def training_step(self, batch: Split) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Split) -> None:
            self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(work, network)

    with TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=work.epochs, accelerator="cpu", logger=False, enable_checkpointing=bool(callbacks),
            callbacks=[*callbacks], enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Module(), *loaders(work))


def scheduler(work: Work, network: Network) -> None:
    """finetuning-scheduler in Lightning: a schedule of one phase."""
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

    trained = [f"net.{name}" for name, _ in network.named_parameters() if name.startswith("head") or not work.frozen]
    schedule = {0: {"params": trained, "max_transition_epoch": work.epochs}}
    callback = FinetuningScheduler(
        ft_schedule=schedule, epoch_transitions_only=True, restore_best=False, logging_level=logging.ERROR
    )
    lightning(work, network, callbacks=(callback, FTSCheckpoint(save_top_k=0)))  # it would bring one that saves


def fastai(work: Work, network: Network) -> None:
    """fastai's Learner, with frozen BatchNorm in eval mode, as in the other entries."""
    importlib.import_module("fastai.callback.progress")
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy as right
    from fastai.optimizer import SGD

    optimizer_of(work, network)
    learner = Learner(
        DataLoaders(*loaders(work)), network, loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=0.9), wd=0.0,
        metrics=right, train_bn=False,
        splitter=lambda model: [list(model.body.parameters()), list(model.head.parameters())],
    )  # fmt: skip
    if work.frozen:
        learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit(work.epochs, 0.01)


LIBRARIES: Mapping[str, tuple[str, Entry]] = {
    "accelerate": ("accelerate", accelerate),
    "skorch": ("skorch", skorch),
    "Lightning": ("lightning", lightning),
    "finetuning-scheduler": ("finetuning_scheduler", scheduler),
    "fastai": ("fastai.learner", fastai),
}
