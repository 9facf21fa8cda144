"""A browser that is watched: what its pages ask for, complain of, weigh and look like, and what axe says of them.

Knows no page in particular. Chromium is the machine's own; nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.base import AXE_SCRIPT  # type: ignore[import-untyped]
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Response, sync_playwright
from playwright.sync_api import Error as PlaywrightError

Size = tuple[int, int]
DESKTOP: Size = (1280, 900)
PHONE: Size = (390, 844)
ZOOMED: Size = (640, 450)  # the desktop at 200 %
NARROW: Size = (320, 568)  # WCAG 1.4.10: all content reflows to this width

# Every width with what is looked at there beside overflow: the colour schemes, and whether a picture is kept.
LOOKS: Sequence[tuple[str, Size, str, bool]] = (
    ("desktop-light", DESKTOP, "light", True),
    ("desktop-dark", DESKTOP, "dark", True),
    ("phone-light", PHONE, "light", True),
    ("phone-dark", PHONE, "dark", False),
)
_WCAG = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")
_AXE = {"runOnly": [*_WCAG, "best-practice"], "resultTypes": ["violations"]}
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
_SETTLE_MS = 400
_HTTP_NOISE = re.compile("Failed to load resource: the server responded with a status of")  # `Response` tells better


def find_chromium() -> str | None:
    """Where Chromium is; $CHROMIUM wins."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@dataclass
class Findings:
    """All that was found on all pages."""

    folder: Path
    violations: dict[tuple[str, str], str] = field(default_factory=dict)  # (rule, selector) -> where it was seen first
    advice: dict[tuple[str, str], str] = field(default_factory=dict)  # of best practice, which is no violation of WCAG
    foreign: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # of the flow that runs
    weights: dict[str, float] = field(default_factory=dict)  # page -> kB of a first visit
    num_looks: int = 0
    num_failures: int = 0
    allowed: set[int] = field(default_factory=set)  # statuses that scripts are meant to meet now

    def take_complaints(self) -> list[str]:
        """Those since the last time."""
        taken, self.complaints = self.complaints, []
        return taken


