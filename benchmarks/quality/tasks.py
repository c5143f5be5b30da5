"""The tasks and cells, and which are for choosing and which for reporting.

The division was written down before any result was seen: the data on which the default run was developed is in the
choosing half. No source of data is on both sides. Whoever changes a default of tuneforge looks at the choosing half
only.
"""

from pathlib import Path

import attrs
import sources
from splits import Cell

NUM_SPLITS = 5


@attrs.frozen
class Task:
    """Real data and a network with real pretrained weights.

    Args:
        name: Data and network.
        read: Reads the samples.
        network: `lite0`, `lite1`, `lite2`, `digit-cnn` or `minilm`.
        size: Height and width of images, in pixels; of texts, tokens.
        test_per_class: At most so many test samples of each class.
        reported: Whether it belongs to the reporting half.
    """

    name: str
    read: sources.Reader
    network: str
    size: int
    test_per_class: int
    reported: bool

    def examples(self, root: Path) -> sources.Examples:
        """Read the samples from below `root`."""
        return self.read(root, self.size)


TASKS = {
    task.name: task
    for task in (
        Task("photographs-lite0", sources.photographs, "lite0", 96, 11, reported=False),
        Task("digits-cnn", sources.handwritten_digits, "digit-cnn", 32, 40, reported=False),
        Task("packages-minilm", sources.package_descriptions, "minilm", 24, 40, reported=False),
        Task("fashion-lite2", sources.fashion, "lite2", 64, 25, reported=False),
        Task("fashion-cnn", sources.fashion, "digit-cnn", 32, 40, reported=False),
        Task("emoji-lite1", sources.emoji, "lite1", 96, 25, reported=True),
        Task("letters-cnn", sources.letters, "digit-cnn", 32, 40, reported=True),
        Task("clip-art-lite0", sources.clip_art, "lite0", 96, 25, reported=True),
        Task("scripts-cnn", sources.scripts, "digit-cnn", 32, 40, reported=True),
        Task("fortunes-minilm", sources.fortunes, "minilm", 32, 30, reported=True),
    )
}

CELLS = (
    Cell("photographs-lite0", 5),
    Cell("photographs-lite0", 20),
    Cell("digits-cnn", 5),
    Cell("digits-cnn", 100, imbalanced=True),
    Cell("packages-minilm", 5),
    Cell("packages-minilm", 20, imbalanced=True),
    Cell("fashion-lite2", 5),
    Cell("fashion-lite2", 20),
    Cell("fashion-cnn", 20),
    Cell("fashion-cnn", 100, imbalanced=True),
    Cell("emoji-lite1", 5),
    Cell("emoji-lite1", 20, imbalanced=True),
    Cell("letters-cnn", 20),
    Cell("letters-cnn", 100),
    Cell("clip-art-lite0", 5),
    Cell("clip-art-lite0", 20, imbalanced=True),
    Cell("scripts-cnn", 5),
    Cell("scripts-cnn", 100),
    Cell("fortunes-minilm", 5),
    Cell("fortunes-minilm", 20),
)


def cells(half: str) -> tuple[Cell, ...]:
    """Return the cells of `choosing`, `reporting` or `all`."""
    return tuple(cell for cell in CELLS if half == "all" or TASKS[cell.task].reported == (half == "reporting"))
