"""The page of a model that is not here: fetched from the Hub by a button, with its progress while it comes.

Who pulls, and what for, is known in this process alone; the store sees to it that a model is fetched once.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fastapi import Request
from starlette.responses import Response

from serve.api.pull import Pull, Pulls
from serve.api.service import Service
from serve.errors import Conflict, RookeryError
from serve.types import ModelId
from serve.web.pages import Pages, bot_url, go

_PATIENCE_S = 2.0  # a small model is here by then, and nobody sees a page of progress
_MAX_KNOWN = 64  # pulls whose end somebody may still come to see


class Fetching:
    """The pulls that were begun on these pages."""

    def __init__(self, service: Service, pages: Pages) -> None:
        self._service, self._pages = service, pages
        self._pulls = Pulls(service.metrics)
        self._known: dict[str, Pull] = {}  # by the model's id in lower case

    def show(self, request: Request, model: ModelId) -> Response:
        """That it is not here, and what can be done."""
        pull = self._known.get(_key(model))
        result = pull.result if pull else None
        return self._pages.render(
            request,
            "bot_missing.html",
            200 if pull else 404,  # live.js takes over no other
            model_id=_name(model),
            can_fetch=self._service.puller is not None,
            progress=pull.progress if pull and result is None else None,
            error=result.message if isinstance(result, RookeryError) else "",
        )

    async def begin(self, model: ModelId) -> Response:
        """Raises: Conflict, Overloaded, and what the Hub refuses at once."""
        if self._service.puller is None:
            raise Conflict(f"'{model}' cannot be fetched: this server has its Hub switched off (ROOKERY_HUB_ENABLED).")
        pull = self._pulls.join(model, _name(model), self._service.puller)
        while len(self._known) >= _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[_key(model)] = pull
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                await pull.wait_until_ended()
        return go(f"{bot_url(_name(model))}?fetching=1")


def _name(model: ModelId) -> str:
    return f"{model}@{model.revision}" if model.revision else str(model)


def _key(model: ModelId) -> str:
    return _name(model).lower()
