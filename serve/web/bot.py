"""A bot's page: have it write, see what it is and how it came to be, and, with a key, decide on it.

Every button is a form that works without scripts. What changes something answers with the way back to the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import ip_address
from typing import Annotated, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request
from markupsafe import Markup
from starlette.responses import Response

from serve.api.body import read_fields
from serve.api.models import delete_everywhere
from serve.api.previews import choose_preview
from serve.api.service import Service
from serve.api.status import retry_headers, status_of
from serve.errors import InvalidRequest, ModelNotFound, NotFound, RookeryError
from serve.types import ModelId, ModelInfo, RevisionInfo, Run, Scope, Viewer, Visibility
from serve.web.bots import BotView
from serve.web.card import Card, Cards
from serve.web.fetching import Fetching
from serve.web.lineage import draw, lineage_of
from serve.web.pages import Pages, bot_url, go, page_route
from serve.web.writing import defaults, read_wish, write

_MAX_VERSIONS = 50  # a training of days leaves hundreds of checkpoints; GET /v1/models/{id}/versions has them all
_LOCAL_NAMES = (".localhost", ".local", ".internal", ".home.arpa")
_MAX_SAID = 200  # characters of a description in a head

_DONE = {
    "preview": "That text stands for the bot now, on its picture too.",
    "preview-of-version": "That text stands for this version now, on its picture too.",
    "rollback": "That version answers from now on.",
    "private": "The bot is private now: nobody else meets it.",
    "unlisted": "The bot is in no list now: who knows its name meets it.",
    "public": "Everybody meets the bot now.",
}


class Versions(NamedTuple):
    """Those that are shown, and how many more there are."""

    shown: Sequence[RevisionInfo]
    num_more: int

    @classmethod
    def of(cls, found: Sequence[RevisionInfo]) -> Versions:
        """The newest, and always the one that answers."""
        shown = [one for number, one in enumerate(found) if number < _MAX_VERSIONS or one.is_main]
        return cls(shown, len(found) - len(shown))


@dataclass(frozen=True, slots=True)
class BotPage:
    """What the page of one revision shows. `base_url`: of this server, as the visitor calls it; "" if not rightly."""

    bot: BotView
    is_asked_revision: bool
    has_picture: bool
    versions: Versions
    checkpoints: Versions
    lineage: Markup
    card: Card
    base_url: str

    @property
    def id(self) -> str:
        """What texts are asked of: the revision that the page shows, whatever `main` names by then."""
        return f"{self.bot.id}@{self.bot.info.revision}"

    @property
    def url(self) -> str:
        return bot_url(self.id if self.is_asked_revision else self.bot.id)

    @property
    def address(self) -> str:
        """Of the bot, for others; "" where it is not known."""
        return self.base_url and self.base_url + bot_url(self.bot.id)

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
        is_for_all = self.bot.info.visibility is Visibility.PUBLIC and _is_public(self.base_url)
        return f"\n– {whose}" + (f"\n{self.address}" if is_for_all else "")

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

    values: Mapping[str, str]
    texts: Sequence[str] = ()
    seed: int | None = None
    error: str = ""


def router(service: Service, pages: Pages) -> APIRouter:
    """/bots/{id} and /bots/{id}@{revision}"""
    routes = APIRouter(route_class=page_route(pages), include_in_schema=False)
    access, cards, fetching = service.access, Cards(service.catalogue), Fetching(service, pages)
    drawing = anyio.CapacityLimiter(1)  # a picture takes a core, and streams of texts need the rest

    @routes.get("/bots/{model:path}", dependencies=access.needs(Scope.READ))
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
            return fetching.show(request, wanted, is_asked_for=bool(is_fetching))
        if is_fetching:
            return go(page.url)
        return _render(request, page, Play(defaults(page.bot.info.context_length)), _DONE.get(done, ""))

    @routes.post("/bots/{model:path}", dependencies=access.needs(Scope.GENERATE, Scope.TRAIN))
    async def act(model: str, request: Request) -> Response:
        wanted = ModelId.parse(model)
        fields = {name: values[-1] for name, values in (await read_fields(request, service)).items()}
        action = fields.pop("do", "")
        if action == "write":
            access.demand(request, Scope.GENERATE)
            access.demand(request, Scope.READ)  # it is answered with the whole page
            return await _write(model, request, fields)
        viewer = access.demand(request, Scope.TRAIN).viewer
        match action:
            case "pull":
                access.demand(request, Scope.ADMIN)
                return await fetching.begin(request, wanted)
            case "preview":
                return await anyio.to_thread.run_sync(_choose, wanted, fields, viewer, limiter=drawing)
            case "rollback":
                await anyio.to_thread.run_sync(_roll_back, wanted, fields, viewer)
                return _back(str(wanted), "rollback")
            case "visibility":
                visibility = _read_visibility(fields)
                await anyio.to_thread.run_sync(service.catalogue.set_visibility, str(wanted), visibility, viewer)
                return _back(model, visibility.value)
            case "delete":
                if fields.get("sure") != "yes":
                    raise InvalidRequest("Nothing was deleted: tick the box that says so first.", param="sure")
                await delete_everywhere(service, str(wanted), access.caller(request))
                return go("/")
        raise InvalidRequest("'do' must be write, preview, rollback, visibility, delete or pull.", param="do")

    async def _write(model: str, request: Request, fields: Mapping[str, str]) -> Response:
        page = await anyio.to_thread.run_sync(read_page, service, cards, model, request)
        try:
            wish = read_wish(fields, page.bot.info.context_length)
            texts, seed = await write(service, request, page.id, wish)
        except RookeryError as exc:
            status = status_of(exc, "/v1")
            return _render(request, page, Play(fields, error=exc.message), "", status, retry_headers(exc, status))
        return _render(request, page, Play(fields, texts, seed))

    def _render(
        request: Request,
        page: BotPage,
        play: Play,
        done: str = "",
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        may_change = access.caller(request).may_change(page.bot.info)
        may_choose = may_change and service.draw_preview is not None and page.bot.is_bot
        shown = {"page": page, "bot": page.bot, "play": play, "done": done, "may_choose": may_choose}
        shown["may_change"] = may_change
        return pages.render(request, "bot.html", status, headers, **shown)

    def _choose(model: ModelId, fields: Mapping[str, str], viewer: Viewer) -> Response:
        """For the revision that wrote the text, which another may have followed."""
        text, prompt = (fields.get(name, "").replace("\r\n", "\n") for name in ("text", "prompt"))  # as forms send "\n"
        revision = fields.get("revision") or model.revision
        named = f"{model}@{revision}" if revision else str(model)
        chosen = choose_preview(service, named, text, prompt, viewer)
        is_main = service.catalogue.get_model(str(model)).revision == chosen.revision
        if is_main and model.revision is None:
            return _back(str(model), "preview", "#picture")
        return _back(f"{model}@{chosen.revision}", "preview-of-version", "#picture")

    def _roll_back(model: ModelId, fields: Mapping[str, str], viewer: Viewer) -> None:
        wanted = ModelId.parse(f"{model}@{fields.get('revision', '')}")
        assert wanted.revision is not None
        service.catalogue.roll_back(str(wanted), wanted.revision, viewer)

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
        versions=Versions.of([one for one in versions if one.step is None]),
        checkpoints=Versions.of([one for one in versions if one.step is not None]),
        lineage=draw(lineage) if lineage else Markup(),
        card=cards.render(info.model_id, info.revision),
        base_url=_base_url(request),
    )


def _read_visibility(fields: Mapping[str, str]) -> Visibility:
    try:
        return Visibility(fields.get("visibility", ""))
    except ValueError as exc:
        raise InvalidRequest("'visibility' must be public, unlisted or private.", param="visibility") from exc


def _base_url(request: Request) -> str:
    """ "" when the Host header is none: what stands in for it then leads nobody here."""
    url = request.base_url
    return str(url).rstrip("/") if url.netloc == request.headers.get("host") else ""


def _is_public(base_url: str) -> bool:
    """Whether its address may lead there from everywhere: it is no loopback or private one."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ip_address(host).is_global
    except ValueError:
        return "." in host.strip(".") and not host.rstrip(".").endswith(_LOCAL_NAMES)


def _runs(service: Service, info: ModelInfo, versions: Sequence[RevisionInfo]) -> tuple[Run, ...]:
    """Those of the job that made the revision; none of a model from elsewhere."""
    job_id = next((one.job_id for one in versions if one.revision == info.revision), None)
    try:
        return service.jobs.list_runs(job_id) if job_id else ()
    except NotFound:
        return ()


def _back(model: str, done: str, place: str = "") -> Response:
    return go(f"{bot_url(model)}?{urlencode({'done': done})}{place}")
