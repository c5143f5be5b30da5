"""A disk that is full at any write loses nothing that was saved, and after a resume nothing at all.

By default some of the writes fail. All of them, each once and for good, and a real full disk of every size:
`TUNEFORGE_DISK=all python -m pytest tests/engine/storage/test_disk_full.py`. The real disk is a tmpfs
mounted in a namespace, which needs Linux and the permission to create one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full_disk import Disk

from tuneforge.__main__ import main
from tuneforge.engine.storage import checkpoint
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.engine.storage.run_files import is_run_dir

ALL = os.environ.get("TUNEFORGE_DISK") == "all"
SAMPLES = 5
CPU = torch.device("cpu")
COMPARED = ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json", "model.json", "hardest_samples.json")
RUN = [
    "run", "--data", "full_disk:Few", "--model", "full_disk:Net", "--strategy", "full_disk:Two", "--batch-size", "16",
]  # fmt: skip
WAYS = {
    "features in memory": ["--no-page", "--checkpoint-s", "0"],
    "features mapped": ["--no-page", "--checkpoint-s", "1e9", "--checkpoint-steps", "2", "--cache-mb", "0"],
    "with a page": ["--checkpoint-s", "1e9"],
}


class Place:
    """A directory on the simulated disk with the run and the cache; commands run beside it."""

    def __init__(self, base, way):
        self.base = base
        self.command = [*RUN, *WAYS[way], "--out", "disk/run"]
        self.run = base / "disk" / "run"
        self.disk = Disk(base / "disk")

    def begin(self, monkeypatch):
        (self.base / "disk").mkdir(parents=True)
        monkeypatch.chdir(self.base)
        monkeypatch.setenv("TUNEFORGE_CACHE", str(self.base / "disk" / "cache"))
        return self

    def contents(self):
        return {name: (self.run / name).read_bytes() for name in COMPARED}

    def remaining_files(self):
        """Return every file and directory; cache entries are comparable, because their names are hashes."""
        return sorted(str(path.relative_to(self.base)) for path in (self.base / "disk").rglob("*"))

    def checkpoint_steps(self):
        """Return the steps of the checkpoints; raise if one is damaged."""
        return [checkpoint.verify(path).step for path in sorted(self.run.glob("checkpoints/[0-9]*"))]


@pytest.fixture(scope="module", params=WAYS)
def uninterrupted(request, tmp_path_factory):
    """Return what a run with enough space writes, and its writes in order."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("unhurt") / "w", request.param).begin(patch)
        with place.disk.mounted():
            assert main(place.command) == 0
        return request.param, place.contents(), place.remaining_files(), place.disk.passed


def select_writes(passed):
    """Return all writes, or some of each kind spread over the run: the first, the last, and some between."""
    if ALL:
        return [(number, to_stay) for number in range(1, len(passed) + 1) for to_stay in (False, True)]
    spread = [1 + round(place * (len(passed) - 1) / (SAMPLES - 1)) for place in range(SAMPLES)]
    return [(number, bool(place % 2)) for place, number in enumerate(spread)]


def renamed_checkpoints(passed):
    return sum(kind == "rename" and "-step-" in name for kind, name in passed)


def run_with_full_disk(place, number, to_stay, capsys, passed):
    """Fill the disk at a write, then resume with space; return what was logged by then."""
    with place.disk.mounted(full_at=number, to_stay=to_stay):
        code = main(place.command)
    out, err = capsys.readouterr()
    at = f"write {number} ({passed[number - 1]}), {'to stay' if to_stay else 'once'}: {out[-300:]}{err}"
    assert code in (0, 75), at
    assert "Traceback" not in out + err, at
    steps = place.checkpoint_steps()
    if renamed_checkpoints(passed[: number - 1]) and code == 75:
        assert steps, at
        assert checkpoint.load_latest(place.run, CPU)[2] == [], at
    if code == 75:
        assert re.search(r"cannot write|there is no room", err), at
        assert all(words in err for words in ("disk", "No space left on device", "free some space")), at
        again = ["resume", "disk/run"] if is_run_dir(place.run) else place.command
        assert ("tuneforge resume disk/run" in err) == (again[0] == "resume"), at
        assert main(again) == 0, at
        capsys.readouterr()
    return code, out, at


