"""Making a bot: the three steps from an archive to a picture that is shared, cyborgs, cancelling, and wrong files."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests.training.archive_files import tweet, write_zip, x_zip
from tests.web.browser import PHONE, Watch
from tests.web.flows.steps import drop_files, play, slow_down, train, upload, write
from tests.web.flows.world import BARNACLE, INES, PROMPT, SEVEN, World, button, expect_error, real_owner
from tests.web.service import TRAIN_S, wait_for

PICTURE = (1200, 630)
_COUNTED = ("downloaded", "retweets", "short", "kept")
_FINAL = ("succeeded", "failed", "cancelled")


def an_archive_is_dropped_and_ends_in_a_shared_picture(world: World) -> None:
    owner = real_owner()
    with world.watch.window() as page:
        page.goto("/")
        page.get_by_role("main").get_by_role("link", name="Make your bot").click()
        world.watch.look(page, "make")
        slow_down(page, upload_bytes_per_s=60_000)
        drop_files(page, "#archive-1", owner.archive)
        button(page, "Upload and look").click()
        _expect_progress(page)
        page.wait_for_url("**/make/review?**", timeout=60_000)
        slow_down(page, upload_bytes_per_s=-1)

        expected = _preview(owner.archive)
        expect(page.locator("#handle-1")).to_have_value(expected["handle"])
        assert _counts(page, of=0) == {name: expected[name] for name in _COUNTED}, _counts(page, of=0)
        assert page.locator(".tweets > li").all_inner_texts() == expected["samples"]
        world.watch.look(page, "review")

        _expect_no_way_around_consent(page)
        page.get_by_label(re.compile("I have the right to use")).check()
        page.get_by_text("Options", exact=True).click()
        page.get_by_label("Epochs").fill("3")
        button(page, "^Train$").click()
        page.wait_for_url("**/jobs/ftjob-*")
        _follow(world, page)
        play(page)
        expect(page).to_have_url(re.compile(f"/bots/{owner.model}$"))
        _share(world, page, owner.model)


def the_same_three_steps_on_a_phone(world: World) -> None:
    with world.watch.window(PHONE) as page:
        page.goto("/")
        page.get_by_role("main").get_by_role("link", name="Make your bot").tap()
        page.locator("#archive-1").set_input_files(INES.archive)
        button(page, "Upload and look").tap()
        page.wait_for_url("**/make/review?**")
        expect(page.locator(".tweets > li")).to_have_count(8)
        train(page)
        play(page)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        _share(world, page, INES.model)


def two_people_become_a_cyborg(world: World) -> None:
    with world.watch.window() as page:
        upload(page, BARNACLE, SEVEN)
        expected = _preview(BARNACLE.archive, SEVEN.archive)
        assert _counts(page, of=2) == {name: expected[name] for name in _COUNTED}, _counts(page, of=2)
        world.watch.look(page, "review-cyborg")
        train(page)
        play(page)
        expect(page.get_by_text("AI CYBORG").first).to_be_visible()
        for owner in (BARNACLE, SEVEN):
            expect(page.locator(".bot-head")).to_contain_text(f"@{owner.handle}")
        expect(page.locator("svg.lineage")).to_be_visible()
        write(page, PROMPT)
        world.watch.look(page, "bot-cyborg")
        page.goto("/jobs")
        expect(page.locator("#jobs")).to_contain_text("succeeded")
        world.watch.look(page, "jobs")


def three_archives_are_dropped_at_once_and_wait_for_who_comes_back(world: World) -> None:
    archives = [owner.archive for owner in (BARNACLE, SEVEN, INES)]
    with world.watch.window() as page:
        page.goto("/make")
        drop_files(page, "#archive-1", *archives, archives[0])
        expect_error(page, "at most 3 archives", "none was taken")
        drop_files(page, "#archive-1", *archives)
        for number, archive in enumerate(archives, 1):
            expect(page.locator(f"#archive-{number}")).to_be_visible()
            expect(page.locator(f"#archive-{number}")).to_have_value(re.compile(f"{archive.name}$"))
        button(page, "Upload and look").click()
        page.wait_for_url("**/make/review?**")
        address, waiting = page.url, page.get_by_role("link", name="Go on with the archive")
        page.goto("/make")
        waiting.click()
        expect(page).to_have_url(address)
        button(page, "Throw").click()
        page.wait_for_url("**/make")
        page.reload()
        expect(waiting).to_be_hidden()


def a_job_is_paused_goes_on_and_is_cancelled_from_its_page(world: World) -> None:
    with world.watch.window() as page:
        upload(page, INES)
        job = train(page, epochs=50)
        expect(page.locator("#progress progress[value]")).to_be_visible(timeout=60_000)
        button(page, "Pause").click()
        expect(page.locator("#phase")).to_contain_text(re.compile("paus", re.IGNORECASE), timeout=60_000)
        wait_for(lambda: world.site.job(job)["status"] == "paused", 60, "the pause")
        world.watch.look(page, "job-paused")
        button(page, "Go on").click()
        expect(button(page, "Pause")).to_be_visible(timeout=60_000)
        button(page, "Cancel").click()
        expect(page.locator("#progress")).to_contain_text("There is no bot", timeout=60_000)
        assert world.site.job(job)["status"] == "cancelled"
        world.watch.look(page, "job-cancelled")


def the_page_of_a_job_asks_less_often_while_nobody_answers_and_stops_when_it_is_gone(world: World) -> None:
    asked: list[str] = []
    status = 503

    def answer(route: Route) -> None:
        asked.append(route.request.resource_type)
        route.fulfill(status=status, content_type="text/html", body="<p>Nothing is here.</p>")

    with world.watch.window() as page, world.watch.allowing(404, 503):
        page.clock.install()
        upload(page, INES)
        job = train(page, epochs=50)
        with page.expect_response(lambda response: response.status == 503):
            page.route(f"**/jobs/{job}", answer)
        for wait_s in (4, 8, 16, 30, 30):
            num_asked = len(asked)
            page.evaluate("() => 0")  # the script has taken the answer
            page.clock.run_for(1000 * wait_s - 1500)
            assert len(asked) == num_asked, f"it asked again in less than {wait_s} s"
            with page.expect_response(lambda response: response.status == 503):
                page.clock.run_for(1500)
        status, asked[:] = 404, []
        page.clock.run_for(30_000)
        expect(page.get_by_text("Nothing is here.")).to_be_visible()
        page.clock.run_for(120_000)
        assert asked == ["fetch", "document"], asked
    world.site.ask("POST", f"/v1/fine_tuning/jobs/{job}/cancel")


def a_wrong_file_is_refused_in_a_sentence_and_the_form_stays(world: World) -> None:
    folder = world.folder
    (folder / "notes.zip").write_bytes(b"PK\x03\x04 no archive at all")
    write_zip(folder / "pictures.zip", {"cat.png": b"\x89PNG"})
    (folder / "empty.csv").write_bytes(b"")
    with world.watch.window() as page, world.watch.allowing(400, 422):
        page.goto("/make")
        for name in ("notes.zip", "pictures.zip", "empty.csv"):
            page.locator("#archive-1").set_input_files(folder / name)
            button(page, "Upload and look").click()
            expect_error(page, r"[a-z ]{10,}\.$")
            expect(page.locator("#archive-1")).to_be_visible()
            assert page.url.endswith("/make"), page.url
        world.watch.look(page, "make-refused", weigh=False)
        x_zip(folder / "small.zip", [tweet(n, f"this is the small tweet number {n}") for n in range(20)])
        page.locator("#archive-1").set_input_files(folder / "small.zip")
        button(page, "Upload and look").click()
        page.wait_for_url("**/make/review?**")
        expect_error(page, "too little text", "characters")
        expect(button(page, "^Train$")).to_have_count(0)
        world.watch.look(page, "review-too-small")
        button(page, "Throw").click()
        page.wait_for_url("**/make")


# --- Parts of these -----------------------------------------------------------------------------------------


def _preview(*archives: Path) -> Mapping[str, Any]:
    """What `rookery preview --json` says."""
    command = [sys.executable, "-m", "deployments.cli", "preview", *map(str, archives), "--json"]
    report: Mapping[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return report


def _counts(page: Page, *, of: int) -> Mapping[str, int]:
    """The table's column of one person; after the last one's comes that of all together."""
    rows = {name: page.get_by_role("row", name=re.compile(f"^{name}", re.IGNORECASE)) for name in _COUNTED}
    return {name: int(row.locator("td").nth(of).inner_text().replace(",", "")) for name, row in rows.items()}


def _expect_progress(page: Page) -> None:
    """The upload is seen to advance."""
    facts = page.locator("#sending-facts")
    expect(facts).to_have_text(re.compile(r" of .* left$"))
    seen = {facts.text_content()}
    wait_for(lambda: len(seen.union([facts.text_content()])) > 1 or not facts.is_visible(), 10, "progress")


def _expect_no_way_around_consent(page: Page) -> None:
    """Neither by the button, nor by a form without its check."""
    address = page.url
    button(page, "^Train$").click()
    assert page.url == address
    assert page.evaluate("() => document.activeElement.name") == "consent", "the missing consent is not pointed at"
    page.evaluate("() => { document.querySelector('[name=consent]').required = false; }")
    button(page, "^Train$").click()
    expect_error(page, "tick the box")
    assert "/jobs/" not in page.url
    expect(page.locator(".tweets > li")).to_have_count(8)


@dataclass
class Progress:
    """What a job's page shows."""

    share: float
    num_points: int
    num_samples: int

    @classmethod
    def of(cls, page: Page) -> Progress:
        shown = page.evaluate("""() => ({
          share: Number(document.querySelector("#progress progress")?.getAttribute("value") ?? 0),
          num_points: (document.querySelector("polyline.train")?.getAttribute("points") ?? "").split(" ").length,
          num_samples: document.querySelectorAll("#samples .said").length,
        })""")
        return cls(**shown)


