"""A small server that speaks enough of the Open Inference Protocol, and /predict, to be tested over the wire."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from tuneforge.engine.session.predictor import Predictor


@contextlib.contextmanager
def serving(tuned: Predictor, *, busy: int = 0, change=lambda probabilities: probabilities, labels=None):
    """The address of a server that answers with the model; the first `busy` requests are answered 503."""
    left = [busy]

    def probabilities(stored):
        with torch.inference_mode():
            outputs = tuned.run.forward(tuned.run.to_device(tuned.inputs.preprocess(stored)))
        return change(outputs.double().softmax(1))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            known = {} if labels is None else {"parameters": {"labels": labels}}
            self.reply(200, {"name": "m", "inputs": [{"name": "input"}], **known})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v2/repository/index":
                self.reply(200, [{"name": "m"}])
            elif left[0] > 0:
                left[0] -= 1
                self.reply(503, {"error": "the queue is full"})
            elif self.path == "/predict":
                row = probabilities(tuned.inputs.decode(body)[None])[0]
                self.reply(200, {**tuned.targets.describe(row.log()), "version": "7"})
            elif self.headers.get("Authorization") == "Bearer wrong":
                self.reply(401, {"error": "the token is wrong"})
            else:
                (sent,) = json.loads(body)["inputs"]
                dtype = {"FP32": torch.float32, "UINT8": torch.uint8}[sent["datatype"]]
                found = probabilities(torch.tensor(sent["data"], dtype=dtype).view(sent["shape"]))
                output = {"name": "probabilities", "datatype": "FP32", "shape": list(found.shape)}
                self.reply(200, {"model_version": "7", "outputs": [{**output, "data": found.flatten().tolist()}]})

        def reply(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
