"""Takes the pictures that the documents show, of a real service that makes the demo's three bots.

python -m tests.web.pictures        # writes serve/web/screenshots/
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from deployments.demo import ARCHIVES, HANDLES
from tests.web.browser import DESKTOP, PHONE, Size, find_chromium
from tests.web.flows.steps import play
from tests.web.service import ROOT, Site, open_site

FOLDER = ROOT / "serve" / "web" / "screenshots"
_COLOURS = 128
_TALL: Size = (1280, 1180)
_FINAL_MS = 240_000


def main() -> int:
    """Takes them all."""
    chromium = find_chromium()
    if chromium is None:
        print("No Chromium is here: apt-get install chromium", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open_site(Path(folder) / "data") as site, sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        light = browser.new_context(base_url=site.url, viewport={"width": DESKTOP[0], "height": DESKTOP[1]})
        dark = browser.new_context(
            base_url=site.url, viewport={"width": _TALL[0], "height": _TALL[1]}, color_scheme="dark"
        )
        phone = browser.new_context(base_url=site.url, viewport={"width": PHONE[0], "height": PHONE[1]})
        for handle in HANDLES[1:]:
            site.finish(site.train(ARCHIVES / f"{handle}.zip", handle))
        _show_making(light, dark)
        _show_bot(site, light, phone)
        browser.close()
    return 0


def _show_making(light: BrowserContext, dark: BrowserContext) -> None:
    page = light.new_page()
    page.goto("/make")
    page.locator("#archive-1").set_input_files(ARCHIVES / f"{HANDLES[0]}.zip")
    page.get_by_role("button", name="Upload and look").click()
    page.wait_for_url("**/make/review?**")
    _keep(page, "review")
    page.get_by_label("I have the right to use").check()
    page.get_by_role("button", name="Train", exact=True).click()
    page.wait_for_url("**/jobs/ftjob-*")
    watching = dark.new_page()
    watching.goto(page.url)
    expect(watching.get_by_text("After epoch 2 of")).to_be_visible(timeout=_FINAL_MS)
    _keep(watching, "job-dark")
    play(page)
    watching.emulate_media(color_scheme="light")
    watching.goto(watching.url)
    _keep(watching, "job")


def _show_bot(site: Site, light: BrowserContext, phone: BrowserContext) -> None:
    model = f"huggingtweets/{HANDLES[0]}"
    for context, name in ((light, "bot"), (phone, "bot-phone")):
        page = context.new_page()
        page.goto(f"/bots/{model}")
        page.get_by_text("How it writes").click()
        page.get_by_label("Seed").fill("7")
        page.get_by_label("Temperature").fill("0.8")
        page.get_by_text("How it writes").click()
        page.get_by_role("button", name="Let it write").click()
        expect(page.locator("#texts[aria-busy=true]")).to_have_count(0)
        expect(page.locator("#texts .tweet")).to_have_count(5)
        page.wait_for_timeout(500)
        _keep(page, name)
    page = light.new_page()
    page.goto("/")
    _keep(page, "home")


def _keep(page: Page, name: str) -> None:
    """What the window shows, in few colours: it is looked at, not measured."""
    page.evaluate("document.activeElement?.blur()")
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.quantize(_COLOURS, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    sys.exit(main())
