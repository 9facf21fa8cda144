"""What every page has: its frame, its headers, who may see it, and what stands there when something is wrong."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from serve.api.access import COOKIE
from serve.errors import DiskFull, Overloaded, RookeryError, StoreUnavailable
from serve.types import JobStatus, Visibility
from serve.web.pages import static_files, static_url
from tests.web.conftest import BROWSER, KEY, World, build_world

ADDRESSES = ["/", "/make", "/jobs", "/login", "/admin", "/bots/huggingtweets/ada", "/nowhere/at/all"]
_VOID = {"meta", "link", "img", "input", "br", "hr", "wbr", "source"}


class Markup(HTMLParser):
    """Tags in order, with what an attentive reader would object to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.objections: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        if self._open:
            self.objections.append(f"never closed: {self._open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"] or "")
        if "style" in attributes or any(name.startswith("on") for name in attributes):
            self.objections.append(f"inline style or script: <{tag} {attributes}>")
        if tag == "style" or (tag == "script" and "src" not in attributes):
            self.objections.append(f"inline <{tag}>")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.objections.append(f"</{tag}> closes what is not open")


def sources(markup: Markup) -> list[str]:
    return [attributes[name] or "" for _, attributes in markup.tags for name in ("src", "action") if name in attributes]


# --- The frame ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ADDRESSES)
async def test_every_page_is_a_whole_document_without_anything_inline(
    client: httpx.AsyncClient, world: World, address: str
) -> None:
    world.jobs.begin(JobStatus.RUNNING)
    page = await client.get(address)
    assert page.status_code == (404 if "nowhere" in address else 200)
    assert page.text.startswith("<!doctype html>\n<html lang")
    markup = Markup(page.text)
    assert markup.objections == []
    assert len(set(markup.ids)) == len(markup.ids)
    assert [tag for tag, _ in markup.tags].count("h1") == 1
    assert all(source.startswith("/") and not source.startswith("//") for source in sources(markup))


async def test_every_page_keeps_a_browser_to_this_server(client: httpx.AsyncClient) -> None:
    for address in ADDRESSES:
        headers = (await client.get(address)).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "same-origin"


