"""The page of a model that is not here: fetched from the Hub by a button, with its progress while it comes.

Who pulls, and what for, is known in this gateway alone; the store sees to it that a model is fetched once. A page that
another gateway answers says that it may be coming, and looks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fastapi import Request
from starlette.responses import Response

from serve.api.pull import Pull, Pulls
from serve.api.service import Service
from serve.api.status import retry_headers, status_of
from serve.errors import Conflict, RookeryError
from serve.types import ModelId, ModelInfo, PullProgress
from serve.web.pages import Pages, bot_url, go

_PATIENCE_S = 2.0  # a small model is here by then, and nobody sees a page of progress
_MAX_KNOWN = 64  # pulls whose end somebody may still come to see


class Fetching:
    """The pulls that were begun on these pages. All that is told of them is told to who may begin them."""

    def __init__(self, service: Service, pages: Pages) -> None:
        self._service, self._pages = service, pages
        self._pulls = Pulls(service.metrics)
        self._known: dict[str, Pull] = {}  # by the model's id in lower case, until its end has been shown

    def show(self, request: Request, model: ModelId, *, is_asked_for: bool) -> Response:
        """That it is not here, and how its fetch goes. `is_asked_for`: perhaps another gateway fetches it."""
        self._forget_arrived()
        may_fetch = self._service.access.caller(request).is_admin
        pull = self._known.get(_key(model)) if may_fetch else None
        if pull is None and is_asked_for and may_fetch:  # live.js tries again, and goes on with what it shows
            return self._render(request, model, 409, is_asked_for=True)
        if pull is None:
            return self._render(request, model, 404)
        if isinstance(pull.result, RookeryError):
            del self._known[_key(model)]
            return self._render(request, model, 200, error=pull.result.message)  # live.js shows no other
        return self._render(request, model, 200, progress=pull.progress)

    async def begin(self, request: Request, model: ModelId) -> Response:
        """The answer is the page of its progress: by GET another gateway might answer. Raises: Conflict, Overloaded."""
        if self._service.puller is None:
            raise Conflict(f"'{model}' cannot be fetched: this server has its Hub switched off (ROOKERY_HUB_ENABLED).")
        pull = self._pulls.join(model, _name(model), self._service.puller)
        self._forget_arrived()
        while len(self._known) >= _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[_key(model)] = pull
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await pull.wait_until_ended()
        except TimeoutError:
            return self._render(request, model, 200, progress=pull.progress)
        except RookeryError as exc:
            self._known.pop(_key(model), None)
            status = status_of(exc, "/v1")
            return self._render(request, model, status, error=exc.message, headers=retry_headers(exc, status))
        return go(bot_url(_name(model)))

    def _forget_arrived(self) -> None:
        """Those have a page of their own."""
        self._known = {key: pull for key, pull in self._known.items() if not isinstance(pull.result, ModelInfo)}

    def _render(
        self,
        request: Request,
        model: ModelId,
        status: int,
        *,
        progress: PullProgress | None = None,
        error: str = "",
        is_asked_for: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        return self._pages.render(
            request,
            "bot_missing.html",
            status,
            headers,
            model_id=_name(model),
            can_fetch=self._service.puller is not None,
            progress=progress,
            error=error,
            is_asked_for=is_asked_for,
        )


def _name(model: ModelId) -> str:
    return f"{model}@{model.revision}" if model.revision else str(model)


def _key(model: ModelId) -> str:
    return _name(model).lower()
