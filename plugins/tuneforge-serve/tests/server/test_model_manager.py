"""Versions change under traffic: every prediction is that of the version it names, and a broken version is refused.

`TUNEFORGE_SWAPS=30 TUNEFORGE_CLIENTS=32` runs the full test; by default there are fewer of both.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
import time

import pytest
import torch
from tuneforge_serve.server.app import create_app
from tuneforge_serve.server.model_manager import ServedModel, find_model_sources
from tuneforge_serve.server.threads import limit_to_one_thread

from tuneforge.exporting import atomic_dir, export, load_inference_model, load_tensors, save_tensors

SWAPS = int(os.environ.get("TUNEFORGE_SWAPS", "4"))
CLIENTS = int(os.environ.get("TUNEFORGE_CLIENTS", "8"))
ROW = {"size": 0.3, "weight": 0.1, "color": "blue"}


class Traffic:
    """Clients that send one request after the other on open connections, until told to stop."""

    def __init__(self, server, count: int) -> None:
        self.responses: list[tuple[int, dict]] = []
        self.faults: list[BaseException] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send_requests, args=(server.connect(),)) for _ in range(count)]

    def __enter__(self) -> Traffic:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for each in self._threads:
            each.join(30)

    def versions(self) -> set[str]:
        return {response["version"] for status, response in list(self.responses) if status == 200}

    def _send_requests(self, connection: http.client.HTTPConnection) -> None:
        body = json.dumps(ROW).encode()
        try:
            while not self._over.is_set():
                connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                self.responses.append((response.status, json.loads(response.read())))
        except (OSError, http.client.HTTPException) as error:
            self.faults.append(error)
        finally:
            connection.close()


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def expected(registry_dir) -> dict[str, float]:
    """Each version's own probability for the row, offline."""
    found = [next(load_inference_model(each).predict([ROW])) for each in registry_dir.bundles]
    return {
        str(number): found[number % 2]["probabilities"]["plum"] for number in range(1, registry_dir.num_versions + 1)
    }


def test_no_request_fails_while_versions_change(registry_dir, serving):
    with serving(registry_dir.path, poll_interval_s=0.02) as server, Traffic(server, CLIENTS) as traffic:
        until(lambda: "1" in traffic.versions())
        for _ in range(SWAPS):
            registry_dir.add()
            registry_dir.set_champion()
            until(lambda: str(registry_dir.num_versions) in traffic.versions())
    probabilities = expected(registry_dir)
    assert abs(probabilities["1"] - probabilities["2"]) > 0.001  # the versions can be told apart
    assert not traffic.faults
    assert {status for status, _ in traffic.responses} == {200}
    assert traffic.versions() == set(probabilities)
    for _, response in traffic.responses:
        assert response["probabilities"]["plum"] == pytest.approx(probabilities[response["version"]], abs=1e-5)
    print(f"\n{SWAPS} swaps, {CLIENTS} clients, {len(traffic.responses)} responses, 0 failed")


