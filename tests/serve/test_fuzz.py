"""schemathesis against the OpenAPI document, and malformed requests: always an answer, never a 5xx."""

from __future__ import annotations

import pytest

from .conftest import wait_until
from .malformed import run_malformed

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance  # noqa: E402

EXAMPLES = 12  # of each operation


def test_schemathesis_finds_no_5xx(serve):
    server = serve()
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    called = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        _call(operation)
        called.add((operation.method, operation.path))
        for video in server.http.get("/v1/videos?limit=100").json()["data"]:
            server.http.delete(f"/v1/videos/{video['id']}")
    assert len(called) >= 14


def _call(operation):
    @given(case=operation.as_strategy())
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def call(case):
        response = case.call(timeout=20)
        checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
        case.validate_response(response, checks=checks)

    call()


def test_malformed_requests(serve):
    server = serve()
    report = run_malformed(server.url, count=400, seed=1)
    assert report["answered"] == 400 and report["5xx"] == 0 and report["2xx"] == 0, report
    assert report["without_message"] == 0
    wait_until(lambda: server.http.get("/v1/videos").json()["data"] == [])
