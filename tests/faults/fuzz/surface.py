"""Where requests can go: every route of the service's own document, its pages, and the Hub's paths."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODEL = "tiny/base"  # the one model that is there
_GONE = "tiny/gone"  # for what would change or remove it

# What the document leaves out: pages are for people, and the Hub's paths are the Hub's.
_PAGES = """
    GET / GET /login POST /login POST /logout GET /make POST /make GET /make/review HEAD /make/review
    POST /make/review GET /jobs GET /jobs/{job_id} POST /jobs/{job_id} GET /admin GET /admin/top
    GET /bots/{model} POST /bots/{model} GET /static/{digest}/{name} GET /favicon.ico GET /openapi.json
"""
_HUB = """
    GET /api/models GET /api/models-tags-by-type GET /api/datasets/{rest} GET /api/whoami-v2 GET /api/models/{model}
    GET /api/models/{model}/tree/{rest} POST /api/models/{model}/paths-info/{rest} GET /api/models/{model}/refs
    GET /api/models/{model}/commits/{rest} GET /api/models/{model}/discussions/{number}
    PUT /api/models/{model}/settings GET /api/models/{model}/{word} GET /{model}/resolve/{rest}
    HEAD /{model}/resolve/{rest} GET /{model}/raw/{rest} POST /api/{rest} POST /{model}.git/{rest}
"""
_FORMS = ("/login", "/make/review", "/jobs/{job_id}", "/bots/{model}", "/api/models/{model}/paths-info/{rest}")
_UPLOADS = ("/make",)

# The least that is accepted, so that one thing alone is wrong.
GOOD: Mapping[str, Mapping[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": "a", "max_tokens": 1},
    "/generate": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/generate_stream": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/models/{model}": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/v1/fine_tuning/jobs": {"model": MODEL, "training_file": "file-0"},
    "/v1/models/{model}/rollback": {"revision": "0" * 40},
    "/v1/models/{model}/preview": {"text": "a", "prompt": ""},
    "/api/models/{model}/settings": {"private": True},
}


@dataclass(frozen=True, slots=True)
class Route:
    """`media_type`: of its body, "" where it takes none. `fields`: names in it, those of `parameters` dotted."""

    method: str
    path: str
    media_type: str = ""
    fields: tuple[str, ...] = ()
    query: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether it might change the model, and must not be asked for the real one."""
        return self.method in ("DELETE", "PUT") or (self.method == "POST" and "{model}/" in self.path)

    @property
    def model(self) -> str:
        return _GONE if self.changes else MODEL


@dataclass(frozen=True, slots=True)
class Surface:
    """All routes, and those of one kind."""

    routes: tuple[Route, ...]
    json: tuple[Route, ...] = field(init=False)
    forms: tuple[Route, ...] = field(init=False)
    writing: tuple[Route, ...] = field(init=False)  # that write texts

    def __post_init__(self) -> None:
        kinds = {
            "json": [one for one in self.routes if one.media_type == "application/json"],
            "forms": [one for one in self.routes if one.media_type == "multipart/form-data"],
            "writing": [one for one in self.routes if {"prompt", "inputs"} & set(one.fields) and not one.changes],
        }
        for name, routes in kinds.items():
            object.__setattr__(self, name, tuple(routes))


def read_surface(url: str) -> Surface:
    """Asks the service itself."""
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=30) as reply:
        return surface_of(json.load(reply))


def surface_of(document: Mapping[str, Any]) -> Surface:
    """Of an OpenAPI document."""
    documented = [
        _route(method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    words = (_PAGES + _HUB).split()
    others = [_undocumented(method, path) for method, path in zip(words[::2], words[1::2], strict=True)]
    return Surface(tuple(documented + others))


def _route(method: str, path: str, operation: Mapping[str, Any]) -> Route:
    query = tuple(one["name"] for one in operation.get("parameters", ()) if one["in"] == "query")
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        return Route(method, path, media_type, tuple(_names(content["schema"])), query)
    return Route(method, path, query=query)


def _names(schema: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, of in schema.get("properties", {}).items():
        names.append(prefix + name)
        for option in of.get("anyOf", [of]):
            names += _names(option, f"{prefix}{name}.")
    return names


def _undocumented(method: str, path: str) -> Route:
    if method not in ("POST", "PUT"):
        return Route(method, path, query=("limit", "search", "after", "next", "cursor", "expand"))
    if path in _UPLOADS:
        return Route(method, path, "multipart/form-data", ("archive", "handle"))
    if path in _FORMS:
        return Route(method, path, "application/x-www-form-urlencoded", ("key", "next", "do", "paths", "file", "seed"))
    return Route(method, path, "application/json", ("private", "visibility"))