def _follow(world: World, page: Page) -> None:
    """A job's page until the end: it changes by itself, and is left once without losing anything."""
    job = page.url.rsplit("/", 1)[1]
    expect(page.locator("svg.chart polyline.train")).to_be_visible(timeout=1000 * TRAIN_S)
    first = Progress.of(page)
    expect(page.locator("#samples .said").first).to_be_visible(timeout=1000 * TRAIN_S)
    later = Progress.of(page)
    assert later.num_points > first.num_points, f"the curve does not grow: {first}, {later}"
    expect(page.locator("#progress")).to_contain_text(re.compile(r"about \d+:\d\d left"))
    world.watch.look(page, "job")
    page.get_by_role("link", name="Bots", exact=True).click()
    expect(page.get_by_role("searchbox")).to_be_visible()
    page.go_back()
    expect(page.locator("#samples .said").first).to_be_visible()
    back = Progress.of(page)
    is_over = world.site.job(job)["status"] in _FINAL
    assert is_over or (back.share >= later.share and back.num_points >= later.num_points), f"{later}, then {back}"
    expect(page.get_by_role("link", name="Play with it")).to_be_visible(timeout=1000 * TRAIN_S)
    assert Progress.of(page).num_points >= back.num_points
    world.watch.look(page, "job-done")


