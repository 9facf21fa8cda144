"""Make your bot: drop archives, look at what it would learn from, have it learn.

Between the steps the archives wait as files, named in the address, so that a page can be loaded again and any gateway
can show it. What is in an archive, and whether a job can begin, others decide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qs, urlencode

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from serve.api.body import Form, Part, read_fields, read_form
from serve.api.files import stage
from serve.api.job_request import BotForm, bare, from_form
from serve.api.quota import allowance
from serve.api.service import Preview, Service
from serve.api.status import BodyTooLarge, invalid, status_of
from serve.api.storage import check_room, room_of
from serve.errors import BadUpload, InvalidRequest, ModelNotFound, NotFound, RookeryError
from serve.types import BOT_PURPOSE, FileRecord, Job, ModelInfo, Scope, Viewer
from serve.web.pages import SECURITY, Pages, go, page_route
from serve.web.recent import Recent

MAX_PEOPLE = 3  # that a page offers
FORMATS = ".zip,.tar,.tar.gz,.tgz,.gz,.csv,.json,.jsonl,.js,.car,.txt"
_MAX_LOOKS = 2  # at once: reading archives takes a core each
_MAX_REPORTS = 32
_NAMESPACE = "huggingtweets"  # of all new bots
_MAX_TYPED = 512  # characters of a field that are shown again

_GONE = "This archive is no longer here: a job took it, or it waited too long. Choose it once more."
_NO_CONSENT = "Tick the box first: a bot may only be made of posts that you have the right to use."
_NOBODY = "Say whose posts these are: each archive needs a handle."


def router(service: Service, pages: Pages) -> APIRouter:
    """/make and /make/review; nothing where nobody can look into archives."""
    access = service.access
    routes = APIRouter(route_class=page_route(pages), include_in_schema=False, dependencies=access.needs(Scope.TRAIN))
    if service.preview is None:
        return routes
    looks = _Looks(service.preview)

    def show_form(request: Request, status: int = 200, error: str = "", handles: Sequence[str] = ()) -> Response:
        typed = [handle[:_MAX_TYPED] for handle in handles[:MAX_PEOPLE]]
        return pages.render(
            *(request, "make.html", status),
            error=error,
            handles=typed + [""] * (MAX_PEOPLE - len(typed)),
            formats=FORMATS,
            limit=_whole_megabytes(service.limits.upload_bytes),
            limit_bytes=service.limits.upload_bytes,
        )

    async def show_review(request: Request, draft: Draft, status: int = 200, error: str = "") -> Response:
        records = await _find(service, draft.file_ids, access.caller(request).viewer)
        try:
            report = await looks.at(records, draft.handles)
        except InvalidRequest as exc:  # a handle that is none: shown as the archives have it, with what was typed
            report, status, error = await looks.at(records, ()), 400, error or exc.message
        return pages.render(
            *(request, "review.html", status),
            error=error,
            draft=draft,
            report=report,
            people=_people(records, draft.handles, report),
            name=(name := _name(draft, report)),
            existing=await _find_bot(service, name, request) if name else None,
            default_base=service.default_base,
        )

    @routes.get("/make")
    async def ask_for_archives(request: Request) -> Response:
        return show_form(request)

    @routes.post("/make")
    async def take_archives(request: Request) -> Response:
        handles: list[str] = []
        try:
            async with read_form(request, service) as form:
                handles = form.values("handle")
                draft = await _take(service, request, looks, _uploads(form))
        except BodyTooLarge as exc:
            return show_form(request, status_of(exc, "/v1"), _too_large(service.limits.upload_bytes))
        except RookeryError as exc:
            return show_form(request, status_of(exc, "/v1"), exc.message, handles)
        return go(draft.address)

    @routes.get("/make/review")
    async def review(request: Request) -> Response:
        fields = parse_qs(request.url.query, keep_blank_values=True)
        return await show_review(request, Draft.read(fields))

    @routes.head("/make/review")
    async def ask_whether_it_waits(request: Request) -> Response:
        """Without a look into it."""
        file_ids = Draft.read(parse_qs(request.url.query)).file_ids
        await _find(service, file_ids, access.caller(request).viewer)
        return Response(headers=SECURITY | {"cache-control": "no-store"})

    @routes.post("/make/review")
    async def train(request: Request) -> Response:
        fields = await read_fields(request, service)
        draft = Draft.read(fields)
        if fields.get("do") == ["discard"]:
            looks.forget(draft.file_ids)  # first: whatever has become of the files
            await _drop(service, await _find(service, draft.file_ids, access.caller(request).viewer))
            return go("/make")
        if "consent" not in fields:
            return await show_review(request, draft, 400, _NO_CONSENT)
        try:
            job = await _create_job(service, draft, request)
        except NotFound as exc:
            raise NotFound(_GONE) from exc
        except RookeryError as exc:
            return await show_review(request, draft, status_of(exc, "/v1"), exc.message)
        looks.forget(draft.file_ids)
        return go(f"/jobs/{job.id}")

    return routes


@dataclass(frozen=True, slots=True)
class Draft:
    """What somebody has chosen so far, as they typed it."""

    file_ids: tuple[str, ...]
    typed_handles: tuple[str, ...] = ()
    base_model: str = ""
    n_epochs: str = ""
    seed: str = ""
    suffix: str = ""

    @classmethod
    def read(cls, fields: Mapping[str, Sequence[str]]) -> Draft:
        """Raises: NotFound where no file can be meant."""
        file_ids = tuple(fields.get("file", ()))
        if not 1 <= len(file_ids) <= MAX_PEOPLE or not all(id.isascii() and id.isprintable() for id in file_ids):
            raise NotFound(_GONE)
        handles = fields.get("handle", ())[: len(file_ids)]
        last = {name: fields[name][-1].strip() for name in _OPTIONS if name in fields}
        return cls(file_ids, tuple(handle.strip() for handle in handles), **last)

    @property
    def handles(self) -> tuple[str | None, ...]:
        return tuple(map(bare, self.typed_handles))

    @property
    def options(self) -> Mapping[str, str]:
        """Those that were used."""
        return {name: value for name in _OPTIONS if (value := getattr(self, name))}

    @property
    def address(self) -> str:
        """The page that shows it."""
        files = [("file", file_id) for file_id in self.file_ids]
        handles = [("handle", handle) for handle in self.typed_handles] if any(self.typed_handles) else []
        return "/make/review?" + urlencode([*files, *handles, *self.options.items()])

    @property
    def idempotency_key(self) -> str:
        """The same for the same wish, however often its page is loaded; another one where anything was changed."""
        wish = self.file_ids, self.handles, sorted(self.options.items())
        return f"page-{blake2b(repr(wish).encode(), digest_size=16).hexdigest()}"


_OPTIONS = ("base_model", "n_epochs", "seed", "suffix")


@dataclass(frozen=True, slots=True)
class Person:
    """One archive, and what a look into it told."""

    filename: str
    handle: str  # as typed, else as the archive says
    report: Mapping[str, Any]

    @property
    def is_too_small(self) -> bool:
        return bool(self.report["status"] == "too_few")


class _Looks:
    """What was seen in archives lately; reading a large one takes seconds, and its page is loaded more than once.

    There are posts in it, so it is forgotten with the archive.
    """

    def __init__(self, preview: Preview) -> None:
        self._preview = preview
        self._limiter = anyio.CapacityLimiter(_MAX_LOOKS)
        self._reports: Recent[tuple[tuple[str, ...], tuple[str | None, ...]], Mapping[str, Any]] = Recent(_MAX_REPORTS)

    async def at(self, records: Sequence[FileRecord], handles: Sequence[str | None]) -> Mapping[str, Any]:
        """`handles`: whose the first archives are. Raises: BadUpload, InvalidRequest."""
        key = tuple(record.id for record in records), tuple(handles)
        if (report := self._reports.get(key)) is None:
            paths, names = [record.path for record in records], [record.filename for record in records]
            look = partial(self._preview, paths, list(handles), filenames=names)
            report = await anyio.to_thread.run_sync(look, limiter=self._limiter)
            self._reports.put(key, report)
        return report

    def forget(self, file_ids: Collection[str]) -> None:
        """All that had to do with any of these files."""
        self._reports.forget(lambda key: not set(file_ids).isdisjoint(key[0]))


def _uploads(form: Form) -> list[tuple[Part, str]]:
    """The archives with the handles beside them. Browsers send an empty file for a field that nobody used."""
    parts, handles = form.files("archive"), form.values("handle")
    handles += [""] * (len(parts) - len(handles))
    used = [(part, handle) for part, handle in zip(parts, handles, strict=False) if _is_used(part)]
    if not used:
        raise BadUpload("Choose an archive first: there was no file in what you sent.", param="archive")
    if len(used) > MAX_PEOPLE:
        raise BadUpload(f"A bot is made of at most {MAX_PEOPLE} archives here, not {len(used)}.", param="archive")
    return used


def _is_used(part: Part) -> bool:
    assert part.path is not None
    return part.filename != "upload" or part.path.stat().st_size > 0


async def _take(service: Service, request: Request, looks: _Looks, uploads: Sequence[tuple[Part, str]]) -> Draft:
    """Keeps what can be read; of several archives all or none.

    Raises: BadUpload, InvalidRequest, QuotaExceeded, StoreUnavailable.
    """
    staged = [stage(service, request, part, BOT_PURPOSE) for part, _ in uploads]
    draft = Draft(tuple(file.id for file in staged), tuple(handle.strip() for _, handle in uploads))
    await looks.at(staged, draft.handles if any(draft.typed_handles) else ())
    try:
        await anyio.to_thread.run_sync(lambda: service.files.keep_files(staged, check_room=room_of(service, request)))
    except BaseException:
        looks.forget(draft.file_ids)
        raise
    return draft


async def _find(service: Service, file_ids: Sequence[str], viewer: Viewer) -> list[FileRecord]:
    def find() -> list[FileRecord]:
        records = [service.files.get_file(file_id, viewer) for file_id in file_ids]
        if not all(record.path.is_file() for record in records):
            raise NotFound(_GONE)
        return records

    try:
        return await anyio.to_thread.run_sync(find)
    except NotFound as exc:
        raise NotFound(_GONE) from exc


async def _drop(service: Service, records: Sequence[FileRecord]) -> None:
    for record in records:
        with contextlib.suppress(RookeryError):  # a job needs it, or it is gone already
            await anyio.to_thread.run_sync(service.files.delete_file, record.id)


async def _create_job(service: Service, draft: Draft, request: Request) -> Job:
    """Raises: InvalidRequest, QuotaExceeded, and whatever Jobs raises."""
    if len(draft.handles) < len(draft.file_ids) or not all(draft.handles):
        raise InvalidRequest(_NOBODY, param="handle")
    try:
        form = BotForm.model_validate({**draft.options, "handle": list(draft.handles)}, strict=False)
    except ValidationError as exc:
        raise invalid(exc) from exc
    await check_room(service, request)
    caller, max_open = service.access.caller(request), allowance(request).limits.jobs
    wanted = from_form(form, draft.file_ids, validation=None, default_base=service.default_base, caller=caller)
    create = partial(service.jobs.create_job, wanted, idempotency_key=draft.idempotency_key, max_open=max_open)
    return await anyio.to_thread.run_sync(create)


def _name(draft: Draft, report: Mapping[str, Any]) -> str | None:
    """What the bot will be called; None while nobody knows whose it is."""
    name = draft.suffix or report["handle"]
    return f"{_NAMESPACE}/{name}".lower() if name else None


async def _find_bot(service: Service, name: str, request: Request) -> ModelInfo | None:
    """The one that is called so already, as far as the caller may know."""
    with contextlib.suppress(ModelNotFound):
        found = await anyio.to_thread.run_sync(service.access.find_model, service.catalogue, name, request)
        return found if found.model_id.lower() == name else None  # what was typed may name a revision of another
    return None


def _people(records: Sequence[FileRecord], handles: Sequence[str | None], report: Mapping[str, Any]) -> list[Person]:
    typed = [*handles, *[None] * (len(records) - len(handles))]
    reports = report.get("archives") or [report]
    return [
        Person(record.filename, handle or own["handle"] or "", own)
        for record, handle, own in zip(records, typed, reports, strict=True)
    ]


def _too_large(limit: int) -> str:
    return (
        f"That is larger than {_whole_megabytes(limit)}, the most that is taken here. Of X's archive only the file "
        "data/tweets.js is needed: unpack the archive, drop that file alone, and write the handle beside it."
    )


def _whole_megabytes(limit: int) -> str:
    """Rounded down: whatever is said to fit does."""
    return f"{limit // 10**6} MB"
