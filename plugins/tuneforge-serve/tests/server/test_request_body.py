"""Bad requests get a 4xx response, use little memory, and do not disturb the next good request."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

from tuneforge_serve.server.app import AccessPolicy
from tuneforge_serve.server.limits import Limits
from tuneforge_serve.server.service import LOOPBACK

ROW = json.dumps({"size": 1.5, "weight": -0.5, "color": "red"}).encode()
TOKEN = "correct horse battery"
SMALL = Limits(max_body_bytes=64 * 1024, body_timeout_s=0.4, max_connections=40)


def send(server, *parts: bytes, wait_s: float = 0.0, timeout: float = 10) -> tuple[int, bytes]:
    """Send bytes over a socket, and return the status and the whole response; 0 if the server only closed."""
    with socket.create_connection((server.host, server.port), timeout=timeout) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server may have responded and closed
            for part in parts:
                connection.sendall(part)
                time.sleep(wait_s)
        content = b""
        try:
            while b"}" not in content and (received := connection.recv(65536)):
                content += received
        except ConnectionResetError:
            pass
    return (int(content.split()[1]) if content.startswith(b"HTTP/1.1 ") else 0), content


def post(path: str = "/predict", body: bytes = ROW, *, length: int | None = None, **headers: str) -> bytes:
    given = {"Host": "localhost", "Content-Length": str(len(body) if length is None else length), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG file that claims a large image."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + block(b"IDAT", zlib.compress(bytes(1000))) + block(b"IEND", b"")


def npy_bomb() -> bytes:
    """Return an array file whose header claims terabytes."""
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    text += b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def memory_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


BODIES = [
    ("an oversize body", post(body=b"x" * (SMALL.max_body_bytes + 1)), 413),
    ("an oversize length", post(body=b"", length=10**15), 413),
    (
        "an oversize body in chunks",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunk(b"x" * 40_000) * 2 + b"0\r\n\r\n",
        413,
    ),
    ("a compressed body", post(Content_Encoding="gzip"), 415),
    ("a form", post(Content_Type="multipart/form-data; boundary=x"), 415),
    ("no body", post(body=b""), 400),
    ("invalid JSON", post(body=b"{", Content_Type="application/json"), 400),
    ("NaN", post(body=b'{"size": NaN}', Content_Type="application/json"), 400),
    ("deep nesting", post(body=b"[" * 30_000, Content_Type="application/json"), 400),
    ("a number of 10,000 digits", post(body=b"1" * 10_000, Content_Type="application/json"), 400),
    ("invalid Unicode", post(body=b'"\xff\xfe"', Content_Type="application/json"), 400),
    ("a wrong type", post(body=b'{"size": [], "weight": {}, "color": 3}'), 422),
    ("a missing column", post(body=b'{"size": 1, "weight": 1}'), 422),
    ("an overflow", post(body=ROW.replace(b"1.5", b"1e300")), 422),
    ("a path as text", post(body=b"/etc/passwd"), 422),
    ("a path in JSON", post(body=b'"/etc/passwd"', Content_Type="application/json"), 422),
    ("an unknown model", post("/predict?model=../../etc"), 404),
    ("an odd name", post("/v2/models/%00%ff/infer"), 404),
    ("a name with dots", post("/v2/models/..%2f..%2fetc/infer"), 404),
    ("an unknown version", post("/v2/models/fruit/versions/%E2%98%83/infer"), 404),
    ("an unknown path", post("/nowhere"), 404),
    ("a wrong method", b"DELETE /predict HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    ("another host", b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    ("no host", b"GET / HTTP/1.0\r\n\r\n", 403),
    ("a malformed host", b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 403),
    ("a page of another site", post(Origin="https://evil.example"), 403),
    ("a page without origin", post("/v2/repository/models/fruit/unload", b"{}", Origin="null"), 403),
    ("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    ("a negative length", post(Content_Length="-1"), 400),
    ("two lengths", post(Content_length="7"), 400),
    ("a bare line feed in a header", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", 400),
    ("headers without an end", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000, 400),
    ("not an object", post("/v2/models/fruit/infer", b"[]"), 400),
    ("a wrong shape", post("/v2/models/fruit/infer", json.dumps({"inputs": [{
        "name": "input", "datatype": "FP32", "shape": [2**40, 4], "data": [1.0]}]}).encode()), 400),
    ("parameters of a load", post("/v2/repository/models/fruit/load", b'{"parameters": {"config": "{}"}}'), 400),
]  # fmt: skip


def test_200_bad_requests_get_a_4xx_and_good_ones_succeed(serving, table_run, tmp_path):
    path = tmp_path / "fruit"
    path.symlink_to(table_run)
    with serving(path, limits=SMALL) as server:
        assert send(server, post())[0] == 200
        before = memory_mb()
        seen = 0
        while seen < 200:
            for what, request, status in BODIES:
                found, answer = send(server, request)
                assert found == status, (what, answer)
                if b"application/json" in answer:  # otherwise it is no HTTP request, which uvicorn refuses by itself
                    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
                    sent = "known: /etc/passwd" if what == "a path as text" else "../../etc"  # columns of the body
                    assert "/etc" not in error.replace("../../etc", "").replace(sent, ""), what
                    assert "root:" not in error, what
                    assert "Traceback" not in error
                    assert str(table_run) not in error
                seen += 1
            assert send(server, post())[0] == 200
        assert memory_mb() - before < 64
    print(f"\n{seen} bad requests, {memory_mb() - before:.1f} MB more memory")


def test_decompression_bombs_and_broken_images_are_refused(serving, digits_run):
    limits = Limits()
    with serving(digits_run, limits=limits) as server:
        before = memory_mb()
        cases = [
            bomb(50_000, 50_000),
            bomb(2**31 - 1, 1),
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"BM" + bytes(60),
        ]
        cases += [b"II*\x00" + b"\xff" * 200, npy_bomb(), b"%!PS-Adobe", bytes(1000)]
        for content in cases:
            for body, kind in (
                (content, "image/png"),
                (json.dumps({"inputs": [base64.b64encode(content).decode()]}), "application/json"),
            ):
                answer = server.request(
                    "POST", "/predict", body if isinstance(body, bytes) else body.encode(), Content_Type=kind
                )
                assert answer.status == 422, content[:20]
                why = "too large" if content in cases[:2] else "cannot decode"
                assert why in answer.json["error"], content[:20]
        assert memory_mb() - before < 64


def test_slow_bodies_time_out(serving, table_run):
    with serving(table_run, limits=SMALL) as server:
        assert send(server, post(body=ROW[:10], length=len(ROW)))[0] == 408
        trickle = [post(body=b"", length=10), *(b"x" for _ in range(3))]
        assert send(server, *trickle, wait_s=0.2)[0] == 408
        assert send(server, post())[0] == 200


def test_too_many_connections_get_503(serving, table_run):
    with serving(table_run, limits=Limits(max_connections=3)) as server:
        idle = [socket.create_connection((server.host, server.port)) for _ in range(3)]
        time.sleep(0.1)
        assert send(server, post())[0] == 503
        for each in idle:
            each.close()
        time.sleep(0.1)
        assert send(server, post())[0] == 200


def test_full_queue_and_timeout_get_503_with_retry_after(serving, table_run):
    limits = Limits(max_queue_size=2, max_batch_size=1, request_timeout_s=0.3)
    released = threading.Event()
    with serving(table_run, limits=limits) as server:
        served = server.service.models.get(server.service.models.default_name)
        forward = served.model._forward
        served.model._forward = lambda stored: (released.wait(5), forward(stored))[1]
        responses = []
        threads = [
            threading.Thread(target=lambda: responses.append(server.request("POST", "/predict", ROW))) for _ in range(6)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        released.set()
        assert {each.status for each in responses} == {503}
        assert {each.headers["retry-after"] for each in responses} == {"1"}
        texts = " ".join(each.json["error"] for each in responses)
        assert "the queue is full" in texts
        assert "within 0.3 s" in texts
        served.model._forward = forward
        assert server.request("POST", "/predict", ROW).status == 200


def test_size_of_all_bodies_is_limited(serving, table_run):
    limits = Limits(max_total_body_bytes=100_000, max_body_bytes=80_000, body_timeout_s=5)
    with serving(table_run, limits=limits) as server:
        with socket.create_connection((server.host, server.port)) as holding:
            holding.sendall(post(body=b"x" * 70_000, length=75_000))
            time.sleep(0.2)
            status, answer = send(server, post(body=b"x" * 60_000))
            assert status == 503
            assert b"retry-after" in answer.lower()
        time.sleep(0.2)
        assert send(server, post())[0] == 200


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


def test_without_the_token_only_health_routes_respond(serving, table_run):
    bad = [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Token {TOKEN}",
        "Basic !!!",
        basic("wrong"),
        "Bearer é",
    ]
    with serving(table_run, access=AccessPolicy(token=TOKEN, hosts=None)) as server:
        for path in ("/", "/metrics", "/docs", "/openapi.json", "/v2", "/v2/models/fruit", "/nowhere"):
            assert server.request("GET", path).status == 401
        for given in bad:
            answer = server.request("POST", "/predict", ROW, Authorization=given.encode("utf-8").decode("latin-1"))
            assert answer.status == 401, given
            assert TOKEN not in answer.body.decode()
            assert answer.headers["www-authenticate"].startswith("Basic")
        for good in (f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN)):
            assert server.request("POST", "/predict", ROW, Authorization=good, Host="anything.example").status == 200
        assert server.request("GET", "/v2/health/ready").status == 200
    assert TOKEN not in repr(AccessPolicy(token=TOKEN))


def test_names_of_this_machine_are_accepted_as_host(serving, table_run):
    with serving(table_run) as server:
        for host in (*LOOPBACK[:2], "[::1]", "localhost:1234", "LOCALHOST"):
            assert server.request("GET", "/v2", Host=host).status == 200, host
        own = f"http://localhost:{server.port}"
        assert server.request("POST", "/predict", ROW, Host=own[7:], Origin=own).status == 200


def test_defect_is_a_500_without_its_cause(serving, table_run, caplog):
    with serving(table_run) as server:
        server.service.models.index = lambda: 1 / 0
        answer = server.request("POST", "/v2/repository/index", b"")
    assert answer.status == 500
    assert "division" not in answer.json["error"]
    assert answer.headers["x-request-id"] in answer.json["error"]
    assert "ZeroDivisionError" in caplog.text
