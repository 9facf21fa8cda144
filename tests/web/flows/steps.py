"""The steps that several flows take: upload, train, follow a job, have a bot write."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.web.flows.world import Owner, button
from tests.web.service import TRAIN_S, wait_for

_JOB_MS = 1000 * TRAIN_S


def upload(page: Page, *owners: Owner) -> None:
    """From "Make your bot" to what it would learn from."""
    page.goto("/make")
    for number, owner in enumerate(owners, 1):
        if number > 1:
            page.locator("details.more", has=page.locator(f"#archive-{number}")).last.locator("summary").first.click()
        page.locator(f"#archive-{number}").set_input_files(owner.archive)
    button(page, "Upload and look").click()
    page.wait_for_url("**/make/review?**")


def train(page: Page, *, epochs: int = 1, seed: int | None = None) -> str:
    """From there to the job's page; the job's id."""
    page.get_by_text("Options", exact=True).click()
    page.get_by_label("Epochs").fill(str(epochs))
    if seed is not None:
        page.get_by_label("Seed").fill(str(seed))
    page.get_by_label(re.compile("I have the right to use")).check()
    button(page, "^Train$").click()
    page.wait_for_url("**/jobs/ftjob-*")
    return page.url.rsplit("/", 1)[1]


def play(page: Page) -> None:
    """From a job's page, once it is done, to the bot's."""
    link = page.get_by_role("link", name="Play with it")
    expect(link).to_be_visible(timeout=_JOB_MS)
    link.click()
    page.wait_for_url("**/bots/**")


def refresh_until(page: Page, is_so: Callable[[], bool], what: str) -> None:
    """Without scripts a job's page changes when its link is clicked, and only then."""

    def is_so_now() -> bool:
        if not is_so():
            page.get_by_role("link", name="Refresh").click()
        return is_so()

    wait_for(is_so_now, TRAIN_S, what)


def watch_growth(page: Page) -> None:
    """From now on notes how much text there is whenever there is more, for `growth`."""
    page.evaluate("""() => {
      window.lengths = [];
      const count = () => window.lengths.push(document.getElementById("texts").textContent.trim().length);
      const all = { childList: true, characterData: true, subtree: true };
      new MutationObserver(count).observe(document.getElementById("texts"), all);
    }""")


def growth(page: Page) -> Sequence[int]:
    """Different lengths in order."""
    lengths: list[int] = page.evaluate("() => window.lengths")
    return sorted(set(lengths))


def write(page: Page, prompt: str, *, tokens: int = 40) -> Sequence[str]:
    """Has the bot on its page write five texts, which stream in; the texts."""
    page.locator("#prompt").fill(prompt)
    if not page.get_by_label("Longest text").is_visible():
        page.get_by_text("How it writes", exact=True).click()
    page.get_by_label("Longest text").fill(str(tokens))
    watch_growth(page)
    button(page, "^Let it write$").click()
    expect(page.locator("#write-said")).to_contain_text("5 texts, with the seed", timeout=60_000)
    assert len(growth(page)) > 5, f"the texts did not stream in: {growth(page)}"
    said = page.locator("#texts .said")
    expect(said).to_have_count(5)
    texts = said.all_text_contents()
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text in texts), texts
    return texts


def drop_files(page: Page, target: str, *paths: Path) -> None:
    """Drops files from outside the browser onto an element, as the system does."""
    box = page.locator(target).bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data})
    session.detach()


def slow_down(page: Page, *, upload_bytes_per_s: float) -> None:
    """A line on which an upload is seen to advance; -1: no limit."""
    conditions = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": upload_bytes_per_s}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", conditions)