def damaged(folder) -> None:
    """Flip a bit of the weights."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def different(folder) -> None:
    """Change the weights, so that a bundle with valid hashes differs from its reference outputs."""
    path = folder / "model.safetensors"
    tensors, metadata = load_tensors(path)
    save_tensors({name: -tensor for name, tensor in tensors.items()}, path, metadata=metadata)
    atomic_dir.write_manifest(folder)


def incomplete(folder) -> None:
    """Remove a file, as if the bundle had been copied in part."""
    (folder / "bundle.json").unlink()


@pytest.mark.parametrize("breaks", [damaged, different, incomplete])
def test_broken_version_is_refused_and_the_old_one_stays(registry_dir, serving, caplog, breaks):
    caplog.set_level(logging.INFO, logger="tuneforge.serve")
    with serving(registry_dir.path, poll_interval_s=0.02) as server, Traffic(server, 3) as traffic:
        until(lambda: len(traffic.responses) > 5)
        breaks(registry_dir.add())
        registry_dir.set_champion()
        until(lambda: "was refused" in caplog.text)
        seen = len(traffic.responses)
        until(lambda: len(traffic.responses) > seen + 5)
        index = server.request("POST", "/v2/repository/index", {}).json
        asked = server.request("POST", "/v2/repository/models/fruit/load", {})
        registry_dir.add()
        registry_dir.set_champion()
        until(lambda: "3" in traffic.versions())
    assert not traffic.faults
    assert {status for status, _ in traffic.responses} == {200}
    assert traffic.versions() == {"1", "3"}
    assert index[0]["version"] == "1"
    assert "'2' was refused" in index[0]["reason"]
    assert asked.status == 400
    assert str(registry_dir.path) not in asked.json["error"]
    assert "version '1' stays" in caplog.text
    refused = [record for record in caplog.records if "was refused" in record.message]
    assert len(refused) == 2  # once by polling, and once on request


def test_unreadable_champion_file_changes_nothing(registry_dir, serving):
    with serving(registry_dir.path, poll_interval_s=0.02) as server:
        (registry_dir.path / "fruit" / "champion.json").write_text("{")
        time.sleep(0.2)
        assert server.request("POST", "/predict", ROW).json["version"] == "1"
        registry_dir.add()
        registry_dir.set_champion()
        until(lambda: server.request("POST", "/predict", ROW).json["version"] == "2")


def test_rollback_is_loaded_and_an_unloaded_model_stays_unloaded(registry_dir, serving):
    registry_dir.add()
    registry_dir.set_champion()
    with serving(registry_dir.path, poll_interval_s=0.02) as server:
        assert server.request("POST", "/predict", ROW).json["version"] == "2"
        registry_dir.set_champion(1)
        until(lambda: server.request("POST", "/predict", ROW).json["version"] == "1")
        assert server.request("POST", "/v2/repository/models/fruit/unload", {}).status == 200
        registry_dir.set_champion(2)
        time.sleep(0.2)
        assert server.request("POST", "/predict", ROW).status == 404
        assert server.request("POST", "/v2/repository/models/fruit/load", {}).json == {"name": "fruit", "version": "2"}
        assert server.request("POST", "/predict", ROW).json["version"] == "2"


def test_new_model_of_the_registry_is_served(registry_dir, serving):
    with serving(registry_dir.path, poll_interval_s=0.02) as server:
        registry_dir.add("berries")
        assert server.request("POST", "/v2/repository/models/berries/load", {}).status == 404  # it has no champion yet
        registry_dir.set_champion(name="berries")
        until(lambda: len(server.request("POST", "/v2/repository/index", {}).json) == 2)
        until(lambda: server.request("POST", "/predict?model=berries", ROW).status == 200)
        assert server.request("POST", "/predict", ROW).json["model"] == "fruit"
        assert "berries" in str(server.request("GET", "/openapi.json").json["info"])


def test_new_model_can_be_loaded_at_once(registry_dir, serving):
    with serving(registry_dir.path, poll_interval_s=60) as server:
        registry_dir.add("berries")
        registry_dir.set_champion(name="berries")
        loaded = server.request("POST", "/v2/repository/models/berries/load", {})
        assert loaded.json == {"name": "berries", "version": "2"}
        assert server.request("POST", "/predict?model=berries", ROW).json["version"] == "2"


def test_request_keeps_the_version_it_started_with(registry_dir, serving):
    """The version may be replaced before the forward pass."""
    with serving(registry_dir.path) as server:
        service = server.service
        old = service.models.get("fruit")
        registry_dir.add()
        registry_dir.set_champion()
        new = service.models.load("fruit")
        stored = old.inputs.decode(ROW)[None]
        results = [service.batcher.submit(each, stored) for each in (old, new, old)]
        outputs = [each.result(10).outputs for each in results]
        assert outputs[0].equal(outputs[2])
        assert not outputs[0].equal(outputs[1])


def test_broken_registry_is_refused_at_start(registry_dir, serving):
    from tuneforge.errors import FolderError

    damaged(registry_dir.path / "fruit" / "1")
    with pytest.raises(FolderError, match="model.safetensors"), serving(registry_dir.path):
        pass


def test_backends_agree_and_auto_picks_one(serving, table_run, tmp_path, caplog):
    pytest.importorskip("onnxruntime")
    caplog.set_level(logging.INFO, logger="tuneforge.serve")
    bundle = export(table_run, to=("onnx", "safetensors"), out=tmp_path / "bundle", name="fruit")
    responses = {}
    for backend in ("torch", "onnxruntime", "auto"):
        with serving(bundle, backend=backend) as server:
            about = server.service.models.get(server.service.models.default_name).about
            responses[backend] = server.request("POST", "/predict", ROW).json
        assert about["backend"] == backend or backend == "auto"
        assert f"({about['backend']})" in caplog.text
    plums = [each["probabilities"]["plum"] for each in responses.values()]
    assert plums == pytest.approx([plums[0]] * 3, abs=1e-5)
    assert len({each["version"] for each in responses.values()}) == 1


def test_one_thread_computes_and_the_others_keep_to_one_core(digits_run, monkeypatch):
    seen = []

    def outputs(self, stored):
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        return self.model.outputs(stored)

    monkeypatch.setattr(ServedModel, "outputs", outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        undo = limit_to_one_thread()
        alone = torch.get_num_threads()
        create_app(find_model_sources(digits_run)).state.service.close()
        undo.restore_original_limits()
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert (alone, after) == (1, 2)
    assert set(seen) == {("forward", 2)}
