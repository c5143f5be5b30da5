"""The time of `tuneforge --help` and `plugins list` beside `python -c "import click"`, interleaved.

python benchmarks/startup.py --runs 15
"""

import os
import platform
import statistics
import subprocess
import sys
import time

import click

COMMANDS = {
    'python -c "import click"': [sys.executable, "-c", "import click"],
    "tuneforge --help": [sys.executable, "-m", "tuneforge", "--help"],
    "tuneforge plugins list": [sys.executable, "-m", "tuneforge", "plugins", "list"],
    "tuneforge run --strategy full --help": [sys.executable, "-m", "tuneforge", "run", "--strategy", "full", "--help"],
}


@click.command()
@click.option("--runs", default=15, show_default=True)
def main(runs: int) -> None:
    """Time each command in turn, `runs` times after one warm-up, and print medians and ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(runs + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    base = statistics.median(next(iter(seconds.values())))
    click.echo(f"{runs} interleaved runs, {os.cpu_count()} cores, Python {platform.python_version()}")
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"[{1000 * min(times):.0f} .. {1000 * max(times):.0f}]"
        click.echo(f"{name:38} {1000 * median:6.0f} ms  {spread}  {median / base:.2f} x")


if __name__ == "__main__":
    main()