class Watch:
    """Opens windows of one browser on one site and notes what happens in them."""

    def __init__(self, browser: Browser, origin: str, findings: Findings) -> None:
        self._browser = browser
        self.origin = origin
        self.findings = findings

    @contextmanager
    def window(
        self, size: Size = DESKTOP, *, scripts: bool = True, storage: Any = None, also: Sequence[str] = ()
    ) -> Iterator[Page]:
        """A page of a fresh profile. `also`: origins that count as ours."""
        context = self._browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            java_script_enabled=scripts,
            accept_downloads=True,
            has_touch=size == PHONE,
            is_mobile=size == PHONE,
            base_url=self.origin,
            storage_state=storage,
            permissions=["clipboard-read", "clipboard-write"],
        )
        context.set_default_timeout(15_000)
        self._listen(context, {self.origin, *also})
        page = context.new_page()
        try:
            yield page
        except Exception:
            self._keep_failure(page)
            raise
        finally:
            context.close()

    def _keep_failure(self, page: Page) -> None:
        self.findings.num_failures += 1
        with suppress(PlaywrightError):
            page.screenshot(path=self.findings.folder / f"failed-{self.findings.num_failures}.png", full_page=True)

    def _listen(self, context: BrowserContext, ours: set[str]) -> None:
        def on_request(request: Request) -> None:
            if urlsplit(request.url).scheme not in ("data", "blob") and _origin(request.url) not in ours:
                self.findings.foreign.append(request.url)
                self.findings.complaints.append(f"asks another host: {request.url[:200]}")

        def on_response(response: Response) -> None:
            is_wanted = response.status < 400 or response.status in self.findings.allowed
            if not is_wanted and not response.request.is_navigation_request():
                self.findings.complaints.append(f"{response.status} for {response.url[:200]}")

        def on_console(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not _HTTP_NOISE.match(message.text):
                self.findings.complaints.append(f"console {message.type}: {message.text[:400]}")

        context.on("request", on_request)
        context.on("response", on_response)
        context.on("console", on_console)
        context.on("weberror", lambda error: self.findings.complaints.append(f"script error: {error.error}"))
        context.on("dialog", lambda dialog: self._refuse(dialog))

    @contextmanager
    def allowing(self, *statuses: int) -> Iterator[None]:
        """For a while scripts may get these answers; a page that is opened may have any."""
        self.findings.allowed = set(statuses)
        try:
            yield
        finally:
            self.findings.allowed = set()

    def _refuse(self, dialog: Any) -> None:
        self.findings.complaints.append(f"a dialog: {dialog.message[:200]}")
        dialog.dismiss()

    # --- Looking ----------------------------------------------------------------------------------------------

    def look(self, page: Page, name: str, *, weigh: bool = True, scripts: bool = True) -> None:
        """One state of a page at all sizes and in both schemes: pictures, axe, nothing wider than the window.

        `weigh`: its address by itself shows it. `scripts`: axe is one, and needs them. Leaves the window
        as it was.
        """
        size = page.viewport_size
        self.findings.num_looks += 1
        for variant, wide, scheme, is_kept in LOOKS:
            _resize(page, wide)
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            if scripts:
                self._axe(page, f"{name} ({variant})")
            if is_kept:
                path = self.findings.folder / f"{name}-{variant}.png"
                page.screenshot(path=path, full_page=True, animations="disabled")
        page.emulate_media(color_scheme="light", reduced_motion="reduce")
        for wide in (DESKTOP, ZOOMED, PHONE, NARROW):
            _resize(page, wide)
            self._overflow(page, name, wide[0])
        self._motion(page, name)
        page.emulate_media(color_scheme="null", reduced_motion="null")
        assert size is not None
        _resize(page, (size["width"], size["height"]))
        if weigh:
            storage = page.context.storage_state()
            self.findings.weights[name] = self._weigh(page.url, storage)

    def _axe(self, page: Page, where: str) -> None:
        page.evaluate(f"() => {{ if (!window.axe) {{ {AXE_SCRIPT} }} }}")
        found = page.evaluate("options => axe.run(document, options)", _AXE)
        for violation in found["violations"]:
            is_wcag = set(violation["tags"]) & set(_WCAG)
            kind = self.findings.violations if is_wcag else self.findings.advice
            for node in violation["nodes"]:
                selector = " ".join(map(str, node["target"]))
                summary = " ".join(node.get("failureSummary", "").split())[:240]
                kind.setdefault((violation["id"], selector), f"{where}: {summary}")

    def _overflow(self, page: Page, name: str, width: int) -> None:
        over = page.evaluate(_OVERFLOW)
        if over:
            self.findings.complaints.append(f"{name} overflows sideways at {width} px: {over}")

    def _motion(self, page: Page, name: str) -> None:
        moving = page.evaluate("() => document.getAnimations().filter(a => a.playState === 'running').length")
        if moving:
            self.findings.complaints.append(f"{name}: {moving} animations run although less motion is wanted")

    def _weigh(self, address: str, storage: Any) -> float:
        """kB over the wire of all that a first visit loads, until it is shown and idle, without scrolling."""
        with self.window(storage=storage) as page:
            session = page.context.new_cdp_session(page)
            session.send("Network.enable")
            lengths: list[float] = []
            session.on("Network.loadingFinished", lambda event: lengths.append(event["encodedDataLength"]))
            page.goto(address, wait_until="load")
            page.wait_for_timeout(_SETTLE_MS)
            return sum(lengths) / 1000


# What sticks out to the right, if the page can be scrolled there; not what a box of its own cuts off.
_OVERFLOW = """() => {
  const root = document.documentElement, wide = root.clientWidth;
  if (root.scrollWidth <= wide) return "";
  const right = e => Math.round(e.getBoundingClientRect().right);
  const isCut = e => {
    for (let box = e.offsetParent ?? e.parentElement; box && box !== document.body; box = box.offsetParent)
      if (getComputedStyle(box).overflowX !== "visible") return true;
    return false;
  };
  const out = [...document.querySelectorAll("body *")].filter(e => right(e) > wide && !isCut(e));
  const names = out.slice(-3).map(e => `${e.tagName.toLowerCase()}.${e.getAttribute("class")} to ${right(e)}`);
  return names.join(", ") || `to ${root.scrollWidth}`;
}"""


@contextmanager
def open_browser(chromium: str) -> Iterator[Browser]:
    """Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*_ARGUMENTS])
        try:
            yield browser
        finally:
            browser.close()


def _resize(page: Page, size: Size) -> None:
    page.set_viewport_size({"width": size[0], "height": size[1]})


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
