"""Routes whose errors are told as the Hugging Face Hub tells them: by headers its clients choose what to raise."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response

from serve.api.access import sent_key
from serve.api.status import MethodNotAllowed, invalid, json_reply, reply_to
from serve.errors import InvalidRequest, ModelNotFound, NotFound, RookeryError


class RepoNotFound(ModelNotFound):
    """No model of that name for this caller."""


class RevisionNotFound(ModelNotFound):
    """The model is here, but not that revision."""


class EntryNotFound(NotFound):
    """The revision is here, but it has no such file."""

    def __init__(self, message: str, revision: str) -> None:
        super().__init__(message)
        self.revision = revision


_CODES: dict[type[RookeryError], str] = {
    RepoNotFound: "RepoNotFound",
    RevisionNotFound: "RevisionNotFound",
    EntryNotFound: "EntryNotFound",
}


class HubRoute(APIRoute):
    """A route of the Hub's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def answer_as_hub(request: Request) -> Response:
            try:
                return await answer(request)
            except RookeryError as exc:
                return _refusal(exc, request)
            except RequestValidationError as exc:
                return _refusal(invalid(exc), request)

        return answer_as_hub


def _refusal(error: RookeryError, request: Request) -> Response:
    reply = reply_to(error, request.url.path)
    if isinstance(error, InvalidRequest):
        reply = json_reply({"error": error.message}, 400)
    if isinstance(error, RepoNotFound) and not sent_key(request):
        reply = json_reply({"error": error.message}, 401, {"www-authenticate": "Bearer"})  # as the Hub: log in first
    if isinstance(error, EntryNotFound):
        reply.headers["x-repo-commit"] = error.revision  # clients remember that it has none
    if isinstance(error, MethodNotAllowed):
        reply.headers["allow"] = "GET, HEAD"
    if code := _CODES.get(type(error)):
        reply.headers["x-error-code"] = code
    reply.headers["x-error-message"] = re.sub(r"[^ -~]", "?", error.message)[:500]
    return reply
