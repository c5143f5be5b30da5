"""Schemathesis tests the server against its OpenAPI document, with valid and invalid requests.

`TUNEFORGE_CASES=2000` sets the number of requests; by default there are far fewer.
"""

from __future__ import annotations

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tuneforge_serve.server.routes_feedback import feedback_routes

CASES = int(os.environ.get("TUNEFORGE_CASES", "60"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture
def logging(request_log):
    """The options of a server that logs its requests."""
    return {"request_log": request_log, "extra_routes": [feedback_routes(request_log)]}


def routes_of(app):
    """Return path and method of every route."""
    return {(route.path, each.lower()) for route in app.routes for each in route.methods if each != "HEAD"}


@pytest.mark.parametrize("is_logged", [False, True])
def test_document_describes_every_route_and_no_other(is_logged, serving, table_run, logging):
    with serving(table_run, **(logging if is_logged else {})) as server:
        paths = server.request("GET", "/openapi.json").json["paths"]
        known = routes_of(server.app)
    assert {(path, method) for path, operations in paths.items() for method in operations} == known
    assert (("/feedback", "post") in known) == is_logged


def test_label_response_fits_the_document(serving, table_run, logging):
    row = {"size": 1.5, "weight": -0.5, "color": "red"}
    with serving(table_run, **logging) as server:
        base = f"http://127.0.0.1:{server.port}"
        schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
        for name in ("apple", "plum"):
            body = {"id": server.request("POST", "/predict", row).json["id"], "class": name}
            label = schema["/feedback"]["POST"].Case(body=body, media_type="application/json")
            assert label.call_and_validate(base_url=base, checks=CHECKS).status_code == 200
        server.request("POST", "/predict", row)
        for path in ("/review/next", "/monitoring"):
            assert schema[path]["GET"].Case().call_and_validate(base_url=base, checks=CHECKS).status_code == 200


@pytest.mark.parametrize("model", ["table", "digits"])
def test_responses_fit_the_document(model, serving, request, logging):
    with serving(request.getfixturevalue(f"{model}_run"), **logging) as server:
        server.service.models.unload = lambda name: server.service.models.get(name)  # keeps the model
        base = f"http://127.0.0.1:{server.port}"
        schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) == len(routes_of(server.app)) - 1  # all except the document itself
        varied = [each for each in operations if len(each.body) or len(each.path_parameters) or len(each.query)]
        share = CASES // (2 * 2 * len(varied))  # two models and two modes
        count = max(1, share * 4 // 3)  # some operations have few different cases
        num_cases = sum(cases_of(each, GenerationMode.POSITIVE, base, count=count) for each in varied)
        num_cases += sum(cases_of(each, GenerationMode.NEGATIVE, base, count=count) for each in varied)
        num_cases += sum(
            cases_of(each, GenerationMode.POSITIVE, base, count=1) for each in operations if each not in varied
        )
        assert server.request("GET", "/v2/health/ready").status == 200
    assert num_cases > CASES // 3
    print(f"\n{model}: {num_cases} cases")


def cases_of(operation, mode, base: str, *, count: int) -> int:
    """Send generated cases of an operation, check each response, and return their number."""
    num_cases = 0

    @seed(0)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        nonlocal num_cases
        num_cases += 1
        case.call_and_validate(base_url=base, checks=CHECKS, timeout=20)

    send()
    return num_cases
