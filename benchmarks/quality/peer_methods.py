"""What a user would do instead: other libraries, each as its documentation shows, with its own defaults.

All see the same labels, the same tensors and a head with the same initial weights. Where a library has no default, it
gets what its documentation uses: the number of epochs is in `EPOCHS`. The batch size is 8 for all of them, Hugging
Face's default: with the 64 of fastai or the 128 of skorch five labels a class would be one step an epoch, and these
peers would look worse than they are. A library that needs a validation split gets `val`; the others train on all
labels.
"""

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import networks
import numpy as np
import torch
from numpy.typing import NDArray
from splits import LabeledRows
from store import TaskTensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH = 8

EPOCHS = {"lightning": 20, "fastai": 10, "hugging-face": 3, "skorch": 10, "plain-loop": 20}
"""Those of Hugging Face and skorch are their defaults. Lightning's callback unfreezes at epoch 10 and gets 20."""


@attrs.frozen(eq=False)
class Job:
    """What a method gets.

    Args:
        tensors: The task.
        rows: Labeled and tested rows.
        seed: For the head and the order of samples.
    """

    tensors: TaskTensors
    rows: LabeledRows
    seed: int

    def network(self) -> networks.PretrainedNetwork:
        """Build the pretrained network."""
        return networks.build(self.tensors.task.network, len(self.tensors.classes), self.seed)

    def pairs(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of rows."""
        return self.tensors.inputs[torch.from_numpy(rows)], torch.from_numpy(self.tensors.labels[rows])

    def loader(self, rows: NDArray[np.int64], *, shuffle: bool) -> DataLoader[Any]:
        """Return a loader of PyTorch with batches of 8."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(TensorDataset(*self.pairs(rows)), BATCH, shuffle=shuffle, generator=generator)


Predictions = NDArray[np.int64]

Method = Callable[[Job], Predictions]
"""Trains on a job's labels and returns the class of each test sample."""


@torch.inference_mode()
def predictions(network: nn.Module, job: Job) -> Predictions:
    """Return the classes that a network gives the test samples."""
    network.eval()
    inputs, _ = job.pairs(job.rows.test)
    found: Predictions = torch.cat([network(part).argmax(1) for part in inputs.split(64)]).numpy()
    return found


def logistic_regression(job: Job) -> Predictions:
    """scikit-learn's LogisticRegression on the features of the frozen backbone."""
    from sklearn.linear_model import LogisticRegression

    return _on_features(LogisticRegression(max_iter=1000), job)


def scaled_logistic_regression(job: Job) -> Predictions:
    """The same after StandardScaler, as scikit-learn's examples do it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return _on_features(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), job)


def _on_features(estimator: Any, job: Job) -> Predictions:
    features, labels = job.tensors.features.numpy(), job.tensors.labels
    estimator.fit(features[job.rows.labeled], labels[job.rows.labeled])
    found: Predictions = estimator.predict(features[job.rows.test])
    return found


def plain_loop(job: Job) -> Predictions:
    """A good loop by hand: AdamW, 1e-3 for the head and 1e-4 for the backbone, warm-up and cosine decay."""
    network = job.network()
    loader = job.loader(job.rows.labeled, shuffle=True)
    groups = [{"params": network.head.parameters(), "lr": 1e-3}, {"params": network.backbone.parameters(), "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = EPOCHS["plain-loop"] * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-3, 1e-4], total_steps=steps, pct_start=0.1)
    for _ in range(EPOCHS["plain-loop"]):
        network.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), labels).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return predictions(network, job)


def _lightning_module(job: Job) -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            network = job.network()
            self.backbone, self.head = network.backbone, network.head

        def forward(self, inputs: Tensor) -> Any:
            return self.head(self.backbone(inputs))

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            trained = [each for each in self.parameters() if each.requires_grad]
            return torch.optim.Adam(trained, lr=1e-3)

    return Module()


@contextmanager
def _lightning_trainer(**settings: Any) -> Any:
    from lightning.pytorch import Trainer

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:
        yield Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **settings,
        )


def lightning(job: Job) -> Predictions:
    """Lightning's BackboneFinetuning: the head alone for ten epochs, then everything."""
    from lightning.pytorch.callbacks import BackboneFinetuning

    module = _lightning_module(job)
    callbacks = [BackboneFinetuning()]
    with _lightning_trainer(max_epochs=EPOCHS["lightning"], callbacks=callbacks, enable_checkpointing=False) as trainer:
        trainer.fit(module, job.loader(job.rows.labeled, shuffle=True))
    return predictions(module, job)


def finetuning_scheduler(job: Job) -> Predictions:
    """finetuning-scheduler's callback with the schedule that it generates; each phase ends by early stopping."""
    from finetuning_scheduler import FinetuningScheduler

    module = _lightning_module(job)
    with _lightning_trainer(callbacks=[FinetuningScheduler()], max_epochs=200) as trainer:
        trainer.fit(module, job.loader(job.rows.train, shuffle=True), job.loader(job.rows.val, shuffle=False))
        best = trainer.checkpoint_callback.best_model_path
        if best:
            state = torch.load(best, weights_only=False)["state_dict"]  # noqa: TID251 - the library's own format
            module.load_state_dict(state)
        return predictions(module, job)


def fastai(job: Job) -> Predictions:
    """fastai's `fine_tune`: one epoch of the head, then ten of everything at rates that fall towards the input."""
    from fastai.callback import schedule  # noqa: F401 - gives Learner its method fine_tune
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader as FastaiLoader
    from fastai.learner import Learner
    from fastai.torch_core import params

    network = job.network()
    train, val = (TensorDataset(*job.pairs(rows)) for rows in (job.rows.train, job.rows.val))
    loaders = DataLoaders(FastaiLoader(train, bs=BATCH, shuffle=True), FastaiLoader(val, bs=BATCH))
    with TemporaryDirectory() as folder:
        learner = Learner(
            loaders,
            network,
            loss_func=nn.CrossEntropyLoss(),
            splitter=lambda net: [params(net.backbone), params(net.head)],
            path=folder,
        )
        with learner.no_bar(), learner.no_logging():
            learner.fine_tune(EPOCHS["fastai"])
    return predictions(network, job)


def hugging_face(job: Job) -> Predictions:
    """Hugging Face's Trainer with its default arguments: AdamW at 5e-5, 3 epochs, linear decay."""
    from transformers import Trainer, TrainingArguments

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = job.network()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.network(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Classifier()
    inputs, labels = job.pairs(job.rows.labeled)
    samples: Any = [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
            seed=job.seed, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=samples).train()
    return predictions(model.network, job)


def skorch(job: Job) -> Predictions:
    """skorch's NeuralNetClassifier with its defaults: SGD at 0.01, ten epochs."""
    from skorch import NeuralNetClassifier
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split

    x, y = job.pairs(job.rows.train)
    network = job.network()
    net = NeuralNetClassifier(
        network, criterion=nn.CrossEntropyLoss, batch_size=BATCH, iterator_train__shuffle=True, verbose=0,
        train_split=predefined_split(Dataset(*job.pairs(job.rows.val))),
    )  # fmt: skip
    net.fit(x, y)
    return predictions(net.module_, job)


PEERS: dict[str, tuple[Method, str]] = {
    "logistic-regression": (logistic_regression, "scikit-learn"),
    "scaled-logistic-regression": (scaled_logistic_regression, "scikit-learn"),
    "lightning": (lightning, "lightning"),
    "fastai": (fastai, "fastai"),
    "plain-loop": (plain_loop, "torch"),
    "skorch": (skorch, "skorch"),
    "hugging-face": (hugging_face, "transformers"),
    "finetuning-scheduler": (finetuning_scheduler, "finetuning-scheduler"),
}
"""Each peer, and the distribution whose version is recorded."""


def silence() -> None:
    """Turn off warnings about devices, workers and loggers, and what libraries report to their makers."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
