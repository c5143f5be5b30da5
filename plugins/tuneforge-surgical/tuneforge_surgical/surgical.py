"""The strategy `surgical`: train only the block of layers that a distribution shift concerns."""

from __future__ import annotations

from collections.abc import Iterable

from tuneforge import Phase, TaskInfo, UnknownNameError, component, ge, gt, hookimpl, option
from tuneforge.plugin import StrategyStep


@component(api=1)
class Surgical:
    """Train one block of layers; all other parameters stay frozen and bit-identical.

    Surgical fine-tuning (Lee et al. 2023, arXiv 2210.11466) minimizes the loss over the parameters of one block. The
    block depends on what has shifted: the first for inputs (noise, blur, another camera), one in the middle for
    features (other kinds of the same class), and the last, which is the head, for the meaning of labels. As in the
    authors' code, the learning rate is constant and the best epoch on validation is kept; 1e-3 is the middle of the
    learning rates that they search.

    Gradients through randomly initialized rows of the head are noise to the block, so the head then trains alone first
    and is frozen afterwards.
    """

    block: str | int = option(default="first", help="Block to train: first, last, or a layer group by name or index.")
    epochs: int = option(default=15, help="Number of epochs of the block.", check=ge(1))
    head_epochs: int = option(
        default=5, help="Number of epochs of the head before, if it has randomly initialized rows.", check=ge(1)
    )
    lr: float = option(default=1e-3, help="Learning rate.", check=gt(0))
    patience: int | None = option(
        default=None, help="Stop a phase after this many epochs without improvement.", check=ge(1)
    )
    restore_best: bool = option(default=True, help="Restore the weights of the best epoch at the end of each phase.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """Return a phase for the block, after one for the head if that is another group with randomly initialized rows.

        Raises:
            UnknownNameError: The model has no such block.
        """
        index = find_block_index(self.block, task)
        group = task.groups[index]
        phases = [self._make_phase(f"{group.name}-only", f"groups[{index}]", self.epochs)]
        if group is not task.head and has_random_head_rows(task):
            phases.insert(0, self._make_phase("new-head", "head", self.head_epochs))
        return phases

    def _make_phase(self, name: str, train: str, epochs: int) -> Phase:
        return Phase(
            name, train=train, epochs=epochs, lr=self.lr, patience=self.patience, restore_best=self.restore_best
        )


def has_random_head_rows(task: TaskInfo) -> bool:
    """Return True if a row of the head is randomly initialized: that of a new class, or any if there are no classes."""
    return not task.old_classes or set(task.old_classes) != set(task.classes)


def find_block_index(block: str | int, task: TaskInfo) -> int:
    """Return the index of a layer group, counted from the input; the name of a group takes precedence.

    Raises:
        UnknownNameError: There is no such group; the message lists the groups.
    """
    names = [group.name for group in task.groups]
    index_of = {str(index): index % len(names) for index in range(-len(names), len(names))}
    index_of |= {"first": 0, "last": len(names) - 1}
    index_of |= {name: index for index, name in enumerate(names)}
    if str(block) in index_of:
        return index_of[str(block)]
    raise UnknownNameError(
        f"the model has no block '{block}'",
        where="--strategy.block",
        why=f"its {len(names)} layer groups, from the input to the output, are {', '.join(names)}",
        fix=f"name one of them, first, last, or an index from 0 to {len(names) - 1}",
    )