async def test_pages_are_no_part_of_the_described_api(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert not {"/make", "/login", "/jobs/{job_id}", "/static/{digest}/{name}"} & set(paths)
    assert "get" not in paths["/"]  # text-generation-inference answers a POST there


async def test_the_current_page_is_marked_in_the_menu(client: httpx.AsyncClient) -> None:
    assert '<a href="/make" aria-current="page">' in (await client.get("/make")).text
    assert (await client.get("/")).text.count('aria-current="page"') == 1


IMAGES = [f"/v1/models/huggingtweets/ada/{word}" for word in ("avatar", "picture")]


@pytest.mark.parametrize("address", [*ADDRESSES, "/make/review", "/favicon.ico", static_url("app.css"), *IMAGES])
async def test_head_is_told_what_get_would_bring(client: httpx.AsyncClient, address: str) -> None:
    whole, head = await client.get(address), await client.head(address)
    assert head.status_code == whole.status_code and head.content == b"" != whole.content
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert head.headers["content-length"] == whole.headers["content-length"]


# --- Files that never change --------------------------------------------------------------------------------


async def test_what_a_page_loads_is_there_and_kept_for_ever(client: httpx.AsyncClient) -> None:
    page = await client.get("/make")
    addresses = set(re.findall(r'"(/static/[^"]+)"', page.text))
    assert len(addresses) >= 3
    for address in addresses:
        reply = await client.get(address)
        assert reply.status_code == 200
        assert "immutable" in reply.headers["cache-control"]


async def test_a_first_visit_weighs_less_than_100_kb(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    loaded = [await client.get(address) for address in set(re.findall(r'"(/static/[^"]+)"', page.text))]
    assert sum(len(reply.content) for reply in [page, *loaded]) < 100_000


@pytest.mark.parametrize("name", ["nothing.css", "..%2fpages.py", "%2e%2e/pages.py"])
async def test_no_other_file_is_served(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get(f"/static/abc/{name}")).status_code == 404


async def test_a_file_at_the_address_of_another_version_is_not_kept(client: httpx.AsyncClient) -> None:
    reply = await client.get("/static/000000000000/app.css")
    assert reply.status_code == 200 and reply.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("accepted", "is_zipped"),
    [
        *(("gzip", True), ("deflate, GZIP;q=0.5, br", True), ("gzip;q=1", True), ("gzip ; q=0.001", True)),
        *(("", False), ("br", False), ("gzip;q=0", False), ("br, gzip; q=0.000", False), ("x-gzip2", False)),
    ],
)
async def test_answers_are_zipped_for_who_takes_them_so(
    client: httpx.AsyncClient, accepted: str, is_zipped: bool
) -> None:
    for address in ("/", static_url("app.css")):
        reply = await client.get(address, headers={"accept-encoding": accepted})
        assert ("content-encoding" in reply.headers) is is_zipped
        assert reply.headers["vary"] == "accept-encoding"
        assert "Rookery" in reply.text or ".gallery" in reply.text


async def test_scripts_load_each_other_under_addresses_that_change_together(client: httpx.AsyncClient) -> None:
    for name, path in static_files().items():
        if name.endswith(".js"):
            imported = re.findall(r'from\s+"([^"]+)"', path.read_text(encoding="utf-8"))
            assert all(source.startswith("./") and source[2:] in static_files() for source in imported), name


async def test_browsers_that_ask_for_an_icon_get_it(client: httpx.AsyncClient) -> None:
    reply = await client.get("/favicon.ico")
    assert reply.headers["content-type"].startswith("image/svg+xml")


# --- Signing in ---------------------------------------------------------------------------------------------


async def test_signing_in_brings_one_to_where_one_wanted_to_go(stranger: httpx.AsyncClient) -> None:
    away = await stranger.get("/make?x=1")
    assert away.headers["location"] == f"/login?next={quote('/make?x=1', safe='')}"
    form = await stranger.get(away.headers["location"])
    assert 'name="next" value="/make?x=1"' in form.text
    reply = await stranger.post("/login", data={"key": KEY, "next": "/make?x=1"})
    assert (reply.status_code, reply.headers["location"]) == (303, "/make?x=1")
    cookie = reply.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=") and "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert KEY not in cookie  # percent-encoded: any key fits
    assert (await stranger.get("/make")).status_code == 200  # httpx keeps the cookie, as browsers do
    assert (await stranger.get("/v1/fine_tuning/jobs")).status_code == 200


async def test_servers_at_other_ports_of_the_host_do_not_sign_each_other_out(locked_world: World) -> None:
    def at(port: int) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=locked_world.app)
        return httpx.AsyncClient(transport=transport, base_url=f"http://localhost:{port}", headers=BROWSER)

    async with at(8000) as one, at(8001) as other:
        signed_in = await one.post("/login", data={"key": KEY})
        name = signed_in.headers["set-cookie"].partition("=")[0]
        assert name == f"{COOKIE}_8000"
        assert (await one.get("/make")).status_code == 200
        cookies = {**one.cookies, f"{COOKIE}_8001": "an older key"}
        sent = "; ".join(f"{name}={value}" for name, value in cookies.items())
        assert (await one.get("/make", headers={"cookie": sent})).status_code == 200
        assert (await other.get("/make", headers={"cookie": sent})).status_code == 303
        left = (await one.post("/logout")).headers["set-cookie"]
        assert left.startswith(f'{name}=""') and "Max-Age=0" in left


@pytest.mark.parametrize(
    ("url", "said", "is_secure"),
    [
        ("https://rookery", "", True),
        ("http://rookery", "https", True),
        ("http://rookery", "HTTPS, http", True),
        ("http://rookery", "http, https", False),
        ("http://rookery", "", False),
    ],
)
async def test_over_https_the_key_never_travels_in_the_open(
    locked_world: World, url: str, said: str, is_secure: bool
) -> None:
    headers = {"x-forwarded-proto": said} if said else {}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=locked_world.app), base_url=url, headers=headers
    ) as client:
        reply = await client.post("/login", data={"key": KEY})
    assert ("Secure" in reply.headers["set-cookie"]) is is_secure


