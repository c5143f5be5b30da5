"""The Open Inference Protocol, tested with NVIDIA's client."""

import json

import numpy as np
import pytest
import torch
import tritonclient.http as tritonclient
from tritonclient import utils

from tuneforge.exporting import load_inference_model


@pytest.fixture(scope="module")
def digits(digits_run):
    model = load_inference_model(digits_run)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 1, 32, 32), dtype=np.uint8)
    return pixels, model.targets, model.outputs(torch.from_numpy(pixels))


@pytest.fixture
def client(serving, digits_run):
    with serving(digits_run) as server:
        triton = tritonclient.InferenceServerClient(f"127.0.0.1:{server.port}")
        yield server, triton
        triton.close()


def tensor(pixels, *, binary):
    given = tritonclient.InferInput("input", list(pixels.shape), "UINT8")
    given.set_data_from_numpy(pixels, binary_data=binary)
    return given


def test_health_metadata_and_index(client):
    _, triton = client
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("digits")
    assert not triton.is_model_ready("pears")
    assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
    metadata = triton.get_model_metadata("digits")
    assert metadata["inputs"] == [{"name": "input", "datatype": "UINT8", "shape": [-1, 1, 32, 32]}]
    assert metadata["outputs"][0] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}
    (version,) = metadata["versions"]
    assert triton.is_model_ready("digits", version)
    assert not triton.is_model_ready("digits", "9")
    assert triton.get_model_repository_index() == [
        {"name": "digits", "version": version, "state": "READY", "reason": ""}
    ]


@pytest.mark.parametrize("binary", [True, False])
def test_infer_returns_the_predictions_of_the_run(client, digits, binary):
    server, triton = client
    pixels, targets, outputs = digits
    wanted = [
        tritonclient.InferRequestedOutput("probabilities", binary_data=binary),
        tritonclient.InferRequestedOutput("prediction", binary_data=binary),
    ]
    result = triton.infer("digits", [tensor(pixels, binary=binary)], outputs=wanted, request_id="mine")
    np.testing.assert_allclose(result.as_numpy("probabilities"), outputs.softmax(1).numpy(), atol=1e-6)
    answers = [json.loads(each) for each in result.as_numpy("prediction")]
    assert [each["class"] for each in answers] == [targets.describe(each)["class"] for each in outputs]
    response = result.get_response()
    assert response["id"] == "mine"
    assert response["model_name"] == "digits"
    assert response["model_version"] == server.service.models.list_loaded()[0].version


def test_all_outputs_are_returned_by_default_and_concurrent_requests_are_kept_apart(client, digits):
    _, triton = client
    pixels, _, outputs = digits
    pending = [triton.async_infer("digits", [tensor(pixels[row : row + 1], binary=True)]) for row in range(5)]
    for row, each in enumerate(pending):
        result = each.get_result()
        assert result.as_numpy("prediction").shape == (1,)
        np.testing.assert_allclose(
            result.as_numpy("probabilities"), outputs[row : row + 1].softmax(1).numpy(), atol=1e-6
        )


def test_unload_and_load(client, digits):
    _, triton = client
    triton.unload_model("digits")
    assert not triton.is_model_ready("digits")
    assert not triton.is_server_ready()
    with pytest.raises(utils.InferenceServerException, match="not loaded"):
        triton.infer("digits", [tensor(digits[0], binary=True)])
    assert triton.get_model_repository_index()[0]["state"] == "UNAVAILABLE"
    triton.load_model("digits")
    assert triton.is_model_ready("digits")
    triton.infer("digits", [tensor(digits[0], binary=True)])
    with pytest.raises(utils.InferenceServerException, match="no model 'pears'"):
        triton.load_model("pears")
    with pytest.raises(utils.InferenceServerException, match="as it was promoted"):
        triton.load_model("digits", config="{}")


