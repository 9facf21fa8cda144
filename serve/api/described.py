"""What /openapi.json says beyond the routes themselves: bodies, which are read by hand, and errors.

Bodies come from the models by which they are checked, so that the document cannot say anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serve.api.status import is_openai

_TEXT_OR_NULL = {"type": ["string", "null"]}
_OPENAI_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": _TEXT_OR_NULL,
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_TGI_ERROR = {
    "type": "object",
    "properties": {
        "error": {"type": "string"},
        "error_type": {"enum": ["validation", "generation", "overloaded"]},
        "estimated_time": {"type": "integer"},
    },
    "required": ["error"],
}
_FILE = {"type": "string", "format": "binary"}


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body is JSON of that kind."""
    return _body("application/json", _inlined(kind))


def takes_form(
    kind: type[BaseModel] | None = None, *, files: Mapping[str, str], more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body is a form of files and small fields.

    `files`: name -> "one" or "many" of them, which it needs, or "maybe". `more`: schemas of fields beside the kind's.
    """
    fields: dict[str, Any] = _inlined(kind)["properties"] if kind else {}
    parts = {name: {"type": "array", "items": _FILE} if count == "many" else _FILE for name, count in files.items()}
    needed = [name for name, count in files.items() if count != "maybe"]
    properties = {**fields, **(more or {}), **parts}
    return _body("multipart/form-data", {"type": "object", "properties": properties, "required": needed})


def answers(media_type: str, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: what comes with 200 where that is no JSON, and which other statuses are no errors."""
    others: dict[int | str, dict[str, Any]] = {status: {"description": "No body"} for status in statuses}
    return {200: {"description": "OK", "content": {media_type: {}}}, **others}


def describe(app: FastAPI) -> None:
    """Has the document of `app` tell of errors as `serve.api.status` sends them."""
    without_errors = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            whole = without_errors()
            for path, operations in whole["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # FastAPI's own, in a shape that is not ours
                    operation["responses"].update(_errors(path))
            whole.get("components", {}).pop("schemas", None)  # of that 422 alone: bodies have theirs within
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _errors(path: str) -> dict[str, Any]:
    schema = _OPENAI_ERROR if is_openai(path) else _TGI_ERROR
    content = {"application/json": {"schema": schema}}
    return {
        "4XX": {"description": "Refused", "content": content},
        "5XX": {"description": "Not now, or broken", "content": content},
    }


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


@cache  # a third of what building the API takes
def _inlined(kind: type[BaseModel]) -> dict[str, Any]:
    """The model's schema without references, which would point into the whole document. Not to be changed."""
    schema = kind.model_json_schema()
    defined = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(defined[node["$ref"].removeprefix("#/$defs/")])
            return {key: resolve(value) for key, value in node.items()}
        return [resolve(item) for item in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = resolve(schema)
    return resolved