def test_disk_full_at_any_write_loses_nothing_after_resume(uninterrupted, tmp_path, monkeypatch, capsys):
    way, contents, remaining_files, passed = uninterrupted
    survived, stopped = 0, 0
    for number, to_stay in select_writes(passed):
        place = Place(tmp_path / f"{number} {to_stay}", way).begin(monkeypatch)
        code, out, at = run_with_full_disk(place, number, to_stay, capsys, passed)
        survived, stopped = survived + (code == 0), stopped + (code == 75)
        assert place.contents() == contents, at
        log = (place.run / "log.txt").read_text()
        assert log.endswith("\n"), at
        times = [json.loads(line) for line in (place.run / "timings.jsonl").read_text().splitlines()]
        assert [each["epoch"] for each in times] == [1, 2], at
        expected, found = set(remaining_files), set(place.remaining_files())
        missing, more = expected - found, found - expected
        assert not more, (at, more)
        if missing == {"disk/run/report.html"}:
            assert "warning: the run is done, but cannot write" in out, at
            assert main(["report", "disk/run"]) == 0
            assert place.remaining_files() == remaining_files, at
        elif missing:
            assert all(name.startswith("disk/cache") for name in missing), (at, missing)
            assert "not written to disk, because the cache cannot be written (No space left" in out, at
    assert stopped > survived > 0
    with capsys.disabled():
        if ALL:
            print(f"\n{way}: {survived + stopped} of {2 * len(passed)} ({len(passed)} writes), {stopped} exited 75")


def write_log(path, full_at):
    """Return the content of a log of three lines, and the writes before the second one."""
    disk = Disk(path)
    with disk.mounted(full_at=full_at), RunDir(path / "r") as place:
        place.write_status("running")
        place.append("log.txt", "one")
        passed = len(disk.passed)
        place.append("log.txt", "two")
        place.append("log.txt", "three")
    return (path / "r" / "log.txt").read_text().splitlines(), passed


def test_log_reports_lost_lines_and_has_no_partial_line(tmp_path):
    lines, passed = write_log(tmp_path / "unhurt", 0)
    assert lines == ["one", "two", "three"]
    lines, _ = write_log(tmp_path / "hurt", passed + 1)
    assert lines == ["one", "(1 line(s) are missing here: the disk was full)", "three"]


def test_temporary_files_of_a_killed_process_are_deleted_on_resume(tmp_path):
    part, other = tmp_path / ".report.json.4711.part", tmp_path / ".notes.part"
    part.write_text("{")
    other.write_text("mine")
    with RunDir(tmp_path, resume=True):
        assert not part.exists()
        assert other.exists()


# Commands on a finished run

COMMANDS = {
    "page": ["report", "disk/run"],
    "plan": ["report", "disk/run", "--export-strategy", "--out", "disk/plan.toml"],
    "bundle and card": ["export", "disk/run", "--format", "safetensors", "--out", "disk/bundle"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a directory with a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("finished") / "f", "with a page").begin(patch)
        assert main(place.command) == 0
    return place.base


@pytest.mark.parametrize("name", COMMANDS)
def test_command_on_a_full_disk_changes_nothing(finished, tmp_path, monkeypatch, capsys, name):
    def files(base):
        return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}

    def copied(number):
        shutil.copytree(finished, tmp_path / number)
        monkeypatch.chdir(tmp_path / number)
        return Disk(tmp_path / number / "disk"), tmp_path / number

    disk, base = copied("unhurt")
    with disk.mounted():
        assert main(COMMANDS[name]) == 0
    expected, passed = set(files(base)), disk.passed
    for number, to_stay in select_writes(passed):
        disk, base = copied(f"{number} {to_stay}")
        before = files(base)
        capsys.readouterr()
        with disk.mounted(full_at=number, to_stay=to_stay):
            assert main(COMMANDS[name]) == 75, passed[number - 1]
        err = capsys.readouterr().err
        assert all(words in err for words in ("cannot write 'disk/", "No space left", "free some space")), err
        assert files(base) == before, passed[number - 1]
        assert main(COMMANDS[name]) == 0
        assert set(files(base)) == expected
    with capsys.disabled():
        if ALL:
            print(f"\n{name}: {2 * len(passed)} of {2 * len(passed)} ({len(passed)} writes)")