def faults():
    """Return requests with one fault each, and a word of the expected message."""
    good = {"name": "input", "shape": [1, 1, 32, 32], "datatype": "UINT8", "data": [0] * 1024}
    one = lambda **changed: {"inputs": [{**good, **changed}]}  # noqa: E731
    return [
        ([], "object"),
        ({}, "inputs"),
        ({"inputs": {}}, "inputs"),
        ({"inputs": [3]}, "inputs[0].name"),
        (one(name="inputs"), "inputs[0].name"),
        ({"inputs": [good, good]}, "inputs[1].name"),
        (one(datatype="FP32"), "datatype"),
        (one(datatype=None), "datatype"),
        (one(shape=[1, 1024]), "shape"),
        (one(shape=[0, 1, 32, 32]), "shape"),
        (one(shape=[-1, 1, 32, 32]), "shape"),
        (one(shape=[True, 1, 32, 32]), "shape"),
        (one(shape="wide"), "shape"),
        (one(shape=[2**70, 1, 32, 32]), "elements"),
        (one(data=[0] * 1023), "elements"),
        (one(data=[256] + [0] * 1023), "range"),
        (one(data=[-1] + [0] * 1023), "range"),
        (one(data=[0.5] * 1024), "data"),
        (one(data=["1"] * 1024), "data"),
        (one(data=[True] * 1024), "data"),
        (one(data=[[0, 0], [0]]), "data"),
        (one(data=[10**400] * 1024), "data"),
        (one(data=None), "data"),
        (one(data={}), "data"),
        (one(parameters=[]), "parameters"),
        (one(parameters={"binary_data_size": -1}), "binary_data_size"),
        (one(parameters={"binary_data_size": "9"}), "binary_data_size"),
        (one(parameters={"shared_memory_region": "x"}), "shared memory"),
        ({**one(), "id": 3}, "id"),
        ({**one(), "id": "x" * 300}, "id"),
        ({**one(), "outputs": "all"}, "outputs"),
        ({**one(), "outputs": [{"name": "logits"}]}, "outputs[0].name"),
        ({**one(), "outputs": [{"name": "prediction"}] * 2}, "outputs[1].name"),
        ({**one(), "outputs": [{"name": "prediction", "parameters": {"classification": 3}}]}, "classification"),
        ({**one(), "outputs": [{"name": "prediction", "parameters": {"binary_data": 1}}]}, "binary_data"),
        ({**one(), "parameters": {"binary_data_output": "yes"}}, "binary_data_output"),
    ]


def test_each_fault_of_a_request_is_named(client):
    server, _ = client
    for body, words in faults():
        answer = server.request("POST", "/v2/models/digits/infer", body)
        assert answer.status == 400, (str(body)[:200], answer.body)
        assert words in answer.json["error"], (str(body)[:200], answer.json)


def test_binary_tensors_must_have_the_size_in_the_header(client):
    server, _ = client
    head = {"name": "input", "shape": [1, 1, 32, 32], "datatype": "UINT8", "parameters": {"binary_data_size": 1024}}
    text = json.dumps({"inputs": [head]}).encode()
    path, name = "/v2/models/digits/infer", "Inference_Header_Content_Length"
    good = server.request("POST", path, text + bytes(1024), **{name: str(len(text))})
    assert good.status == 200
    for body, length, words in [
        (text + bytes(1024), "99999", "Content-Length"),
        (text + bytes(1024), "-3", "Content-Length"),
        (text, "9" * 5000, "Content-Length"),
        (text + bytes(1000), str(len(text)), "elements"),
        (text + bytes(1025), str(len(text)), "1 bytes follow"),
        (text, None, "elements"),
    ]:
        headers = {} if length is None else {name: length}
        answer = server.request("POST", path, body, **headers)
        assert answer.status == 400, (length, answer.body)
        assert words in answer.json["error"], answer.json


def test_table_model_is_served_and_refuses_nan(serving, table_run):
    model = load_inference_model(table_run)
    stored = model.inputs.decode({"size": 1.0, "weight": 2.0, "color": "blue"})[None]
    with serving(table_run) as server:
        name = server.service.models.default_name
        triton = tritonclient.InferenceServerClient(f"127.0.0.1:{server.port}")
        given = tritonclient.InferInput("input", list(stored.shape), "FP32")
        given.set_data_from_numpy(stored.numpy())
        result = triton.infer(name, [given])
        expected = model.outputs(stored).softmax(1).numpy()
        np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-6)
        given.set_data_from_numpy(np.full(stored.shape, np.nan, dtype=np.float32))
        with pytest.raises(utils.InferenceServerException, match="NaN"):
            triton.infer(name, [given])
        triton.close()
