"""The document of the API is true: requests drawn from it are answered as it says, and never by a 5xx."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from serve.api.openai import CompletionBody
from tests.faults.fuzz.world import build_world

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return build_world(tmp_path_factory.mktemp("described"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_each", [3, pytest.param(300, marks=pytest.mark.slow)])
def test_what_the_document_offers_is_answered_as_it_says(app: FastAPI, num_each: int) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) == sum(map(len, app.openapi()["paths"].values())) >= 39
    for operation in operations:
        call_some(operation, num_each)


def call_some(operation: schemathesis.APIOperation[Any, Any, Any, Any], num: int) -> None:
    @settings(max_examples=num, phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None)
    @seed(0)
    @given(case=operation.as_strategy())
    def call(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(checks=CHECKS)

    call()


def test_bodies_are_in_the_document_as_they_are_checked(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(CompletionBody.model_fields)
    assert body["required"] == ["model"] and body["properties"]["n"]["anyOf"][0]["maximum"] == 16
    assert "$ref" not in str(paths)
    without = [
        f"{method} {path}"
        for path, operations in paths.items()
        for method, operation in operations.items()
        if method == "post" and "requestBody" not in operation
    ]
    actions = ("cancel", "pause", "resume", "pull", "enable")
    assert all(route.endswith(actions) for route in without)
    assert all("422" not in operation["responses"] for one in paths.values() for operation in one.values())
