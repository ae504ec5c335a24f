"""The app's schema is true: schemathesis sends what it allows and what it forbids, and nothing is a server error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from scripted_engine import KEY, RunningServer, ScriptedEngine, serving  # noqa: E402

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def server(three_templates: Any) -> Iterator[RunningServer]:
    with serving(ScriptedEngine(), three_templates) as server:
        yield server


@pytest.fixture(scope="module")
def api(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(
    ("method", "path", "mode", "status"),
    [
        ("POST", "/v1/chat/completions", GenerationMode.POSITIVE, 200),
        ("POST", "/v1/chat/completions", GenerationMode.NEGATIVE, 400),
        ("POST", "/v1/completions", GenerationMode.POSITIVE, 200),
        ("POST", "/v1/completions", GenerationMode.NEGATIVE, 400),
        ("GET", "/v1/models/{model}", GenerationMode.POSITIVE, 404),
        ("GET", "/v1/models", GenerationMode.POSITIVE, 200),
    ],
)
def test_the_schema_is_true(api, method, path, mode, status):
    statuses = Counter[int]()

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(api[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS, timeout=20)
        statuses[response.status_code] += 1

    check()
    assert statuses[status], statuses  # otherwise nothing of interest was sent


def test_the_schema_has_every_route_its_errors_and_the_key(server):
    description = server.client.get("/openapi.json").json()
    assert description["paths"].keys() == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}", "/health", "/metrics",
    }  # fmt: skip
    for path, methods in description["paths"].items():
        for operation in methods.values():
            assert operation["responses"].keys() == {"200", "4XX", "5XX"}
            assert ("security" in operation) == path.startswith("/v1")
