"""The recipe of `recipe_plain_torch.py` as one command: the same network, data, optimizer, batches and epochs.

A run does what the plain script writes by hand: pretrained weights (the head keeps the rows of the ten digits by name),
validation in each epoch, eval mode, best weights restored, precision, recall and F1, a report.
"""

import shlex
import subprocess
import sys

COMMAND = (
    "tuneforge run --data digits --model digit-cnn --strategy full --strategy.epochs 10 --strategy.lr 0.01"
    " --schedule constant --optimizer sgd --optimizer.momentum 0.9 --batch-size 32"
)


def main() -> int:
    """Run the command, with further flags given to this script."""
    flags = shlex.split(COMMAND)[1:] + sys.argv[1:]
    print(COMMAND)
    return subprocess.run([sys.executable, "-m", "tuneforge", *flags], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
