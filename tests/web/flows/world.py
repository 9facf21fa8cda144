"""What every flow is given: a service, a watched browser, archives; and words that several flows say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

from tests.conftest import SHARED_DATA
from tests.web.browser import Watch
from tests.web.service import ROOT, Site

CHARACTERS = ROOT / "deployments" / "archives"
PROMPT = "My dream is"


@dataclass(frozen=True, slots=True)
class Owner:
    """Somebody's archive."""

    archive: Path
    handle: str

    @property
    def model(self) -> str:
        """The name that a bot made of it gets."""
        return f"huggingtweets/{self.handle.lower()}"


@dataclass(frozen=True, slots=True)
class World:
    """What a flow works with. `folder` is empty, and for scratch."""

    site: Site
    watch: Watch
    folder: Path


Flow = Callable[[World], None]

BARNACLE = Owner(CHARACTERS / "capt_barnacle.zip", "capt_barnacle")
INES = Owner(CHARACTERS / "grandma_ines.zip", "grandma_ines")
SEVEN = Owner(CHARACTERS / "unit_seven.zip", "unit_seven")


def real_owner() -> Owner:
    """A real X archive where there is one beside the checkout, else that of a character."""
    found = sorted((SHARED_DATA / "archives" / "x-2024").glob("*.zip"))
    return Owner(found[0], "SenatorTimScott") if found else INES


def button(page: Page, name: str) -> Locator:
    """The one with this name, whatever stands around it."""
    return page.get_by_role("button", name=re.compile(name, re.IGNORECASE))


def expect_error(page: Page, *words: str) -> None:
    """An error that is said aloud and names these things."""
    alert = page.get_by_role("alert").first
    expect(alert).to_be_visible()
    for word in words:
        expect(alert).to_contain_text(re.compile(word, re.IGNORECASE))


def cells(table: Locator) -> Mapping[str, tuple[str, ...]]:
    """The rows of a table's body by their heading."""
    return {
        row.locator("th").inner_text().strip(): tuple(text.strip() for text in row.locator("td").all_inner_texts())
        for row in table.locator("tbody tr").all()
        if row.locator("th").count()
    }
