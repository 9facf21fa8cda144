"""Texts and visitors that mean no good: markup in an archive, and callers without a key."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.training.archive_files import script, tweet, wrapped, write_zip
from tests.web.flows.steps import play, train, write
from tests.web.flows.world import PROMPT, World, button, expect_error
from tests.web.service import TRAIN_S

_MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
_NAME = f"{_MARKUP}\u202e أحمد 👩‍👩‍👧"
_HANDLE = "evil_1"
_MODEL = f"huggingtweets/{_HANDLE}"
_ARABIC = "الطقس جميل اليوم في المدينة ونحن نشرب القهوة"
_HEBREW = "היום מזג האוויר יפה ואנחנו שותים קפה בעיר"
_EMOJI = "a family 👩‍👩‍👧 of four flags 🏳️‍🌈 and a wave 👋🏽 in the morning"
_TEXTS = (
    _ARABIC,
    _HEBREW,
    _EMOJI,
    f"{_MARKUP} is what I always say to them",
    "\u202e backwards and \u2067 forwards <b onmouseover=alert(3)> again</b>",
    "<svg/onload=alert(4)> javascript:alert(5) is no link of mine, or is it",
)

# Elements that only a text could have brought in.
_FOREIGN = """() => [...document.querySelectorAll("*")].filter(e =>
  (e.tagName === "SCRIPT" && !(e.getAttribute("src") ?? "").startsWith("/static/")) ||
  (e.tagName === "IMG" && e.getAttribute("src") === "x") ||
  [...e.attributes].some(a => a.name.startsWith("on") || /^\\s*javascript:/i.test(a.value))
).map(e => e.outerHTML.slice(0, 120))"""


def nothing_of_what_an_archive_says_is_taken_for_markup(world: World) -> None:
    account = {"username": _HANDLE, "accountDisplayName": _NAME}
    tweets = [tweet(number, f"{_TEXTS[number % len(_TEXTS)]} {number}") for number in range(480)]
    members = {
        "data/account.js": script("account.part0", [{"account": account}]),
        "data/tweets.js": script("tweets.part0", wrapped(*tweets)),
    }
    archive = write_zip(world.folder / "<img src=x onerror=alert(6)>.zip", members)
    with world.watch.window() as page:
        page.goto("/make")
        page.locator("#archive-1").set_input_files(archive)
        button(page, "Upload and look").click()
        page.wait_for_url("**/make/review?**")
        expect(page.get_by_role("main")).to_contain_text(archive.name)
        _expect_plain(page)
        _expect_directions(page, ".tweets p")
        world.watch.look(page, "strange-review")
        train(page)
        expect(page.locator("#samples .said").first).to_be_visible(timeout=1000 * TRAIN_S)
        _expect_plain(page)
        world.watch.look(page, "strange-job")
        play(page)
        expect(page.get_by_role("heading", level=1)).to_contain_text("<script>alert(1)</script>")
        page.locator("#card-text summary").click()
        _expect_plain(page)
        for prompt in (_MARKUP, _ARABIC):
            write(page, prompt)
            _expect_plain(page)
            _expect_directions(page, "#texts .said")
        world.watch.look(page, "strange-bot")
        page.get_by_role("button", name="Use as preview").first.click()
        expect(page.locator("#write-said")).to_contain_text("stands for the bot")
        for address in (f"/?q={_HANDLE}", "/jobs", "/admin", f"/bots/{_MODEL}"):
            page.goto(address)
            expect(page.get_by_role("main")).to_contain_text(_HANDLE)
            _expect_plain(page)
        page.goto(f"/?q={_HANDLE}")
        _expect_directions(page, ".gallery blockquote")
        world.watch.look(page, "strange-home")


def who_has_no_key_reads_and_plays_but_decides_nothing(world: World) -> None:
    with world.watch.window() as owner:
        owner.goto("/make")
        expect(owner).to_have_url(re.compile("/login"))
        world.watch.look(owner, "login")
        owner.get_by_label("Key").fill("not-a-key")
        button(owner, "^Sign in$").click()
        expect_error(owner, "none of this server's keys")
        world.watch.look(owner, "login-refused", weigh=False)
        owner.get_by_label("Key").fill(world.site.key)
        button(owner, "^Sign in$").click()
        expect(owner).to_have_url(re.compile("/make$"))
        cookie = next(one for one in owner.context.cookies() if str(one.get("name")).startswith("rookery_key"))
        assert cookie.get("httpOnly") and cookie.get("sameSite") == "Strict", cookie
        owner.goto("/bots/copies/bird-05")
        owner.get_by_label("Who meets it").select_option("private")
        button(owner, "^Change$").click()
        expect(owner.locator(".notice.good")).to_contain_text("private now")
        world.watch.look(owner, "bot-private", weigh=False)

        with world.watch.window() as stranger:
            _expect_no_say(world, stranger)

        owner.goto("/?q=bird-05")
        expect(owner.locator(".gallery > li")).to_contain_text("private")
        owner.goto("/admin")
        expect(owner.get_by_role("heading", name="Operator")).to_be_visible()
        button(owner, "Sign out").click()
        expect(owner.get_by_role("link", name="Sign in")).to_be_visible()
        reply = owner.goto("/bots/copies/bird-05")
        assert reply is not None and reply.status == 404, reply


def _expect_no_say(world: World, page: Page) -> None:
    """A visitor without a key."""
    page.goto("/?q=bird-05")
    expect(page.get_by_text("No bot here has that in its name")).to_be_visible()
    reply = page.goto("/bots/copies/bird-05")
    assert reply is not None and reply.status == 404, reply
    assert "bird-05" not in page.request.get("/v1/models?limit=1000").text()
    for address in ("/make", "/jobs", "/admin"):
        page.goto(address)
        expect(page).to_have_url(re.compile(f"/login\\?next=%2F{address[1:]}$"))
    page.goto("/bots/copies/bird-06")
    expect(page.get_by_text("Delete everything")).to_have_count(0)
    write(page, PROMPT)
    world.watch.look(page, "bot-without-a-key")
    for do in ("delete", "visibility", "rollback"):
        reply_to_form = page.request.post(
            "/bots/copies/bird-06", form={"do": do, "sure": "yes", "visibility": "private"}, max_redirects=0
        )
        assert reply_to_form.status == 303 and "/login" in reply_to_form.headers["location"], reply_to_form.status


def _expect_plain(page: Page) -> None:
    """No element of the page came out of a text. A dialog would have failed the flow."""
    foreign = page.evaluate(_FOREIGN)
    assert not foreign, foreign


def _expect_directions(page: Page, selector: str) -> None:
    """Every text runs as its first strong letter says."""
    wrong = page.evaluate(
        """selector => [...document.querySelectorAll(selector)].filter(e => {
          const strong = e.textContent.match(/[A-Za-z\\u0590-\\u06ff]/)?.[0] ?? "a";
          return getComputedStyle(e).direction !== (/[A-Za-z]/.test(strong) ? "ltr" : "rtl");
        }).map(e => e.textContent.slice(0, 60))""",
        selector,
    )
    assert not wrong, wrong
