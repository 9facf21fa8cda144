"""The one place where an error becomes an HTTP status and a body.

OpenAI's shape under /v1, text-generation-inference's elsewhere. Bodies are at most 4 KB and never carry what
the caller sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve.errors import (
    BadUpload,
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    DiskFull,
    GenerationFailed,
    InvalidRequest,
    ModelDisabled,
    ModelGated,
    ModelNotFound,
    ModelTooLarge,
    ModelUnusable,
    NotFound,
    NotOwner,
    OutOfMemory,
    Overloaded,
    QuotaExceeded,
    RookeryError,
    StoreUnavailable,
)

T = TypeVar("T")

# What somebody sees of an error; None where no page is asked for.
ErrorPage = Callable[[Request, RookeryError], Response | None]


class RouteNotFound(RookeryError):
    code = "unknown_url"


class MethodNotAllowed(RookeryError):
    code = "method_not_allowed"


class BodyTooLarge(RookeryError):
    code = "payload_too_large"


class UnsupportedMediaType(RookeryError):
    code = "unsupported_media_type"


class BodyTooSlow(RookeryError):
    code = "request_timeout"


class KeyNeeded(RookeryError):
    code = "invalid_api_key"  # OpenAI's


class ScopeNeeded(RookeryError):
    """A good key, which does not open this."""

    code = "insufficient_scope"  # RFC 6750

    def __init__(self, needed: Collection[str], has: Collection[str]) -> None:
        self.scopes = " ".join(needed)
        super().__init__(
            f"This takes a key with the scope {' or '.join(map(repr, map(str, needed)))}; yours has "
            f"{', '.join(map(repr, map(str, sorted(has)))) or 'none'}. Whoever runs this server can make another key."
        )


class KeyInAddress(RookeryError):
    code = "key_in_address"


class CrossSite(RookeryError):
    code = "cross_site_request"


class UnknownHost(RookeryError):
    code = "unknown_host"


STATUS: Mapping[type[RookeryError], int] = {
    InvalidRequest: 400,
    ContextLengthExceeded: 400,
    BadUpload: 400,
    KeyInAddress: 400,
    KeyNeeded: 401,
    ScopeNeeded: 403,
    NotOwner: 403,
    CrossSite: 403,
    UnknownHost: 403,
    ModelDisabled: 403,
    ModelGated: 403,
    ModelNotFound: 404,
    NotFound: 404,
    RouteNotFound: 404,
    MethodNotAllowed: 405,
    BodyTooSlow: 408,
    Conflict: 409,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    ModelUnusable: 422,
    ModelTooLarge: 422,
    Overloaded: 429,
    QuotaExceeded: 429,
    RookeryError: 500,
    StoreUnavailable: 503,
    OutOfMemory: 503,
    DeadlineExceeded: 504,
    DiskFull: 507,
}

# text-generation-inference's own words and statuses (Source: its router/src/infer, `InferError`); kinds it does
# not know go without a type, and huggingface_hub then raises by the status.
_TGI: Mapping[type[RookeryError], tuple[str, int]] = {
    InvalidRequest: ("validation", 422),
    GenerationFailed: ("generation", 424),
    Overloaded: ("overloaded", 429),
}

# The openai client repeats 408, 409, 429 and every 5xx twice; for these a second try gives the same answer.
_FINAL = (Conflict, GenerationFailed, DeadlineExceeded, BodyTooSlow, DiskFull, QuotaExceeded)

_MAX_MESSAGE = 1000
_MAX_ERRORS = 5


def status_of(error: RookeryError, path: str) -> int:
    """The HTTP status of `error` on `path`."""
    tgi = None if is_openai(path) else _nearest(_TGI, error)
    status = _nearest(STATUS, error)
    assert status is not None
    return tgi[1] if tgi else status


def body_of(error: RookeryError, path: str) -> dict[str, Any]:
    """The JSON body of `error` in the shape that callers of `path` expect."""
    message = error.message[:_MAX_MESSAGE]
    if is_openai(path):
        status = status_of(error, path)
        kind = "invalid_request_error" if status < 500 else "server_error"
        overloaded = isinstance(error, Overloaded)
        return {
            "error": {
                "message": message,
                "type": "rate_limit_error" if overloaded else kind,
                "param": error.param,
                "code": "rate_limit_exceeded" if overloaded else error.code,
            }
        }
    body: dict[str, Any] = {"error": message}
    if tgi := _nearest(_TGI, error):
        body["error_type"] = tgi[0]
    if isinstance(error, StoreUnavailable):
        body["estimated_time"] = _retry_after(error)  # the old Inference API's word for Retry-After
    return body


def reply_to(error: RookeryError, path: str) -> Response:
    """The whole HTTP answer for `error`, to a program."""
    status = status_of(error, path)
    headers = retry_headers(error, status) | challenge(error)
    if isinstance(error, _FINAL):
        headers["x-should-retry"] = "false"
    return json_reply(body_of(error, path), status, headers)


def answer_to(error: RookeryError, request: Request, error_page: ErrorPage | None) -> Response:
    """A page to whom `error_page` has one for, else JSON."""
    page = error_page(request, error) if error_page else None
    return page or reply_to(error, request.scope["path"])


def retry_headers(error: RookeryError, status: int) -> dict[str, str]:
    """When to come back, of what may be over by then."""
    return {"retry-after": str(_retry_after(error))} if status in (429, 503, 507) else {}


def challenge(error: RookeryError) -> dict[str, str]:
    """What kind of key is wanted, where one is. Source: RFC 6750, section 3."""
    if isinstance(error, ScopeNeeded):
        return {"www-authenticate": f'Bearer error="{error.code}", scope="{error.scopes}"'}
    return {"www-authenticate": "Bearer"} if isinstance(error, KeyNeeded) else {}


def json_reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: any text a model or a user can produce survives it."""
    return Response(to_json(content), status, dict(headers or {}), media_type="application/json")


