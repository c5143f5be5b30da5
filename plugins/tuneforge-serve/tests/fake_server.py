"""A small server with enough of the Open Inference Protocol and /predict for endpoint tests."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from tuneforge import Predictor


@contextlib.contextmanager
def serving(predictor: Predictor, *, num_busy: int = 0, change=lambda probabilities: probabilities, labels=None):
    """Yield the URL of a server of the model; the first `num_busy` requests get 503."""
    left = [num_busy]

    def probabilities(stored):
        with torch.inference_mode():
            outputs = predictor.run.forward(predictor.run.to_device(predictor.inputs.preprocess(stored)))
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
                row = probabilities(predictor.inputs.decode(body)[None])[0]
                self.reply(200, {**predictor.targets.describe(row.log()), "version": "7"})
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