@pytest.mark.parametrize("key", ["", "wrong", "schlüssel", "a key of our", KEY + "s"])
async def test_a_wrong_key_opens_nothing(stranger: httpx.AsyncClient, key: str) -> None:
    reply = await stranger.post("/login", data={"key": key, "next": "/make"})
    assert reply.status_code == 401
    assert "set-cookie" not in reply.headers
    assert 'role="alert"' in reply.text and 'name="next" value="/make"' in reply.text
    assert key == "" or key not in reply.text


@pytest.mark.parametrize(
    "address", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "/\n/evil", ""]
)
async def test_nobody_is_sent_elsewhere_after_signing_in(stranger: httpx.AsyncClient, address: str) -> None:
    reply = await stranger.post("/login", data={"key": KEY, "next": address})
    assert reply.headers["location"] == "/"
    form = await stranger.get("/login", params={"next": address})
    assert 'name="next" value="/"' in form.text


async def test_signing_out_forgets_the_key(stranger: httpx.AsyncClient) -> None:
    await stranger.post("/login", data={"key": KEY})
    assert "Sign out" in (await stranger.get("/")).text
    reply = await stranger.post("/logout")
    assert reply.headers["location"] == "/"
    assert (await stranger.get("/make")).status_code == 303
    assert "Sign in" in (await stranger.get("/")).text


async def test_where_no_keys_are_nobody_is_asked_to_sign_in(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert "Sign in" not in page.text and "Sign out" not in page.text


async def test_who_signs_in_where_no_keys_are_is_told_and_let_on(client: httpx.AsyncClient) -> None:
    page = await client.get("/login?next=/jobs")
    assert "This server has no keys" in page.text and 'href="/jobs"' in page.text and "<form" not in page.text
    reply = await client.post("/login", data={"key": "any", "next": "/make"})
    assert (reply.status_code, reply.headers["location"]) == (303, "/make")
    assert "set-cookie" not in reply.headers


async def test_a_key_that_is_nobodys_is_as_good_as_none(locked_world: World) -> None:
    async with locked_world.client("an older key") as client:
        assert (await client.get("/make")).headers["location"].startswith("/login")


# --- Other sites --------------------------------------------------------------------------------------------


FOREIGN: list[dict[str, str]] = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://["},
    {"origin": "http://rookery:81"},
    {"sec-fetch-site": "cross-site", "origin": "http://rookery"},
]


async def test_no_page_of_another_site_makes_a_browser_change_anything(locked_world: World) -> None:
    transport = httpx.ASGITransport(app=locked_world.app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://rookery", cookies={COOKIE: quote(KEY)}
    ) as client:
        for headers in FOREIGN:
            for address in ("/make", "/make/review", "/login", "/jobs/x", "/v1/bots", "/v1/completions", "/nowhere"):
                reply = await client.post(address, headers=headers)
                assert reply.status_code == 403, (address, headers)
                assert "another site" in reply.text
            assert (await client.delete("/v1/files/x", headers=headers)).status_code == 403


