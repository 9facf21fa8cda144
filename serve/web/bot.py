"""A bot's page: have it write, see what it is and how it came to be, and, with a key, decide on it.

Every button is a form that works without scripts. What changes something answers with the way back to the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated
from urllib.parse import quote, urlencode

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request
from markupsafe import Markup
from starlette.responses import Response

from serve.api.body import read_fields
from serve.api.models import delete_everywhere
from serve.api.previews import choose_preview
from serve.api.service import Service
from serve.api.status import status_of
from serve.errors import InvalidRequest, ModelNotFound, NotFound, RookeryError
from serve.types import ModelId, ModelInfo, RevisionInfo, Run
from serve.web.bots import BotView
from serve.web.card import Card, Cards
from serve.web.fetching import Fetching
from serve.web.lineage import draw, lineage_of
from serve.web.pages import Pages, bot_url, go, page_route
from serve.web.writing import DEFAULTS, read_wish, write

_MAX_VERSIONS = 50  # a training of days leaves hundreds of checkpoints; GET /v1/models/{id}/versions has them all
_MAX_SAID = 200  # characters of a description in a head

_DONE = {
    "preview": "That text stands for the bot now, on its picture too.",
    "rollback": "That version answers from now on.",
    "private": "The bot is private now: only who has a key sees it.",
    "public": "Everybody sees the bot now.",
}


@dataclass(frozen=True, slots=True)
class BotPage:
    """What the page of one revision shows. `base_url`: of this server, as the visitor calls it."""

    bot: BotView
    is_asked_revision: bool
    has_picture: bool
    versions: Sequence[RevisionInfo]
    lineage: Markup
    card: Card
    base_url: str

    @property
    def id(self) -> str:
        """What texts are asked of: with the revision, where the page is of one."""
        return f"{self.bot.id}@{self.bot.info.revision}" if self.is_asked_revision else self.bot.id

    @property
    def url(self) -> str:
        return bot_url(self.id)

    @property
    def address(self) -> str:
        """Of the bot, for the whole world."""
        return self.base_url + bot_url(self.bot.id)

    @property
    def picture(self) -> str:
        """Its address, which changes with what it shows."""
        info = self.bot.info
        shown = blake2b(f"{info.revision} {info.sample}".encode(), digest_size=6).hexdigest()
        return f"/v1/models/{quote(f'{info.model_id}@{info.revision}')}/picture?v={shown}"

    @property
    def description(self) -> str:
        """A sentence for whoever sees no more than a link."""
        bot = self.bot
        return bot.info.sample[:_MAX_SAID] or f"{bot.name}: a model that writes tweets. Give it a beginning."

    @property
    def signature(self) -> str:
        """What follows a text that is shared: nobody shall take it for the person's own."""
        kind = self.bot.mark.removeprefix("AI ").lower()
        whose = f"{self.bot.handle}'s AI {kind}" if self.bot.is_bot else f"{self.bot.id}, an AI {kind}"
        return f"\n– {whose}" + ("" if self.bot.info.is_private else f"\n{self.address}")

    @property
    def base_page(self) -> str | None:
        """Of the model that it was made from, which may be anything's name."""
        try:
            return bot_url(str(ModelId.parse(self.bot.info.base_model or "")))
        except ModelNotFound:
            return None


@dataclass(frozen=True, slots=True)
class Play:
    """The form as it was filled in, and what came of it."""

    values: Mapping[str, str] = field(default_factory=lambda: DEFAULTS)
    texts: Sequence[str] = ()
    seed: int | None = None
    error: str = ""


