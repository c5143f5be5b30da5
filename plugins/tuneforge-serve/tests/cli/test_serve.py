"""The command `tuneforge serve`: its address, signals, and what it refuses.

`TUNEFORGE_CLIENTS=32` stops the server under 32 clients; by default there are fewer.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import forked
import pytest

from tuneforge.__main__ import main

CLIENTS = int(os.environ.get("TUNEFORGE_CLIENTS", "8"))
ROW = json.dumps({"size": 1.5, "weight": -0.5, "color": "red"}).encode()


@contextmanager
def started(path, *arguments):
    """Start the command in another process, and yield after it has printed its address."""
    command = [sys.executable, "-m", "tuneforge", "serve", str(path), "--port", "0", "--json", *arguments]
    process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def port_of(about) -> int:
    return int(about["url"].rpartition(":")[2])


def test_sigterm_under_load_finishes_every_accepted_request(table_run):
    responses, cut = [], []

    def ask(port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            while True:
                connection.request("POST", "/predict", ROW)
                response = connection.getresponse()
                response.read()
                responses.append(response.status)
                if response.getheader("Connection") == "close":
                    connection.close()
        except (OSError, http.client.HTTPException) as error:
            cut.append(error)
        finally:
            connection.close()

    with started(table_run, "--max-batch-size", "2") as (process, about):
        assert about["models"][0]["name"] == "fruit"
        threads = [threading.Thread(target=ask, args=(port_of(about),)) for _ in range(CLIENTS)]
        for each in threads:
            each.start()
        while len(responses) < 5 * CLIENTS:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for each in threads:
            each.join(30)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert set(responses) == {200}
    assert len(cut) == CLIENTS  # each client met the closed socket at last, and no accepted request was lost:
    assert f"stopped after {len(responses)} response(s)" in log
    assert "Traceback" not in log


def test_second_signal_exits_at_once(table_run):
    with started(table_run) as (process, about), socket.create_connection(("127.0.0.1", port_of(about))) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx")
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        assert process.poll() is None  # it waits for the accepted request
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - start < 1


def test_idle_server_stops_at_once(serving, table_run):
    with serving(table_run) as server, closing(server.connect()) as kept:
        kept.request("GET", "/v2/health/live")
        kept.getresponse().read()  # the connection stays open, and nothing is in flight
        start = time.monotonic()
        server.server.handle_exit(signal.SIGTERM, None)
        assert kept.sock.recv(1) == b""
    assert time.monotonic() - start < 1


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return call


def test_other_machines_need_a_token(run, table_run, tmp_path, monkeypatch):
    code, error = run("serve", table_run, "--host", "0.0.0.0", "--port", 0)
    assert code == 2
    assert "--token-file" in error
    assert "--insecure" in error
    short = tmp_path / "token"
    short.write_text("hunter2\n")
    for given in (["--token-file", short], ["--token-file", tmp_path / "none"]):
        code, error = run("serve", table_run, "--host", "0.0.0.0", *given)
        assert code == 2
        assert "hunter2" not in error
    monkeypatch.setenv("TUNEFORGE_TOKEN", "short")
    assert run("serve", table_run)[0] == 2


def test_port_in_use_and_path_without_a_model_are_reported(run, table_run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, error = run("serve", table_run, "--port", taken.getsockname()[1])
    assert code == 75
    assert "is in use" in error
    code, error = run("serve", tmp_path, "--port", 0)
    assert code == 73
    assert "nothing to serve" in error
    assert run("serve", table_run, "--host", "no.such.host.invalid", "--port", 0, "--insecure")[0] == 2
    assert run("serve", table_run, "--port", 0, "--backend", "abacus")[0] == 2