@pytest.mark.parametrize("headers", [{}, {"sec-fetch-site": "same-origin"}, {"origin": "http://rookery"}])
async def test_our_own_pages_and_programs_may(world: World, headers: dict[str, str]) -> None:
    transport = httpx.ASGITransport(app=world.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://rookery") as client:
        reply = await client.post("/jobs/ftjob-x", data={"do": "cancel"}, headers=headers)
    assert reply.status_code == 404


# --- Errors -------------------------------------------------------------------------------------------------


async def test_a_lost_browser_gets_a_page_and_a_lost_program_json(client: httpx.AsyncClient) -> None:
    page = await client.get("/nowhere/at/all")
    assert page.status_code == 404
    assert "There is no page at this address." in page.text and 'href="/make"' in page.text
    reply = await client.get("/v1/nowhere", headers={"accept": "application/json"})
    assert reply.json()["error"]["code"] == "unknown_url"


def fail_with(monkeypatch: pytest.MonkeyPatch, world: World, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(world.catalogue, "list_models", fail)


@pytest.mark.parametrize("address", ["/", "/v1/models"])
async def test_an_error_nobody_foresaw_is_a_page_with_its_id_and_ways_on(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    fail_with(monkeypatch, world, KeyError("secret"))
    page = await client.get(address, headers={"x-request-id": "req-1"})
    assert page.status_code == 500 and "secret" not in page.text
    assert "its id is req-1" in page.text and 'href="/make"' in page.text
    assert page.headers["content-security-policy"]
    reply = await client.get(address, headers={"accept": "*/*"})
    assert reply.status_code == 500 and "error" in reply.json()


async def test_where_pages_are_broken_themselves_an_error_is_told_all_the_same(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.web.pages.zipped", None)
    assert "error" in (await client.get("/")).json()


@pytest.mark.parametrize("address", ["/", "/v1/models"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("Full.", retry_after_s=7), 429),
        (StoreUnavailable("Away.", retry_after_s=7), 503),
        (DiskFull("No room.", retry_after_s=7), 507),
    ],
)
async def test_a_page_of_an_error_that_passes_says_when_to_come_back(
    client: httpx.AsyncClient,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    error: RookeryError,
    status: int,
) -> None:
    fail_with(monkeypatch, world, error)
    page = await client.get(address)
    assert (page.status_code, page.headers["retry-after"]) == (status, "7")
    assert error.message in page.text


async def test_a_browser_that_is_refused_is_shown_a_page(locked_world: World, stranger: httpx.AsyncClient) -> None:
    refused = await stranger.post("/make", headers={"sec-fetch-site": "cross-site"})
    assert refused.status_code == 403 and "another site" in refused.text and 'href="/"' in refused.text
    asked = await stranger.get("/v1/replicas")
    assert (asked.status_code, asked.headers["location"]) == (303, "/login?next=%2Fv1%2Freplicas")


async def test_a_browser_that_calls_the_server_by_a_wrong_name_is_shown_a_page(tmp_path: Path) -> None:
    async with build_world(tmp_path, hosts=["localhost"]).client() as client:
        page = await client.get("/make")
        assert page.status_code == 403 and page.text.startswith("<!doctype html>")
        assert "ROOKERY_HOSTS" in page.text and "&#39;rookery&#39;" in page.text


@pytest.mark.parametrize("address", ["/v1/foo", "/api/foo", "/static/x", "/bots", "/jobs/", "/make/foo", "/Admin/x"])
async def test_addresses_of_ours_are_no_models(client: httpx.AsyncClient, address: str) -> None:
    page = await client.get(address)
    assert page.status_code in (400, 404) and "location" not in page.headers


@pytest.mark.parametrize("address", ["/logout", "/generate"])
async def test_an_address_that_only_takes_forms_is_a_page_to_a_browser(client: httpx.AsyncClient, address: str) -> None:
    page = await client.get(address)
    assert page.status_code == 404
    assert "There is no page at this address." in page.text


@pytest.mark.parametrize("address", ["/huggingtweets/ada", "/huggingtweets/nobody"])
async def test_a_models_address_on_the_hub_leads_to_its_page(client: httpx.AsyncClient, address: str) -> None:
    reply = await client.get(address)
    assert (reply.status_code, reply.headers["location"]) == (303, f"/bots{address}")


async def test_a_bad_address_is_answered_with_a_sentence(client: httpx.AsyncClient) -> None:
    for address in ("/?before=x", f"/?q={'x' * 300}"):
        page = await client.get(address)
        assert page.status_code == 400
        assert 'role="alert"' in page.text


async def test_markup_in_an_address_is_shown_as_text(client: httpx.AsyncClient) -> None:
    for address in ("/?q=<script>alert(1)</script>", "/login?next=/%22%3E%3Cscript%3E", "/nowhere/%3Cscript%3E/x/y"):
        assert "<script>" not in (await client.get(address)).text


# --- Home ---------------------------------------------------------------------------------------------------


def add_bots(world: World, number: int) -> None:
    ada = world.catalogue.models["huggingtweets/ada"]
    for index in range(number):
        id = f"huggingtweets/bot{index:03}"
        world.catalogue.models[id] = dataclasses.replace(ada, model_id=id, created_at=1_800_000_000 + index)


async def test_home_shows_a_bot_with_its_name_its_texts_and_its_mark(client: httpx.AsyncClient, world: World) -> None:
    world.catalogue.models["huggingtweets/ada"] = dataclasses.replace(
        world.catalogue.models["huggingtweets/ada"],
        handles=("ada",),
        names={"ada": "Ada <i>L</i>"},
        counts={"ada": {"kept": 1234}},
        sample="My dream is <b>bold</b>",
    )
    text = (await client.get("/")).text
    assert "Ada &lt;i&gt;L&lt;/i&gt;" in text and "@ada" in text
    assert "1,234 tweets kept" in text
    assert '<blockquote dir="auto">My dream is &lt;b&gt;bold&lt;/b&gt;</blockquote>' in text
    assert "AI BOT" in text


async def test_a_cyborg_is_marked_as_one(client: httpx.AsyncClient, world: World) -> None:
    ada = world.catalogue.models["huggingtweets/ada"]
    world.catalogue.models["huggingtweets/ada"] = dataclasses.replace(ada, handles=("ada", "bob"))
    text = (await client.get("/")).text
    assert "ada &amp; bob" in text and "AI CYBORG" in text


async def test_the_gallery_shows_one_face_of_a_cyborg_and_its_page_all(client: httpx.AsyncClient, world: World) -> None:
    ada = world.catalogue.models["huggingtweets/ada"]
    world.catalogue.models.clear()
    world.catalogue.models["huggingtweets/ada"] = dataclasses.replace(ada, handles=("a", "b", "c"), num_avatars=3)
    home, page = [(await client.get(address)).text for address in ("/", "/bots/huggingtweets/ada")]
    assert home.count("/avatar?number=") == home.count('loading="lazy"') == 1
    assert page.count("/avatar?number=2") >= 1


async def test_pages_of_the_gallery_hold_every_bot_once(client: httpx.AsyncClient, world: World) -> None:
    add_bots(world, 60)
    address, seen, num_pages = "/", list[str](), 0
    while address:
        text = (await client.get(address)).text
        seen += re.findall(r'class="name" href="/bots/([^"]+)"', text)
        following = re.search(r'class="next" href="([^"]+)"', text)
        address = following[1].replace("&amp;", "&") if following else ""
        num_pages += 1
    assert num_pages == 3
    assert len(seen) == len(set(seen)) == 63
    assert seen[0] == "huggingtweets/bot059"


async def test_search_finds_by_name_and_stays_while_paging(client: httpx.AsyncClient, world: World) -> None:
    add_bots(world, 30)
    text = (await client.get("/", params={"q": "BOT0"})).text
    assert "huggingtweets/ada" not in text and 'value="BOT0"' in text
    following = re.search(r'class="next" href="([^"]+)"', text)
    assert following and "q=BOT0" in following[1]


async def test_search_that_finds_nothing_offers_the_hub(client: httpx.AsyncClient) -> None:
    text = (await client.get("/", params={"q": "gpt3"})).text
    assert "No bot here has that in its name." in text and 'href="/bots/gpt3"' in text


async def test_an_empty_server_asks_for_the_first_bot(client: httpx.AsyncClient, world: World) -> None:
    world.catalogue.models.clear()
    assert "There is no bot yet." in (await client.get("/")).text


async def test_private_bots_are_shown_to_those_with_a_key_alone(
    stranger: httpx.AsyncClient, owner: httpx.AsyncClient, locked_world: World
) -> None:
    locked_world.catalogue.set_visibility("huggingtweets/ada", Visibility.PRIVATE)
    assert "huggingtweets/ada" not in (await stranger.get("/")).text
    assert "huggingtweets/ada" in (await owner.get("/")).text
