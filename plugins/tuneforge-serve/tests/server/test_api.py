"""The OpenAPI description holds: schemathesis asks what it says, and what it does not say.

`TUNEFORGE_CASES=2000` asks so many times in all; by default far fewer.
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
def keeping(request_log):
    """What a server is given that keeps its requests."""
    return {"request_log": request_log, "extra_routes": [feedback_routes(request_log)]}


def routes_of(app):
    """Path and method of everything that the application answers."""
    return {(route.path, each.lower()) for route in app.routes for each in route.methods if each != "HEAD"}


@pytest.mark.parametrize("kept", [False, True])
def test_every_route_is_described_and_nothing_else(kept, serving, table_run, keeping):
    with serving(table_run, **(keeping if kept else {})) as server:
        paths = server.request("GET", "/openapi.json").json["paths"]
        known = routes_of(server.app)
    assert {(path, method) for path, operations in paths.items() for method in operations} == known
    assert (("/feedback", "post") in known) == kept


def test_a_label_is_answered_as_described(serving, table_run, keeping):
    row = {"size": 1.5, "weight": -0.5, "color": "red"}
    with serving(table_run, **keeping) as server:
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
def test_the_description_holds(model, serving, request, keeping):
    with serving(request.getfixturevalue(f"{model}_run"), **keeping) as server:
        server.service.models.unload = lambda name: server.service.models.get(name)  # else nothing is left to ask
        base = f"http://127.0.0.1:{server.port}"
        schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) == len(routes_of(server.app)) - 1  # all but the description itself
        varied = [each for each in operations if len(each.body) or len(each.path_parameters) or len(each.query)]
        share = CASES // (2 * 2 * len(varied))  # of two models and two modes
        count = max(1, share * 4 // 3)  # some operations have only so many different cases
        asked = sum(cases_of(each, GenerationMode.POSITIVE, base, count=count) for each in varied)
        asked += sum(cases_of(each, GenerationMode.NEGATIVE, base, count=count) for each in varied)
        asked += sum(
            cases_of(each, GenerationMode.POSITIVE, base, count=1) for each in operations if each not in varied
        )
        assert server.request("GET", "/v2/health/ready").status == 200
    assert asked > CASES // 3
    print(f"\n{model}: {asked} cases")


def cases_of(operation, mode, base: str, *, count: int) -> int:
    """Ask so many cases of an operation, and check each answer; how many it could make up."""
    asked = 0

    @seed(0)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        nonlocal asked
        asked += 1
        case.call_and_validate(base_url=base, checks=CHECKS, timeout=20)

    ask()
    return asked