# A real full disk

MOUNTED = r"""
import contextlib, io, json, os, shutil, subprocess, sys
from pathlib import Path
import torch
from tuneforge.__main__ import main
from tuneforge.engine.storage import checkpoint
from tuneforge.engine.storage.run_dir import is_run_dir

torch.set_num_threads(1)
command, compared, limits = json.loads(sys.argv[1])

def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", "disk"], check=True)

def told(arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()

def contents():
    return [(Path("disk/run") / name).read_bytes() for name in compared]

def left():
    return sorted(str(path) for path in Path("disk").rglob("*"))

os.mkdir("disk")
os.environ["TUNEFORGE_CACHE"] = "disk/cache"
expected = None
for limit in ("size=64m", *limits):
    mount(limit)
    code, out, err = told(command)
    steps = [checkpoint.verify(path).step for path in sorted(Path("disk/run").glob("checkpoints/[0-9]*"))]
    subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=100000", "disk"], check=True)
    again = 0, "", ""
    if code == 75:
        again = told(["resume", "disk/run"] if is_run_dir(Path("disk/run")) else command)
    expected = expected or (contents(), left())
    more = sorted(set(left()) - set(expected[1]))
    print(json.dumps([limit, code, out, err, steps, again, contents() == expected[0], more]))
    subprocess.run(["umount", "-l", "disk"], check=True)
"""


def can_mount():
    """Return True if this user may mount a disk."""
    if sys.platform != "linux":
        return False
    tried = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=4k tmpfs /mnt"]
    try:
        return subprocess.run(tried, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def disk_sizes():
    """Return disks from one page to more than enough, and with as many files and directories."""
    pages, files = (range(1, 120), range(2, 60)) if ALL else ((30,), (25,))
    return [*(f"size={4 * each}k" for each in pages), *(f"size=64m,nr_inodes={each}" for each in files)]


@pytest.mark.skipif(not can_mount(), reason="needs permission to mount a disk")
def test_real_disk_of_any_size_loses_nothing_after_resume(tmp_path, capsys):
    given = json.dumps([[*RUN, *WAYS["features in memory"], "--out", "disk/run"], COMPARED, disk_sizes()])
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-W", "error", "-c", MOUNTED, given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each[0] for each in told[1:]] == disk_sizes()
    for limit, code, out, err, steps, again, same, more in told:
        at = (limit, out[-300:], err, again)
        assert code in (0, 75), at
        assert code == 0 or ("No space left on device" in err and "free some space" in err), at
        assert code == 0 or "epoch 1/" not in out or steps, at
        assert (again[0], same, more) == (0, True, []), at
    codes = [each[1] for each in told[1:]]
    assert 75 in codes
    with capsys.disabled():
        if ALL:
            print(f"\nreal disks: {len(codes)} of {len(codes)}, {codes.count(75)} exited 75")


# Output


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["plugins", "list"], ["resume", "--help"]])
def test_output_to_a_full_disk_exits_75(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tuneforge", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, "No space left on device" in done.stderr) == (75, True), done.stderr
    assert "Traceback" not in done.stderr