def router(service: Service, pages: Pages) -> APIRouter:
    """/bots/{id} and /bots/{id}@{revision}"""
    routes = APIRouter(route_class=page_route(pages), include_in_schema=False)
    access, cards, fetching = service.access, Cards(service.catalogue), Fetching(service, pages)
    drawing = anyio.CapacityLimiter(1)  # a picture takes a core, and streams of texts need the rest

    @routes.get("/bots/{model:path}")
    async def show_bot(
        model: str,
        request: Request,
        done: Annotated[str, Query(max_length=20)] = "",
        is_fetching: Annotated[str, Query(alias="fetching", max_length=1)] = "",
    ) -> Response:
        wanted = ModelId.parse(model)
        try:
            page = await anyio.to_thread.run_sync(read_page, service, cards, model, request)
        except ModelNotFound:
            return fetching.show(request, wanted)
        return go(page.url) if is_fetching else _render(request, page, Play(), _DONE.get(done, ""))

    @routes.post("/bots/{model:path}")
    async def act(model: str, request: Request) -> Response:
        wanted = ModelId.parse(model)
        fields = {name: values[-1] for name, values in (await read_fields(request, service.limits)).items()}
        action = fields.pop("do", "")
        if action == "write":
            return await _write(model, request, fields)
        access.demand(request)
        match action:
            case "pull":
                return await fetching.begin(wanted)
            case "preview":
                await anyio.to_thread.run_sync(_choose, model, fields, limiter=drawing)
                return _back(model, "preview", "#picture")
            case "rollback":
                await anyio.to_thread.run_sync(_roll_back, wanted, fields)
                return _back(str(wanted), "rollback")
            case "private":
                is_private = fields.get("private") == "yes"
                await anyio.to_thread.run_sync(service.catalogue.set_private, str(wanted), is_private)
                return _back(model, "private" if is_private else "public")
            case "delete":
                if fields.get("sure") != "yes":
                    raise InvalidRequest("Nothing was deleted: tick the box that says so first.", param="sure")
                await delete_everywhere(service, str(wanted))
                return go("/")
        raise InvalidRequest("'do' must be write, preview, rollback, private, delete or pull.", param="do")

    async def _write(model: str, request: Request, fields: Mapping[str, str]) -> Response:
        page = await anyio.to_thread.run_sync(read_page, service, cards, model, request)
        try:
            texts, seed = await write(service, request, page.id, read_wish(fields))
        except RookeryError as exc:
            return _render(request, page, Play(fields, error=exc.message), status=status_of(exc, "/v1"))
        return _render(request, page, Play(fields, texts, seed))

    def _render(request: Request, page: BotPage, play: Play, done: str = "", status: int = 200) -> Response:
        may_choose = access.has_key(request) and service.draw_preview is not None and page.bot.is_bot
        return pages.render(
            request, "bot.html", status, page=page, bot=page.bot, play=play, done=done, may_choose=may_choose
        )

    def _choose(model: str, fields: Mapping[str, str]) -> None:
        text, prompt = (fields.get(name, "").replace("\r\n", "\n") for name in ("text", "prompt"))  # as forms send "\n"
        choose_preview(service, model, text, prompt)

    def _roll_back(model: ModelId, fields: Mapping[str, str]) -> None:
        wanted = ModelId.parse(f"{model}@{fields.get('revision', '')}")
        assert wanted.revision is not None
        service.catalogue.roll_back(str(wanted), wanted.revision)

    return routes


def read_page(service: Service, cards: Cards, model: str, request: Request) -> BotPage:
    """Blocks. Raises: ModelNotFound."""
    catalogue = service.catalogue
    info = service.access.find_model(catalogue, model, request)
    revision = f"{info.model_id}@{info.revision}"
    versions = catalogue.list_revisions(info.model_id)
    lineage = lineage_of(info, _runs(service, info, versions))
    try:
        catalogue.find_picture(revision)
        has_picture = True
    except ModelNotFound:
        has_picture = False
    return BotPage(
        bot=BotView(info),
        is_asked_revision=ModelId.parse(model).revision is not None,
        has_picture=has_picture,
        versions=versions[:_MAX_VERSIONS],
        lineage=draw(lineage) if lineage else Markup(),
        card=cards.render(info.model_id, info.revision),
        base_url=str(request.base_url).rstrip("/"),
    )


def _runs(service: Service, info: ModelInfo, versions: Sequence[RevisionInfo]) -> tuple[Run, ...]:
    """Those of the job that made the revision; none of a model from elsewhere."""
    job_id = next((one.job_id for one in versions if one.revision == info.revision), None)
    try:
        return service.jobs.list_runs(job_id) if job_id else ()
    except NotFound:
        return ()


def _back(model: str, done: str, place: str = "") -> Response:
    return go(f"{bot_url(model)}?{urlencode({'done': done})}{place}")
