"""Schemathesis over the OpenAPI schema: whatever is sent, no answer is the server's failure."""

from __future__ import annotations

import asyncio

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from lorchestra.serve.app import HttpSettings, create_app

HEADERS = {"Authorization": "Bearer one"}


@pytest.fixture
def app(gateway):
    return create_app(gateway, HttpSettings(runtime_adapters=True))


def test_the_schema_has_every_route_and_resolves(app):
    schema = app.openapi()
    assert set(schema["paths"]) == {
        "/v1/models", "/v1/models/{model_id}", "/v1/completions", "/v1/chat/completions", "/health", "/ready",
        "/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
    }  # fmt: skip
    known = set(schema["components"]["schemas"])
    assert {"CompletionRequest", "ChatRequest", "ChatMessage", "StreamOptions", "Refused"} <= known


@pytest.mark.slow
@pytest.mark.parametrize("model", [None, "base", "clinic"])
def test_nothing_that_is_sent_makes_it_fail(app, gateway, model):
    """``model``: put into every request, so that generated requests reach the engine and not only the router."""
    asyncio.run(gateway.engine.start())
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    reached = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=40, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(operation.as_strategy())
        def check(case):
            nonlocal reached
            if model is not None and isinstance(case.body, dict):
                case.body = case.body | {"model": model, "max_tokens": 2, "n": 1}
            response = case.call(headers=HEADERS)
            reached += response.status_code == 200
            case.validate_response(
                response, checks=[not_a_server_error, response_schema_conformance, status_code_conformance]
            )

        check()
    assert reached > 5
