"""The page in a real browser, as people use it: `make page-check`.

    python -m tests.web.check [--screenshots FOLDER] [--only WORDS]

Real services, the machine's own Chromium, real archives. Every request, every complaint of the browser and every
violation that axe finds is counted; what is done goes to stderr. Ends with one JSON line, and status 0 if all is well,
1 if not, 2 without a Chromium.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import Browser

from tests.web.browser import Findings, Watch, find_chromium, open_browser
from tests.web.flows import finding, making, playing, strangers
from tests.web.flows.world import Flow, World
from tests.web.service import Site, open_site

FIRST_PAINT_KB = 100.0  # the limit
KEY = "key-of-the-check"
_MOST_SAID = 600  # characters of an error; Playwright's tell the whole page
# Two of the small base model's size: the third that speaks sends one away.
MEMORY_BYTES = 32_000_000

OPEN_FLOWS: Sequence[Flow] = (
    finding.many_bots_are_paged_through_and_one_is_found,
    finding.a_page_that_is_not_there_says_so_and_leads_on,
    finding.the_operator_sees_what_is_in_memory_and_what_had_to_leave,
    finding.a_form_of_another_site_is_refused,
    making.a_wrong_file_is_refused_in_a_sentence_and_the_form_stays,
    making.an_archive_is_dropped_and_ends_in_a_shared_picture,
    making.the_same_three_steps_on_a_phone,
    making.two_people_become_a_cyborg,
    making.three_archives_are_dropped_at_once_and_wait_for_who_comes_back,
    making.the_page_of_a_job_asks_less_often_while_nobody_answers_and_stops_when_it_is_gone,
    making.a_job_is_paused_goes_on_and_is_cancelled_from_its_page,
    playing.a_text_is_written_by_keyboard_alone,
    playing.without_scripts_a_bot_is_made_used_rolled_back_and_deleted,
    playing.an_older_version_answers_again,
    playing.all_of_a_bot_is_deleted,
    strangers.nothing_of_what_an_archive_says_is_taken_for_markup,
)
KEY_FLOWS: Sequence[Flow] = (strangers.who_has_no_key_reads_and_plays_but_decides_nothing,)


class Check:
    """Runs flows and keeps the score."""

    def __init__(self, browser: Browser, findings: Findings, only: str) -> None:
        self._browser = browser
        self._findings = findings
        self._only = only
        self.passed: list[str] = []
        self.failed: list[str] = []

    def run(self, flows: Sequence[Flow], site: Site, folder: Path) -> None:
        """Each flow in a folder of its own."""
        watch = Watch(self._browser, site.url, self._findings)
        for flow in flows:
            name = flow.__name__.replace("_", " ")
            if _is_wanted(flow, self._only):
                scratch = Path(tempfile.mkdtemp(dir=folder))
                self._run_one(name, flow, World(site, watch, scratch))

    def _run_one(self, name: str, flow: Flow, world: World) -> None:
        started = time.monotonic()
        wrong: list[str] = []
        try:
            flow(world)
        except Exception as exc:
            steps = [step for step in traceback.extract_tb(exc.__traceback__) if "/tests/web/" in step.filename]
            wrong += [f"{Path(step.filename).name}:{step.lineno} {step.line}" for step in steps[1:]]
            wrong.append(f"{type(exc).__name__}: {str(exc)[:_MOST_SAID]}")
        wrong += self._findings.take_complaints()
        (self.failed if wrong else self.passed).append(name)
        say(f"{'FAILED' if wrong else 'passed'} {name} ({time.monotonic() - started:.0f} s)")
        for line in wrong:
            say(f"    {line}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check(browser: Browser, findings: Findings, only: str) -> Check:
    """All flows: on a service that is open to everybody, then on one with a key."""
    score = Check(browser, findings, only)
    with tempfile.TemporaryDirectory(prefix="rookery-page-") as name:
        folder = Path(name)
        if any(_is_wanted(flow, only) for flow in OPEN_FLOWS):
            finding.import_copies(folder / "open")
            with open_site(folder / "open", ROOKERY_MEMORY_BYTES=str(MEMORY_BYTES)) as site:
                score.run(OPEN_FLOWS, site, folder)
        if any(_is_wanted(flow, only) for flow in KEY_FLOWS):
            finding.import_copies(folder / "locked")
            with open_site(folder / "locked", ROOKERY_API_KEYS=KEY) as site:
                score.run(KEY_FLOWS, site, folder)
    return score


def _is_wanted(flow: Flow, only: str) -> bool:
    return any(words in flow.__name__.replace("_", " ") for words in only.split(","))


def _report(findings: Findings) -> None:
    for name, weight in sorted(findings.weights.items(), key=lambda item: -item[1]):
        say(f"{weight:6.1f} kB {name}")
    for title, found in (("violation", findings.violations), ("best practice", findings.advice)):
        for (rule, selector), where in found.items():
            say(f"{title} {rule} at {selector}\n    {where}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshots", type=Path, help="where pictures are kept; else in a temporary folder")
    parser.add_argument("--only", default="", help="flows with one of these in their name; commas between")
    arguments = parser.parse_args()
    if (chromium := find_chromium()) is None:
        say("No Chromium was found on the PATH or in $CHROMIUM; install one with: apt-get install chromium")
        sys.exit(2)
    folder = arguments.screenshots or Path(tempfile.mkdtemp(prefix="rookery-page-screenshots-"))
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through all that cleans up
    findings = Findings(folder)
    with open_browser(chromium) as browser:
        score = check(browser, findings, arguments.only)
    _report(findings)
    heaviest = max(findings.weights.values(), default=0.0)
    figures = {
        "flows_passed": len(score.passed),
        "flows_failed": len(score.failed),
        "axe_violations": len(findings.violations),
        "first_paint_kb": round(heaviest, 1),
        "external_requests": len(findings.foreign),
        "screenshots": str(folder),
        "failed": score.failed,
        "axe_best_practice": len(findings.advice),
        "pages_looked_at": findings.num_looks,
    }
    print(json.dumps(figures))
    is_well = not (score.failed or findings.violations or findings.foreign) and 0 < heaviest <= FIRST_PAINT_KB
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