def _share(world: World, page: Page, model: str) -> None:
    """Five texts, one of which stands for the bot afterwards: on its picture, and where it is shared."""
    world.watch.look(page, f"bot-{model.rsplit('/')[-1]}", weigh=True)
    texts = write(page, PROMPT)
    world.watch.look(page, f"bot-{model.rsplit('/')[-1]}-written", weigh=False)
    before = _download(page)
    card = page.locator("#texts article").nth(1)
    _expect_share_links(world.watch, card.locator("details.share"), texts[1], model)
    card.get_by_role("button", name="Copy").click()
    assert page.evaluate("() => navigator.clipboard.readText()") == texts[1]
    picture = page.locator("#picture img")
    address = picture.get_attribute("src")
    card.get_by_role("button", name="Use as preview").click()
    expect(picture).not_to_have_attribute("src", address or "")
    expect(page.locator("#write-said")).to_contain_text("stands for the bot")
    after = _download(page)
    assert after != before, "the picture shows what it showed before"
    page.goto("/")
    expect(page.locator(".gallery > li", has_text=model.rsplit("/")[-1]).first).to_be_visible()


def _expect_share_links(watch: Watch, menu: Any, text: str, model: str) -> None:
    menu.locator("summary").click()
    links = menu.get_by_role("link")
    expect(links).to_have_count(3)
    for link in links.all():
        address = link.get_attribute("href") or ""
        assert address.startswith("https://") and text in unquote(address), address
        assert watch.origin not in unquote(address), "nobody else can open a loopback address"
        assert "noopener" in (link.get_attribute("rel") or "")


def _download(page: Page) -> bytes:
    """The picture, as the link gives it."""
    with page.expect_download() as caught:
        page.locator("#picture").get_by_role("link", name="Download").click()
    assert caught.value.suggested_filename.endswith(".png")
    content = Path(caught.value.path()).read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("PNG", PICTURE), (image.format, image.size)
    return content
