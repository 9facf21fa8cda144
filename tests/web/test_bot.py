"""A bot's page: what it shows, what its forms do, and that strangers' words stay words."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httpx
import pytest
from selectolax.lexbor import LexborHTMLParser, LexborNode

from serve.api.access import Access
from serve.api.app import build_api
from serve.errors import ModelNotFound, ModelUnusable
from serve.types import ALL_SEEING, Artifact, JobStatus, ModelInfo, PullProgress, RevisionInfo, Run, Visibility
from serve.web.router import add_pages
from tests.fakes.generator import EchoGenerator
from tests.fakes.keys import MemoryKeys
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs
from tests.web.conftest import BROWSER, World

ADA = "/bots/huggingtweets/ada"
FACTS: dict[str, Any] = {
    "handles": ("ada",),
    "names": {"ada": "Ada Lovelace"},
    "base_model": "fledgling",
    "counts": {"ada": {"downloaded": 1200, "retweets": 20, "short": 3, "kept": 1177}},
    "sample": "My dream is an engine.",
}


def know(world: World, model_id: str = "huggingtweets/ada", **facts: Any) -> None:
    world.catalogue.models[model_id] = replace(world.catalogue.models[model_id], **{**FACTS, **facts})


def parse(reply: httpx.Response, status: int = 200) -> LexborHTMLParser:
    assert reply.status_code == status, reply.text
    return LexborHTMLParser(reply.text)


def one(page: LexborHTMLParser | LexborNode, selector: str) -> LexborNode:
    found = page.css(selector)
    assert len(found) == 1, (selector, len(found))
    return found[0]


def said(page: LexborHTMLParser, selector: str) -> str:
    return " ".join(one(page, selector).text().split())


# --- What it shows ------------------------------------------------------------------------------------------


async def test_a_page_says_who_speaks_and_that_it_is_a_bot(world: World, client: httpx.AsyncClient) -> None:
    know(world)
    page = parse(await client.get(ADA))
    assert said(page, "h1") == "Ada Lovelace"
    assert "@ada" in said(page, ".bot-head") and "AI BOT" in said(page, ".bot-head")
    assert "1,177 tweets kept" in said(page, ".bot-head")
    assert one(page, ".bot-head .meta a").attributes["href"] == "/bots/fledgling"
    assert page.css(".faces img")[0].attributes["src"] == "/v1/models/huggingtweets/ada%40abc123/avatar?number=0"


async def test_links_to_the_page_carry_its_text_and_picture(
    world: World, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    know(world)
    world.catalogue.pictures["huggingtweets/ada"] = tmp_path / "predictions.png"
    page = parse(await client.get(f"{ADA}@abc123"))
    meta = {node.attributes.get("property"): node.attributes.get("content") for node in page.css("meta")}
    assert meta["og:title"] == "Ada Lovelace – AI BOT"
    assert meta["og:description"] == "My dream is an engine."
    assert meta["og:url"] == "http://rookery/bots/huggingtweets/ada"
    picture = meta["og:image"] or ""
    assert picture.startswith("http://rookery/v1/models/huggingtweets/ada%40abc123/picture?v=")
    assert one(page, "link[rel=canonical]").attributes["href"] == "http://rookery/bots/huggingtweets/ada"
    shown = one(page, "#picture img").attributes
    assert picture.endswith(shown["src"] or "-")
    assert shown["alt"] == "Ada Lovelace, marked AI BOT, with the text: My dream is an engine."
    assert one(page, "#picture a[download]").attributes["download"] == "huggingtweets-ada.png"


async def test_the_pictures_address_changes_with_what_it_shows(
    world: World, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    world.catalogue.pictures["huggingtweets/ada"] = tmp_path / "predictions.png"
    addresses = set()
    for sample in ("one", "another"):
        know(world, sample=sample)
        addresses.add(one(parse(await client.get(ADA)), "#picture img").attributes["src"])
    assert len(addresses) == 2


async def test_a_model_without_picture_or_facts_has_a_page_too(world: World, client: httpx.AsyncClient) -> None:
    page = parse(await client.get("/bots/fledgling"))
    assert said(page, "h1") == "fledgling" and "AI MODEL" in said(page, ".bot-head")
    assert not page.css("#picture, svg.lineage, meta[property='og:image']")


async def test_versions_can_be_seen_and_gone_back_to(world: World, client: httpx.AsyncClient) -> None:
    know(world)
    page = parse(await client.get(ADA))
    rows = [" ".join(row.text().split()) for row in page.css("#versions tbody tr")]
    assert [row.split()[0] for row in rows] == ["abc123", "abc121", "abc122"]
    assert "3.500" in rows[0] and "answers now" in rows[0]
    assert "Make it answer" in rows[1]
    assert "checkpoint, step 40" in rows[2] and "Make it answer" not in rows[2]
    assert len(page.css("#versions #checkpoints tr")) == 2  # folded, its head among them
    reply = await client.post(ADA, data={"do": "rollback", "revision": "abc121"})
    assert (reply.status_code, reply.headers["location"]) == (303, f"{ADA}?done=rollback")
    assert world.catalogue.main == {"huggingtweets/ada": "abc121"}
    assert "answers from now on" in said(parse(await client.get(f"{ADA}?done=rollback")), ".notice.good")


async def test_of_many_versions_the_newest_are_shown_and_the_one_that_answers(
    world: World, client: httpx.AsyncClient
) -> None:
    made = [
        RevisionInfo(
            "huggingtweets/ada", f"{kind}{number:02}", 1_700_000_000 - number, 1, f"{kind}{number}" == "f55", step=step
        )
        for kind, step in (("f", None), ("c", 7))
        for number in range(60)
    ]
    world.catalogue.list_revisions = lambda model_id, viewer=ALL_SEEING: tuple(made)  # type: ignore
    page = parse(await client.get(ADA))
    shown = [row.text() for row in page.css("#versions tbody th")]
    assert shown == [*(f"f{number:02}" for number in range(50)), "f55", *(f"c{number:02}" for number in range(50))]
    assert ["And 9 older" in hint.text() for hint in page.css("#versions .hint")] == [True, False]
    assert "And 10 older" in said(page, "#checkpoints .hint") and said(page, "#checkpoints summary").endswith(": 60")


async def test_a_version_has_its_own_page(world: World, client: httpx.AsyncClient) -> None:
    know(world)
    page = parse(await client.get(f"{ADA}@abc121"))
    assert "version abc121" in said(page, "main > .notice") and one(page, "main > .notice a").attributes["href"] == ADA
    assert one(page, "#write").attributes["data-model"] == "huggingtweets/ada@abc121"
    await client.post(f"{ADA}@abc121", data={"do": "write"})
    assert world.generator.requests[-1].model_id == "huggingtweets/ada@abc121"


async def test_the_lineage_is_that_of_the_job(world: World, client: httpx.AsyncClient) -> None:
    know(world)
    job = world.jobs.begin(JobStatus.SUCCEEDED)
    assert job.id == "ftjob-0"  # as the catalogue's versions say
    raw, data = Artifact("raw-dataset", "tweets-ada", "aa" * 4, 3), Artifact("train-dataset", "dataset-ada", "bb" * 4)
    base, model = Artifact("pretrained-model", "fledgling", "cc" * 4), Artifact("finetuned-model", "ada", "dd" * 4)
    world.jobs.runs[job.id] = (
        Run(job.id, "preprocess", "@ada-preprocess", 1, 2, inputs=(raw,), outputs=(data,)),
        Run(job.id, "train", "@ada-train", 2, 3, inputs=(data, base), outputs=(model,)),
    )
    assert "v3 · aaaaaaaa" in said(parse(await client.get(ADA)), "svg.lineage")


@pytest.mark.parametrize("name", ["openai", "huggingface_hub", "transformers"])
async def test_the_lines_of_python_compile(world: World, client: httpx.AsyncClient, name: str) -> None:
    lines = one(parse(await client.get(ADA)), f"#use-{name}").text()
    compile(lines, name, "exec")
    assert "http://rookery" in lines and "huggingtweets/ada" in lines


async def test_the_card_is_shown(world: World, client: httpx.AsyncClient) -> None:
    assert said(parse(await client.get(ADA)), "#card-text .prose h3") == "huggingtweets/ada"


async def test_only_who_may_decide_is_offered_to(
    locked_world: World, stranger: httpx.AsyncClient, owner: httpx.AsyncClient
) -> None:
    know(locked_world)
    written = {"do": "write", "n": "1"}
    seen, offered = parse(await stranger.post(ADA, data=written)), parse(await owner.post(ADA, data=written))
    for selector in ("#yours", "[data-choose]", "[value=rollback]", "a[href^='/jobs/']"):
        assert not seen.css(selector) and offered.css(selector), selector
    assert len(seen.css("#texts article")) == 1


async def test_to_a_stranger_a_private_bot_is_not_here(
    locked_world: World, stranger: httpx.AsyncClient, owner: httpx.AsyncClient
) -> None:
    know(locked_world, visibility=Visibility.PRIVATE)
    assert (await stranger.get(ADA)).status_code == 404
    assert (await stranger.post(ADA, data={"do": "write"})).status_code == 404
    page = parse(await owner.get(ADA))
    assert "private" in said(page, ".bot-head") and not page.css("meta[property^='og:']")
    assert "http" not in (one(page, "#texts").attributes["data-signature"] or "")


# --- Play ---------------------------------------------------------------------------------------------------


async def test_without_scripts_the_texts_come_with_the_page(world: World, client: httpx.AsyncClient) -> None:
    know(world)
    form = {
        "do": "write",
        "prompt": "My dream is",
        "n": "3",
        "seed": "7",
        "temperature": "0.5",
        "top_k": "",
        "max_tokens": "9",
    }
    page = parse(await client.post(ADA, data=form))
    asked = world.generator.requests[-1]
    assert (asked.prompts, asked.num_choices, asked.seed, asked.add_bos) == (("My dream is",), 3, 7, True)
    assert asked.sampling == {"max_new_tokens": 9, "temperature": 0.5}
    texts = [node.text() for node in page.css("#texts .said")]
    assert len(texts) == 3 and all(text.startswith("My dream is") for text in texts)
    assert [node.text() for node in page.css("#texts .lead")] == ["My dream is"] * 3
    assert "3 texts, with the seed 7" in said(page, "#write-said")
    assert one(page, "#write [name=temperature]").attributes["value"] == "0.5"
    again = parse(await client.post(ADA, data=form))
    assert [node.text() for node in again.css("#texts .said")] == texts


async def test_a_text_is_shared_with_whose_bot_wrote_it(world: World, client: httpx.AsyncClient) -> None:
    know(world)
    form = {"do": "write", "prompt": "a&b #c", "n": "1"}
    page = parse(await client.post(ADA, data=form, headers={"host": "rookery.example"}))
    text = one(page, "#texts .said").text()
    shared = f"{text}\n– @ada's AI bot\nhttp://rookery.example/bots/huggingtweets/ada"
    x, bluesky, mastodon = page.css("#texts a[data-share]")
    assert (x.attributes["href"] or "").startswith("https://x.com/intent/post?text=")
    for link in (x, bluesky):
        assert parse_qs(urlsplit(link.attributes["href"] or "").query)["text"] == [shared]
    assert unquote(urlsplit(mastodon.attributes["href"] or "").fragment) == f"text={shared}"
    for link in (x, bluesky, mastodon):
        assert (link.attributes["rel"], link.attributes["target"]) == ("noopener noreferrer", "_blank")


@pytest.mark.parametrize(
    ("host", "is_public"),
    [
        ("rookery.example", True),
        ("rookery.example:8443", True),
        ("93.184.216.34", True),
        ("localhost:8000", False),
        ("127.0.0.1:8000", False),
        ("[::1]:8000", False),
        ("192.168.0.7", False),
        ("rookery", False),
        ("rookery.local", False),
    ],
)
async def test_an_address_that_leads_nowhere_for_others_is_not_shared(
    world: World, client: httpx.AsyncClient, host: str, is_public: bool
) -> None:
    know(world)
    page = parse(await client.get(ADA, headers={"host": host}))
    address = f"\nhttp://{host}/bots/huggingtweets/ada" if is_public else ""
    assert one(page, "#texts").attributes["data-signature"] == f"\n– @ada's AI bot{address}"


@pytest.mark.parametrize("host", ["a b", "[::1", "x:port", '"><x', "http://evil"])
async def test_a_host_that_is_none_names_no_address(
    world: World, client: httpx.AsyncClient, tmp_path: Path, host: str
) -> None:
    know(world)
    world.catalogue.pictures["huggingtweets/ada"] = tmp_path / "predictions.png"
    reply = await client.get(ADA, headers={"host": host})
    page = parse(reply)
    assert not page.css("link[rel=canonical], [property='og:url'], [property='og:image']")
    assert page.css("[property='og:title']") and "None" not in reply.text and f"//{host}" not in reply.text


async def test_the_empty_card_for_the_script_is_built_like_those_of_the_server(
    world: World, client: httpx.AsyncClient
) -> None:
    know(world)
    page = parse(await client.post(ADA, data={"do": "write", "prompt": "", "n": "1"}))
    source = (await client.get(ADA)).text.partition('<template id="card-of-text">')[2].partition("</template>")[0]
    empty, full = (LexborHTMLParser(html) for html in (source, one(page, "#texts").html or ""))

    def shape(root: LexborHTMLParser) -> list[tuple[str | None, str | None]]:
        return [(node.tag, node.attributes.get("class")) for node in one(root, "article").css("*")]

    assert shape(empty) == shape(full)


@pytest.mark.parametrize(
    ("context", "tokens", "most"), [(None, 80, 1024), (2048, 80, 1024), (256, 80, 256), (64, 32, 64)]
)
async def test_the_longest_text_fits_the_context(
    world: World, client: httpx.AsyncClient, context: int | None, tokens: int, most: int
) -> None:
    know(world, context_length=context)
    field = one(parse(await client.get(ADA)), "#max_tokens").attributes
    assert (field["value"], field["max"]) == (str(tokens), str(most))
    await client.post(ADA, data={"do": "write", "max_tokens": ""})
    assert world.generator.requests[-1].sampling == {"max_new_tokens": tokens}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n": "11"}, "'n'"),
        ({"n": "many"}, "'n'"),
        ({"temperature": "nan"}, "'temperature'"),
        ({"top_p": "0"}, "'top_p'"),
        ({"prompt": "x" * 4001}, "'prompt'"),
    ],
)
async def test_what_is_wrong_is_said_in_place(
    world: World, client: httpx.AsyncClient, fields: dict[str, str], sentence: str
) -> None:
    page = parse(await client.post(ADA, data={"do": "write", "prompt": "kept", **fields}), 400)
    assert sentence in said(page, "#write-error") and "hidden" not in one(page, "#write-error").attributes
    assert one(page, "#prompt").attributes["value"] == fields.get("prompt", "kept")
    assert "open" in one(page, "#sampling").attributes  # a field that is wrong can be reached
    assert not world.generator.requests


async def test_a_busy_server_says_so_and_keeps_the_form(world: World, client: httpx.AsyncClient) -> None:
    world.catalogue.models["busy"] = ModelInfo("busy", "abc123", 1, 1, "rookery")
    reply = await client.post("/bots/busy", data={"do": "write", "prompt": "hello"})
    page = parse(reply, 429)
    assert int(reply.headers["retry-after"]) > 0
    assert "Too many requests" in said(page, "#write-error")
    assert one(page, "#prompt").attributes["value"] == "hello"


# --- Deciding -----------------------------------------------------------------------------------------------


async def test_a_text_becomes_the_preview(world: World, client: httpx.AsyncClient) -> None:
    know(world)
    reply = await client.post(ADA, data={"do": "preview", "prompt": "My", "text": "My tea.\r\nYes."})
    assert (reply.status_code, reply.headers["location"]) == (303, f"{ADA}?done=preview#picture")
    assert world.catalogue.models["huggingtweets/ada"].sample == "My tea.\nYes."
    assert [text for _, text in world.pictures] == ["My tea.\nYes."]
    wrong = await client.post(ADA, data={"do": "preview", "prompt": "Your", "text": "My tea."})
    assert "must begin with" in said(parse(wrong, 400), ".notice.bad")


async def test_a_text_stands_for_the_version_that_wrote_it(world: World, client: httpx.AsyncClient) -> None:
    know(world)
    page = parse(await client.post(ADA, data={"do": "write", "n": "1"}))
    assert one(page, "#write").attributes["data-model"] == "huggingtweets/ada@abc123"
    assert world.generator.requests[-1].model_id == "huggingtweets/ada@abc123"
    assert one(page, "#texts [name=revision]").attributes["value"] == "abc123"
    form = {"do": "preview", "prompt": "", "text": "Tea."}
    reply = await client.post(ADA, data={**form, "revision": "abc121"})
    assert reply.headers["location"] == f"{ADA}@abc121?done=preview-of-version#picture"
    assert [*world.catalogue.previews] == ["huggingtweets/ada@abc121"]
    assert "for this version" in said(parse(await client.get(reply.headers["location"])), ".notice.good")
    for gone in ("abc000", "../x"):
        sentence = said(parse(await client.post(ADA, data={**form, "revision": gone}), 404), ".notice.bad")
        assert sentence.startswith("There is no ")


async def test_a_bot_becomes_private_unlisted_and_public_again(world: World, client: httpx.AsyncClient) -> None:
    for visibility in ("private", "unlisted", "public"):
        reply = await client.post(ADA, data={"do": "visibility", "visibility": visibility})
        assert (reply.status_code, reply.headers["location"]) == (303, f"{ADA}?done={visibility}")
        assert world.catalogue.models["huggingtweets/ada"].visibility.value == visibility
        page = parse(await client.get(ADA))
        assert one(page, "#visibility option[selected]").attributes["value"] == visibility
        assert bool(page.css("meta[name=robots]")) is (visibility == "unlisted")
    for wrong in ({}, {"visibility": "secret"}):
        assert (await client.post(ADA, data={"do": "visibility", **wrong})).status_code == 400


async def test_deleting_takes_a_tick_and_takes_everything(world: World, client: httpx.AsyncClient) -> None:
    assert "Nothing was deleted" in said(parse(await client.post(ADA, data={"do": "delete"}), 400), ".notice.bad")
    assert "huggingtweets/ada" in world.catalogue.models
    reply = await client.post(f"{ADA}@abc121", data={"do": "delete", "sure": "yes"})
    assert (reply.status_code, reply.headers["location"]) == (303, "/")
    assert "huggingtweets/ada" not in world.catalogue.models
    assert world.jobs.forgotten == world.generator.forgotten == ["huggingtweets/ada"]


async def test_the_embedded_base_stays(world: World, client: httpx.AsyncClient) -> None:
    page = parse(await client.get("/bots/fledgling"))
    assert not page.css("#yours") and parse(await client.get(ADA)).css("#yours")
    assert "cannot be deleted" in (await client.post("/bots/fledgling", data={"do": "delete", "sure": "yes"})).text


@pytest.mark.parametrize("action", ["preview", "rollback", "visibility", "delete", "pull", "", "other"])
async def test_a_stranger_decides_nothing(locked_world: World, stranger: httpx.AsyncClient, action: str) -> None:
    before = dict(locked_world.catalogue.models)
    reply = await stranger.post(ADA, data={"do": action, "sure": "yes", "revision": "abc121", "text": "t"})
    assert reply.status_code == 303 and reply.headers["location"].startswith("/login?next=")
    assert locked_world.catalogue.models == before and not locked_world.catalogue.main


async def test_an_unknown_wish_is_refused(client: httpx.AsyncClient) -> None:
    assert "'do' must be" in said(parse(await client.post(ADA, data={"do": "dance"}), 400), ".notice.bad")


async def test_another_site_cannot_press_the_buttons(world: World, client: httpx.AsyncClient) -> None:
    headers = {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}
    reply = await client.post(ADA, data={"do": "delete", "sure": "yes"}, headers=headers)
    assert reply.status_code == 403 and "huggingtweets/ada" in world.catalogue.models


# --- What is not here ---------------------------------------------------------------------------------------


async def test_without_a_hub_what_is_not_here_is_not_here(client: httpx.AsyncClient) -> None:
    page = parse(await client.get("/bots/huggingtweets/nobody"), 404)
    assert "huggingtweets/nobody is not here" in said(page, "h1")
    assert "fetches nothing" in said(page, "main") and not page.css("main form")


@pytest.mark.parametrize("model", ["a/b/c", "a..b", "a b", "%3Cscript%3E", "x@"])
async def test_what_cannot_be_a_model_is_not_here_either(client: httpx.AsyncClient, model: str) -> None:
    reply = await client.get(f"/bots/{model}")
    assert reply.status_code == 404 and "<script>" not in reply.text


class SlowPuller:
    """A Hub with models under any name but `hub/nothing`, which come when `go_on` is set; `hub/broken` breaks then."""

    def __init__(self, catalogue: MemoryCatalogue) -> None:
        self.catalogue = catalogue
        self.go_on = threading.Event()

    def pull(self, model_id: str, on_progress: Callable[[PullProgress], None] = lambda progress: None) -> ModelInfo:
        if model_id == "hub/nothing":
            raise ModelNotFound("The Hub has no such model.")
        on_progress(PullProgress("downloading", "model.safetensors", 25, 100))
        assert self.go_on.wait(10)
        if model_id == "hub/broken":
            raise ModelUnusable("It is no GPT-2.")
        info = self.catalogue.models[model_id] = ModelInfo(model_id, "abc123", 1, 1, "hub", from_hub=True)
        return info


@pytest.fixture
def puller(tmp_path: Path) -> Iterator[SlowPuller]:
    puller = SlowPuller(MemoryCatalogue())
    yield puller
    puller.go_on.set()


def browser(puller: SlowPuller, folder: Path, *keys: str) -> httpx.AsyncClient:
    files = MemoryFiles(folder / "files")
    app = build_api(
        generator=EchoGenerator(),
        catalogue=puller.catalogue,
        files=files,
        jobs=MemoryJobs(files),
        upload_dir=folder / "uploads",
        puller=puller,
        add_pages=add_pages,
        access=Access(MemoryKeys(*keys)),
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery", headers=BROWSER)


async def test_a_model_is_fetched_at_a_press(puller: SlowPuller, tmp_path: Path) -> None:
    puller.go_on.set()
    async with browser(puller, tmp_path) as client:
        assert "Fetch it" in said(parse(await client.get("/bots/hub/gpt"), 404), "main form")
        reply = await client.post("/bots/hub/gpt", data={"do": "pull"})
        assert (reply.status_code, reply.headers["location"]) == (303, "/bots/hub/gpt")
        arrived = await client.get("/bots/hub/gpt?fetching=1")
        assert (arrived.status_code, arrived.headers["location"]) == (303, "/bots/hub/gpt")
        assert parse(await client.get("/bots/hub/gpt")).css("#write")


async def test_a_long_fetch_shows_how_far_it_is(
    puller: SlowPuller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.web.fetching._PATIENCE_S", 0.05)
    async with browser(puller, tmp_path) as client:
        began = await client.post("/bots/hub/gpt?fetching=1", data={"do": "pull"})
        for page in (parse(began), parse(await client.get("/bots/hub/gpt?fetching=1"))):
            assert "25 B of 100 B" in said(page, "#fetching[data-live]")
            assert "Coming from" in said(page, "[role=status] > [data-live]")
            bar = one(page, "progress").attributes
            assert (bar["value"], bar["max"]) == ("25", "100")
            assert 'content="3; url=/bots/hub/gpt?fetching=1"' in (page.html or "")
        puller.go_on.set()
        async with asyncio.timeout(5):
            while (await client.get("/bots/hub/gpt?fetching=1")).status_code != 303:
                await asyncio.sleep(0.01)


async def test_what_the_hub_refuses_is_said(puller: SlowPuller, tmp_path: Path) -> None:
    async with browser(puller, tmp_path) as client:
        reply = await client.post("/bots/hub/nothing", data={"do": "pull"})
        page = parse(reply, 404)
        assert "The Hub has no such model." in said(page, ".notice.bad") and "Fetch it" in said(page, "main form")
        assert not parse(await client.get("/bots/hub/nothing"), 404).css(".notice")


async def test_an_end_that_came_later_is_shown_once(
    puller: SlowPuller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.web.fetching._PATIENCE_S", 0.05)
    async with browser(puller, tmp_path) as client:
        parse(await client.post("/bots/hub/broken", data={"do": "pull"}))
        puller.go_on.set()
        async with asyncio.timeout(5):
            while not (page := parse(await client.get("/bots/hub/broken"))).css(".notice.bad"):
                await asyncio.sleep(0.01)
        assert not page.css("[data-live]")
        parse(await client.get("/bots/hub/broken"), 404)


async def test_what_came_and_was_deleted_is_not_here(puller: SlowPuller, tmp_path: Path) -> None:
    puller.go_on.set()
    async with browser(puller, tmp_path) as client:
        await client.post("/bots/hub/gpt", data={"do": "pull"})
        del puller.catalogue.models["hub/gpt"]
        parse(await client.get("/bots/hub/gpt"), 404)


async def test_another_gateway_says_that_it_may_be_coming(puller: SlowPuller, tmp_path: Path) -> None:
    async with browser(puller, tmp_path) as other:
        page = parse(await other.get("/bots/hub/gpt?fetching=1"), 409)  # live.js goes on with what it shows
        assert "not here yet" in said(page, "h1") and "Perhaps it is being fetched" in said(page, "[role=status]")
        assert len(page.css("[data-live][id]")) == 2 and "Fetch it" in said(page, "#fetching form")
        assert not parse(await other.get("/bots/hub/gpt"), 404).css("[data-live]")
        puller.catalogue.models["hub/gpt"] = ModelInfo("hub/gpt", "abc123", 1, 1, "hub")
        assert (await other.get("/bots/hub/gpt?fetching=1")).headers["location"] == "/bots/hub/gpt"


async def test_of_a_fetch_a_stranger_learns_nothing(
    puller: SlowPuller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.web.fetching._PATIENCE_S", 0.05)
    own = {"authorization": "Bearer a key"}
    async with browser(puller, tmp_path, "a key") as client:
        addresses = [f"/bots/hub/{name}{query}" for name in ("gpt", "never") for query in ("", "?fetching=1")]
        before = [await client.get(address) for address in addresses]
        parse(await client.post("/bots/hub/gpt", data={"do": "pull"}, headers=own))
        after = [await client.get(address) for address in addresses]
        assert [(reply.status_code, reply.text) for reply in after] == [(404, reply.text) for reply in before]
        assert parse(await client.get("/bots/hub/gpt", headers=own)).css("progress")


async def test_a_stranger_is_asked_to_sign_in_before_fetching(puller: SlowPuller, tmp_path: Path) -> None:
    async with browser(puller, tmp_path, "a key") as client:
        page = parse(await client.get("/bots/hub/gpt"), 404)
        assert not page.css("main form") and "sign in" in said(page, "main")


# --- Strangers' words ---------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></textarea></template><script>alert(1)</script>",
    "\u202eevil\u202c \u2066x\u2069 {{ 7 * 7 }} {% raw %}",
    "مرحبا بالعالم שלום עולם 👩‍🚀🏳️‍🌈",
]


@pytest.mark.parametrize("words", HOSTILE)
async def test_nothing_that_a_stranger_wrote_breaks_out(
    world: World, client: httpx.AsyncClient, tmp_path: Path, words: str
) -> None:
    world.catalogue.pictures["huggingtweets/ada"] = tmp_path / "predictions.png"

    async def shown(said: str) -> LexborHTMLParser:
        counts = {said: {"kept": 1}}
        know(
            world, handles=(said,), names={said: said}, sample=said, base_model=f"{said} ?", counts=counts, tags=(said,)
        )
        world.catalogue.read_card = lambda model_id: f"---\ntitle: {said}\n---\n# {said}\n\n{said}"  # type: ignore[method-assign]
        return parse(await client.post(ADA, data={"do": "write", "prompt": said, "n": "2", "seed": "1"}))

    tame, page = await shown("tame"), await shown(words)
    assert one(page, "h1").text() == words
    assert one(page, "#prompt").attributes["value"] == words
    assert [node.text() for node in page.css("#texts .lead")] == [words, words]
    assert not one(page, ".prose").css("script, [onerror], [onmouseover], [style]")
    assert shape(page) == shape(tame)


def shape(page: LexborHTMLParser) -> list[tuple[str | None, tuple[str, ...]]]:
    """All elements and the names of their attributes, without the card's: it has tests of its own."""
    for node in page.css(".prose > *"):
        node.decompose()
    return [(node.tag, tuple(sorted(node.attributes))) for node in page.css("*")]


async def test_every_element_with_a_strangers_words_finds_its_own_direction(
    world: World, client: httpx.AsyncClient
) -> None:
    words = "שלום <b>"
    know(world, handles=(words,), names={words: words}, sample=words, counts={words: {"kept": 1}}, base_model=words)
    page = parse(await client.post(ADA, data={"do": "write", "prompt": words, "n": "1"}))
    for node in one(page, "main").css("*"):
        own = (node.text(deep=False) or "").strip()
        if words in own and node.tag not in ("text", "title"):  # of the drawing, by its style
            above = [node, node.parent] if node.parent else [node]
            assert node.tag == "bdi" or any(one_of.attributes.get("dir") == "auto" for one_of in above), node.html
