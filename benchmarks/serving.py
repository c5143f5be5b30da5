"""Dynamic batching beside a plain server: requests per second of many clients, and the latency of a lone client.

python benchmarks/serving.py --clients 32 --seconds 3 --runs 9

The plain server has the same model in the same framework and answers each request with one forward pass: in the event
loop, or in a pool of threads; the faster of the two counts. All servers run; one at a time gets
requests, in turn, and the clients share the machine with it.
"""

import http.client
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

import tuneforge as tf

SIDE = 64


def images(folder: Path) -> None:
    """Write a few random images of two classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number in range(8):
            place = folder / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(place / f"{number}.png")


def plain(run: str, pipe, *, threads: bool) -> None:
    """Serve one forward pass per request."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    tuned = tf.load(run)

    async def predict(request):
        body = await request.body()
        work = lambda: next(tuned.predict([body]))  # noqa: E731
        return JSONResponse(await run_in_threadpool(work) if threads else work())

    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
    config = uvicorn.Config(app, port=0, log_level="error", http="h11")
    server = uvicorn.Server(config)

    def tell() -> None:
        while not server.started:
            time.sleep(0.05)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])

    threading.Thread(target=tell, daemon=True).start()
    server.run()


@contextmanager
def plain_server(run: Path, *, threads: bool) -> Iterator[tuple[int, int]]:
    """Yield port and process id of a plain server, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=plain, args=(str(run), there), kwargs={"threads": threads}, daemon=True)
    process.start()
    try:
        yield here.recv(), process.pid
    finally:
        process.kill()
        process.join()


@contextmanager
def our_server(path: Path, backend: str) -> Iterator[tuple[int, int]]:
    """Yield port and process id of `tuneforge serve`, which ends with the block."""
    command = [sys.executable, "-m", "tuneforge", "serve", str(path), "--port", "0", "--json", "--backend", backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield int(json.loads(process.stdout.readline())["url"].rpartition(":")[2]), process.pid
        finally:
            process.terminate()


def ask(connection: http.client.HTTPConnection, body: bytes) -> float:
    """Return the seconds of one request."""
    began = time.perf_counter()
    connection.request("POST", "/predict", body, {"Content-Type": "image/png"})
    response = connection.getresponse()
    response.read()
    assert response.status == 200, response.status
    return time.perf_counter() - began


def rate(port: int, pid: int, body: bytes, clients: int, seconds: float) -> tuple[float, float]:
    """Return the requests per second of clients in a closed loop, and the server's CPU milliseconds for each."""
    counts, end = [0] * clients, time.perf_counter() + seconds

    def work(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.perf_counter() < end:
            ask(connection, body)
            counts[number] += 1
        connection.close()

    began, used = time.perf_counter(), cpu_s(pid)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return sum(counts) / (time.perf_counter() - began), 1000 * (cpu_s(pid) - used) / sum(counts)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process; NaN where the system does not report them."""
    status = Path(f"/proc/{pid}/stat")
    if not status.exists():
        return float("nan")
    fields = status.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lone(port: int, body: bytes, count: int) -> float:
    """Return the median latency of a lone client, in milliseconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    times = [ask(connection, body) for _ in range(count)]
    connection.close()
    return 1000 * statistics.median(times[len(times) // 10 :])


def bare(run: Path, body: bytes, count: int) -> tuple[float, float]:
    """Return the median milliseconds of the forward pass alone, and of decoding, the pass and describing."""
    tuned = tf.load(run)
    stored = tuned.inputs.decode(body)[None]
    forward, whole = [], []
    with torch.inference_mode():
        for _ in range(count):
            began = time.perf_counter()
            tuned.run.forward(tuned.run.to_device(tuned.inputs.preprocess(stored)))
            forward.append(time.perf_counter() - began)
            began = time.perf_counter()
            next(tuned.predict([body]))
            whole.append(time.perf_counter() - began)
    skip = count // 10
    return 1000 * statistics.median(forward[skip:]), 1000 * statistics.median(whole[skip:])


@click.command()
@click.option("--clients", default=32, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Seconds of load on each server, each time.")
@click.option("--count", default=60, show_default=True, help="Requests of the lone client.")
@click.option("--runs", default=9, show_default=True, help="Rounds; each server has a turn in each.")
@click.option("--arch", default="resnet18", show_default=True)
@click.option("--onnx/--no-onnx", default=False, help="Also serve the exported graph.")
def main(clients: int, seconds: float, count: int, runs: int, arch: str, onnx: bool) -> None:
    """Measure the servers in turn, and print medians."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images(folder / "data")
        data = tf.use("image-folder", path=folder / "data", size=SIDE)
        model = tf.use("torchvision", arch=arch, weights="none")
        run = (
            tf.Engine(data=data, model=model, strategy=[tf.HeadFit("head")], page=False, out=folder / "run")
            .run()
            .run_dir
        )
        body = next((folder / "data" / "test").rglob("*.png")).read_bytes()
        servers = {
            "plain, in the event loop": lambda: plain_server(run, threads=False),
            "plain, in a pool of threads": lambda: plain_server(run, threads=True),
            "tuneforge serve, torch": lambda: our_server(run, "torch"),
        }
        if onnx:
            bundle = tf.export(run, to=("onnx",), out=folder / "bundle")
            servers["tuneforge serve, onnxruntime"] = lambda: our_server(bundle, "onnxruntime")
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        waits: dict[str, list[float]] = {name: [] for name in servers}
        bares = []
        with ExitStack() as stack:
            up = {name: stack.enter_context(server()) for name, server in servers.items()}
            for port, pid in up.values():
                rate(port, pid, body, clients, min(seconds, 1.0))
            for _ in range(runs):
                bares.append(bare(run, body, count))
                for name, (port, pid) in up.items():
                    waits[name].append(lone(port, body, count))
                    rates[name].append(rate(port, pid, body, clients, seconds))
    forward, whole = (statistics.median(each) for each in zip(*bares, strict=True))
    medians = {name: [statistics.median(each) for each in zip(*found, strict=True)] for name, found in rates.items()}
    best = max(medians[name][0] for name in list(servers)[:2])
    click.echo(
        f"{arch} at {SIDE}x{SIDE}, {clients} clients, {runs} runs of {seconds:g} s in turn, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    click.echo(f"forward alone {forward:.2f} ms; with decoding and describing {whole:.2f} ms\n")
    click.echo(
        "| server | requests/s | to the better plain one | CPU ms a request | lone client p50 | over the forward |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- |")
    for name, (speed, cpu_ms) in medians.items():
        wait = statistics.median(waits[name])
        click.echo(
            f"| {name} | {speed:.0f} | {speed / best:.2f} | {cpu_ms:.1f} | {wait:.2f} ms | {wait - forward:+.2f} ms |"
        )


if __name__ == "__main__":
    main()
