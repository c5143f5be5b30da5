"""The process with limits: what breaks one is named, the next call works again, and code cannot do harm from it."""

import os
import socket
import time

import pytest

from tuneforge import DataError, UnsafeFileError
from tuneforge.plugin import LimitError, Sandbox

HERE = "sandbox_work"


@pytest.fixture
def limited(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    made = []

    def make(name, **options):
        made.append(Sandbox(f"{HERE}:{name}", **{"memory_mb": 200, "timeout_s": 1.0, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_what_the_function_gives_comes_back(limited):
    process = limited("doubled")
    assert process.call(number=4) == 8
    assert process.call(number=5) == 10
    assert 0 < process.peak_mb < 200


@pytest.mark.parametrize("name", ["sleeps", "counts"])
def test_a_call_that_takes_too_long_is_ended_and_the_next_one_answered(limited, name):
    process = limited(name, timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(LimitError, match=r"longer than 0\.5 s"):
        process.call(seconds=60)
    assert time.monotonic() - began < 10
    assert process.call(seconds=0) == "done"


def test_memory_is_bounded(limited):
    process = limited("fills", timeout_s=20.0)
    with pytest.raises(LimitError, match="more than 200 MB"):
        process.call(megabytes=500)
    assert process.call(megabytes=1) == 1


def test_a_crash_is_named(limited):
    with pytest.raises(LimitError, match="SIGABRT"):
        limited("crashes").call()


@pytest.mark.parametrize("act", ["shell", "process", "fork", "write", "remove", "connect", "library", "swallowed"])
def test_code_reaches_nothing(limited, tmp_path, act):
    (tmp_path / "precious").write_text("mine")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        with pytest.raises(UnsafeFileError, match="its content tried to do"):
            limited("harms").call(act=act, path=str(tmp_path / "precious"), port=server.getsockname()[1])
        with pytest.raises(TimeoutError):
            server.accept()
    assert os.listdir(tmp_path) == ["precious"]
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_one_file_that_may_be_written_has_a_largest_size(limited, tmp_path):
    process = limited("writes", writable_path=tmp_path / "out", max_file_bytes=1000)
    assert process.call(path=str(tmp_path / "out"), count=900) == 900
    with pytest.raises(DataError, match="File too large|SIGXFSZ"):
        process.call(path=str(tmp_path / "out"), count=5000)
    assert (tmp_path / "out").stat().st_size <= 1000


def test_secrets_of_the_environment_do_not_reach_it(limited, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert "MY_TOKEN" not in limited("environment").call()
