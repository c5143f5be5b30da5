"""The tables that compare tools run for tuneforge's own column; the other tools are not installed here."""

import os
import re
import sys
from pathlib import Path

import forked
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FORGETFUL = """
import sys
sys.path.insert(0, sys.argv[1])
from trial import interrupted, whole
from with_tuneforge import Tuneforge
from world import Job, Kill
from tuneforge.engine.context.run import Run


class Forgetful(Tuneforge):
    name = "forgetful"

    def fit(self, net, folder, job, *, resume):
        if resume:
            Run.reseed = lambda self, batch=0, step=None: None
        return super().fit(net, folder, job, resume=resume)


expected = whole(Tuneforge(), Job())
for tool in (Tuneforge(), Forgetful()):
    found = interrupted(tool, Job(), Kill("backward", 17), expected)
    print(tool.name, found.start, found.weights, found.optimizer, found.once, found.order)
"""


def output_of(arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = forked.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return done.stdout


@pytest.mark.slow
def test_killed_in_a_save_and_elsewhere_our_column_is_full(tmp_path):
    said = output_of([EXAMPLES / "kills" / "kills.py", "--kills", 3, "--quick", "--only", "tuneforge"], tmp_path)
    cells = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", said, flags=re.MULTILINE))
    whole = ("resumed without an error", "weights bit-identical", "optimizer bit-identical")
    assert [cells[row] for row in whole] == ["3 of 3"] * 3
    assert cells["record of metrics"] == "each epoch once: 3 of 3"
    assert cells["leftover files at the end"] == "0 of 3"


@pytest.mark.slow
def test_a_resume_that_forgets_the_random_state_is_told_from_one_that_does_not(tmp_path):
    said = output_of(["-c", FORGETFUL, EXAMPLES / "kills"], tmp_path).splitlines()
    assert said == ["tuneforge 15 True True True True", "forgetful 15 False False True True"]


@pytest.mark.slow
def test_our_column_passes_the_rows_that_no_kit_of_ours_checks(tmp_path):
    rows = "14,15,16,20"
    said = output_of([EXAMPLES / "conformance" / "table.py", "--rows", rows, "--only", "tuneforge"], tmp_path)
    verdicts = re.findall(r"^\| (\d+) \| .*? \| (\w+)", said, flags=re.MULTILINE)
    assert verdicts == [(row, "pass") for row in rows.split(",")]