def to_json(content: Any) -> bytes:
    """ASCII on purpose: some clients split event streams at U+2028, and a lone surrogate has no UTF-8."""
    try:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
    except ValueError:
        return to_json(_finite(content))


def _finite(content: Any) -> Any:
    """null for the numbers that JSON lacks: one step's NaN must not hide a whole job."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def is_openai(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def invalid(errors: ValidationError | RequestValidationError) -> InvalidRequest:
    """Pydantic's findings as one error of ours: fields are named, values are not repeated."""
    if isinstance(errors, ValidationError):
        found = errors.errors(include_url=False, include_context=False, include_input=False)[:_MAX_ERRORS]
        paths = [_dotted(error["loc"]) for error in found]
    else:  # FastAPI's own, for query parameters: ("query", "limit")
        found = list(errors.errors())[:_MAX_ERRORS]
        paths = [_dotted(error["loc"][1:]) for error in found]
    said = [
        f"'{path}': {error['msg']}" if path else str(error["msg"]) for path, error in zip(paths, found, strict=True)
    ]
    return InvalidRequest("; ".join(said)[: _MAX_MESSAGE - 1] + ".", param=paths[0] or None)


def install(app: FastAPI, error_page: ErrorPage | None = None) -> None:
    """Makes `app` answer every error in our shapes."""

    async def on_rookery_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RookeryError)
        return answer_to(error, request, error_page)

    async def on_bad_query(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer_to(invalid(error), request, error_page)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reply = answer_to(_from_http(error), request, error_page)
        if reply.status_code == error.status_code:
            reply.headers.update(error.headers or {})  # `Allow` of a 405
        return reply

    app.add_exception_handler(RookeryError, on_rookery_error)
    app.add_exception_handler(RequestValidationError, on_bad_query)
    app.add_exception_handler(HTTPException, on_http_error)


def _from_http(error: HTTPException) -> RookeryError:
    if error.status_code == 404:
        return RouteNotFound("There is nothing at this address; see /openapi.json for what there is.")
    if error.status_code == 405:
        return MethodNotAllowed("This address does not take that method; see the 'Allow' header.")
    return InvalidRequest("The request cannot be read.")


def _nearest(table: Mapping[type[RookeryError], T], error: RookeryError) -> T | None:
    return next((table[kind] for kind in type(error).__mro__ if kind in table), None)


def _retry_after(error: RookeryError) -> int:
    return max(1, math.ceil(error.retry_after_s or 1.0))


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:64] for part in loc)
