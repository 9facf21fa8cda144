"""With a bot that is there: by keyboard alone, without scripts, back to an older version, and its end."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

from tests.web.flows.steps import growth, play, refresh_until, train, upload, watch_growth
from tests.web.flows.world import BARNACLE, SEVEN, Owner, World, button
from tests.web.service import BASE

_MAX_TABS = 120


def a_text_is_written_by_keyboard_alone(world: World) -> None:
    with world.watch.window() as page:
        page.goto("/")
        page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to the content")
        expect(skip).to_be_focused()
        expect(skip).to_be_in_viewport()
        _expect_visible_focus(page)
        page.keyboard.press("Enter")
        expect(page).to_have_url(re.compile("#main$"))
        page.keyboard.press("Tab")
        expect(page.get_by_role("main").get_by_role("link", name="Make your bot")).to_be_focused()
        search = page.get_by_role("searchbox")
        _tab_to(page, search)
        page.keyboard.type(BASE)
        page.keyboard.press("Enter")
        expect(page.locator(".gallery > li")).to_have_count(1)
        _tab_to(page, page.locator(".gallery a.name"))
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/bots/{BASE}")
        _tab_to(page, page.locator("#prompt"))
        page.keyboard.press("Control+A")
        page.keyboard.type("By hand")
        _tab_to(page, page.locator("#n"))
        page.keyboard.press("Control+A")
        page.keyboard.type("2")
        _tab_to(page, button(page, "^Let it write$"))
        watch_growth(page)
        page.keyboard.press("Enter")
        expect(page.locator("#write-said")).to_contain_text("2 texts", timeout=60_000)
        assert len(growth(page)) > 5, "the texts did not stream in"
        _tab_to(page, page.locator("#texts").get_by_role("button", name="Copy").first)
        page.keyboard.press("Enter")
        expect(page.locator("#texts").get_by_role("button", name="Copied")).to_be_focused()
        share = page.locator("details.share").first
        _tab_to(page, share.locator("summary"))
        page.keyboard.press("Enter")
        _tab_to(page, share.get_by_role("link").first)
        world.watch.look(page, "bot-by-keyboard", weigh=False)
        _tab_around(page)


def an_older_version_answers_again(world: World) -> None:
    site = world.site
    _ensure_versions(world, BARNACLE, 2)
    newest = site.write(BARNACLE.model)
    old_revision = next(one["revision"] for one in site.versions(BARNACLE.model) if not one["is_main"])
    oldest = site.write(f"{BARNACLE.model}@{old_revision}")
    assert newest != oldest, "both versions say the same"
    with world.watch.window() as page:
        page.goto(f"/bots/{BARNACLE.model}")
        row = page.locator("#versions tbody tr", has=page.get_by_text(old_revision[:8]))
        row.get_by_role("link", name=old_revision[:8]).first.click()
        expect(page.get_by_text("This is the version")).to_be_visible()
        world.watch.look(page, "bot-older-version")
        page.get_by_role("link", name="Go to the one").click()
        world.watch.look(page, "bot-versions")
        row.get_by_role("button", name="Make it answer").click()
        expect(page.locator(".notice.good")).to_contain_text("That version answers from now on")
        expect(row).to_contain_text("answers now")
        world.watch.look(page, "bot-rolled-back", weigh=False)
    assert site.write(BARNACLE.model) == oldest


def without_scripts_a_bot_is_made_used_rolled_back_and_deleted(world: World) -> None:
    site = world.site
    _ensure_versions(world, SEVEN, 1)
    first = site.write(SEVEN.model)
    with world.watch.window(scripts=False) as page:
        upload(page, SEVEN)
        world.watch.look(page, "plain-review", scripts=False)
        job = train(page, seed=2)
        progress = page.locator("#progress")
        refresh_until(page, lambda: "step" in (progress.text_content() or ""), "a step")
        world.watch.look(page, "plain-job", scripts=False, weigh=False)
        refresh_until(page, lambda: page.get_by_role("link", name="Play with it").is_visible(), "the bot")
        play(page)
        assert site.job(job)["status"] == "succeeded"
        page.locator("#prompt").fill("<b>Beep</b>")
        page.locator("#n").fill("3")
        button(page, "^Let it write$").click()
        said = page.locator("#texts .said")
        expect(said).to_have_count(3, timeout=60_000)
        assert all(text.startswith("<b>Beep</b>") for text in said.all_text_contents())
        expect(page.get_by_role("button", name="Copy").first).to_be_hidden()  # it could not
        world.watch.look(page, "plain-bot-written", scripts=False, weigh=False)
        page.get_by_role("button", name="Use as preview").first.click()
        expect(page.locator(".notice.good")).to_contain_text("stands for the bot")
        rows = page.locator("#versions tbody tr")
        rows.get_by_role("button", name="Make it answer").last.click()
        expect(page.locator(".notice.good")).to_contain_text("That version answers from now on")
        assert site.write(SEVEN.model) == first
        _delete(page, SEVEN.model)


def all_of_a_bot_is_deleted(world: World) -> None:
    _ensure_versions(world, BARNACLE, 1)
    with world.watch.window() as page:
        page.goto(f"/bots/{BARNACLE.model}")
        page.get_by_text("Delete everything", exact=True).click()
        world.watch.look(page, "bot-delete", weigh=False)
        button(page, "Delete for ever").click()
        assert page.url.endswith(BARNACLE.model), "it was deleted without a tick"
        _delete(page, BARNACLE.model)


# --- Parts of these -----------------------------------------------------------------------------------------


def _ensure_versions(world: World, owner: Owner, number: int) -> None:
    """Trains until the bot has so many that are no mere checkpoints."""
    site = world.site
    models = {model["id"] for model in site.ask("GET", "/v1/models?limit=1000")["data"]}
    have = len(site.versions(owner.model)) if owner.model in models else 0
    jobs = [site.train(owner.archive, owner.handle, seed=seed) for seed in range(have, number)]
    for job in jobs:
        site.finish(job)


def _delete(page: Page, model: str) -> None:
    """From the bot's page until it is nowhere."""
    if not page.get_by_label(re.compile("cannot be undone")).is_visible():
        page.get_by_text("Delete everything", exact=True).click()
    page.get_by_label(re.compile("cannot be undone")).check()
    button(page, "Delete for ever").click()
    expect(page.get_by_role("searchbox")).to_be_visible()
    assert page.locator(f".gallery a[href='/bots/{model}']").count() == 0
    reply = page.request.get(f"/bots/{model}", headers={"accept": "text/html"})
    assert reply.status == 404, reply.status


def _tab_to(page: Page, target: Locator) -> None:
    """Presses Tab until it has the focus; whatever had it on the way was seen to have it."""
    for _ in range(_MAX_TABS):
        if target.evaluate("e => e === document.activeElement"):
            return
        page.keyboard.press("Tab")
        _expect_visible_focus(page)
    raise AssertionError(f"Tab does not reach {target}")


def _tab_around(page: Page) -> None:
    """Tab leaves the page at its end: nothing holds the focus."""
    for _ in range(_MAX_TABS):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement === document.body"):
            return
        _expect_visible_focus(page)
    raise AssertionError("Tab never reaches the end of the page")


def _expect_visible_focus(page: Page) -> None:
    seen = page.evaluate("""() => {
      const e = document.activeElement;
      if (e === document.body) return "";
      const style = getComputedStyle(e), box = e.getBoundingClientRect(), name = e.outerHTML.slice(0, 120);
      if (style.outlineStyle === "none" || parseFloat(style.outlineWidth) < 2) return `no outline: ${name}`;
      return box.bottom < 0 || box.top > innerHeight ? `not in view: ${name}` : "";
    }""")
    assert not seen, seen
