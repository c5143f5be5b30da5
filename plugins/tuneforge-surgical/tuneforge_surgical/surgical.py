"""`surgical`: tune the one block that the shift of the data concerns, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from tuneforge import Phase, TaskInfo, UnknownNameError, component, ge, gt, hookimpl, option
from tuneforge.plugin import StrategyStep


@component(api=1)
class Surgical:
    """Tune one block of layers; every other parameter stays as it was pretrained, to the bit.

    Surgical fine-tuning (Lee et al. 2023, arXiv 2210.11466): minimise the loss over the parameters of one block alone.
    The block follows from what has shifted: the first for inputs (noise, blur, another camera), one in the middle for
    features (other kinds of the same class), the last, which is the head, for what answers mean. As in the authors'
    code, the rate is constant and the best epoch on validation is kept; 1e-3 is the middle of the rates they search.

    A head with fresh rows would give the block nothing to go by: then the head alone trains first, and is frozen after.
    """

    block: str | int = option(default="first", help="What is tuned: first, last, or a layer group by name or index.")
    epochs: int = option(default=15, help="Epochs with the block trained.", check=ge(1))
    head_epochs: int = option(default=5, help="Epochs of the head before, where it has fresh rows.", check=ge(1))
    lr: float = option(default=1e-3, help="Learning rate.", check=gt(0))
    patience: int | None = option(default=None, help="Stop a phase after this many epochs without gain.", check=ge(1))
    restore_best: bool = option(default=True, help="End each phase on the weights of its best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """One phase over the block, after one over the head if the block is not the head and the head has fresh rows.

        Raises:
            UnknownNameError: The model has no such block.
        """
        index = find_block_index(self.block, task)
        group = task.groups[index]
        phases = [self._make_phase(f"{group.name}-only", f"groups[{index}]", self.epochs)]
        if group is not task.head and has_random_head_rows(task):
            phases.insert(0, self._make_phase("fresh-head", "head", self.head_epochs))
        return phases

    def _make_phase(self, name: str, train: str, epochs: int) -> Phase:
        return Phase(
            name, train=train, epochs=epochs, lr=self.lr, patience=self.patience, restore_best=self.restore_best
        )


def has_random_head_rows(task: TaskInfo) -> bool:
    """True where the head has a row that did not come with the model: that of a class new to it, or any at all."""
    return not task.old_classes or set(task.old_classes) != set(task.classes)


def find_block_index(block: str | int, task: TaskInfo) -> int:
    """Which layer group `block` is, counted from the input; a group's own name beats the other ways to say it.

    Raises:
        UnknownNameError: None of them; the message lists the groups.
    """
    names = [group.name for group in task.groups]
    said = {str(index): index % len(names) for index in range(-len(names), len(names))}
    said |= {"first": 0, "last": len(names) - 1}
    said |= {name: index for index, name in enumerate(names)}
    if str(block) in said:
        return said[str(block)]
    raise UnknownNameError(
        f"the model has no block '{block}'",
        where="--strategy.block",
        why=f"its {len(names)} layer groups, from the input to the answer, are {', '.join(names)}",
        fix=f"name one of them, first, last, or an index from 0 to {len(names) - 1}",
    )
