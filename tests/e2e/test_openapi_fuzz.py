"""What the OpenAPI document promises, tried with inputs made from it."""

from itertools import product
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from tests.e2e.server import Server

EXAMPLES = 40
DOCUMENTED_FAILURES = {503, 507}
CONFORMANCE = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
CHEAP = {"width": 256, "height": 256, "num_inference_steps": 1, "num_images": 1}


@pytest.fixture(scope="module")
def api(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.client.base_url}/openapi.json")


def cheap(body: Any) -> Any:
    """The body with what is allowed made cheap to draw, and what is not left as it is."""
    if not isinstance(body, dict):
        return body
    capped = {
        name: least
        for name, least in CHEAP.items()
        if type(body.get(name, least)) is int and least <= body.get(name, least) <= 1024
    }
    return {**body, **capped}


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        ("/health", "GET", GenerationMode.POSITIVE),
        ("/cache", "GET", GenerationMode.POSITIVE),
        ("/cache", "DELETE", GenerationMode.POSITIVE),
        *product(["/generate", "/generate/image"], ["POST"], GenerationMode),
    ],
)
def test_no_input_breaks_the_server(api: Any, path: str, method: str, mode: GenerationMode) -> None:
    cases = api[path][method].as_strategy(generation_mode=mode)
    statuses = set()

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=cases)
    def try_it(case: Any) -> None:
        case.body = cheap(case.body)
        answer = case.call()
        assert answer.status_code < 500 or answer.status_code in DOCUMENTED_FAILURES, answer.text
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS.get_by_names(CONFORMANCE))

    try_it()
    assert (200 if mode is GenerationMode.POSITIVE else 422) in statuses
