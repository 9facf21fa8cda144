"""Finding bots, what is in memory, and strangers at the door: flows that need nothing trained."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import expect

from serve.store.opening import EMBEDDED
from serve.store.revisions import Store
from tests.web.flows.world import World, button
from tests.web.service import BASE

NUM_COPIES = 30
PAGE_SIZE = 24


def import_copies(data: Path) -> None:
    """A gallery of more than one page, before the service starts."""
    store = Store(data, embedded={})
    for number in range(NUM_COPIES):
        store.import_folder(EMBEDDED[BASE], f"copies/bird-{number:02}")


def many_bots_are_paged_through_and_one_is_found(world: World) -> None:
    with world.watch.window() as page:
        page.goto("/")
        cards = page.locator(".gallery > li")
        expect(cards).to_have_count(PAGE_SIZE)
        world.watch.look(page, "home")
        first = set(page.locator(".gallery a.name").all_inner_texts())
        page.get_by_role("link", name="Older bots").click()
        expect(page.get_by_role("heading", name="Older bots")).to_be_visible()
        second = set(page.locator(".gallery a.name").all_inner_texts())
        assert second and not first & second, "the second page repeats the first"
        world.watch.look(page, "home-older")
        page.get_by_role("searchbox").fill("bird-07")
        page.keyboard.press("Enter")
        expect(cards).to_have_count(1)
        expect(cards).to_contain_text("bird-07")
        world.watch.look(page, "home-search")
        page.get_by_role("searchbox").fill("<b>no such bot</b>")
        button(page, "Find").click()
        expect(page.get_by_text("No bot here has that in its name")).to_be_visible()
        expect(page.get_by_role("heading", name="<b>no such bot</b>")).to_be_visible()
        world.watch.look(page, "home-nothing-found")


def a_page_that_is_not_there_says_so_and_leads_on(world: World) -> None:
    with world.watch.window() as page:
        for address in ("/bots/nobody/nothing-at-all", "/jobs/ftjob-nothing", "/no/such/page/here"):
            reply = page.goto(address)
            assert reply is not None and reply.status == 404, address
            expect(page.get_by_role("heading", level=1)).to_contain_text(re.compile("not here", re.IGNORECASE))
            expect(page.get_by_role("main").get_by_role("link", name="All bots")).to_be_visible()
        world.watch.look(page, "not-found")


def the_operator_sees_what_is_in_memory_and_what_had_to_leave(world: World) -> None:
    for number in range(4):
        world.site.write(f"copies/bird-{number:02}")
    with world.watch.window() as page:
        page.goto("/admin")
        residents, evictions = page.locator("#resident-rows"), page.locator("#eviction-rows")
        expect(residents).to_contain_text(re.compile(f"{BASE}|copies/bird-0"))  # who stays is the policy's affair
        expect(evictions).to_contain_text("copies/bird-0")
        expect(evictions).to_contain_text("budget")
        world.watch.look(page, "operator")
        world.site.write("copies/bird-09")
        link = page.locator("#resident-rows, #eviction-rows").get_by_role("link", name="copies/bird-09").first
        expect(link).to_be_visible()  # without reloading
        link.click()
        expect(page).to_have_url(re.compile("/bots/copies/bird-09$"))
        page.goto("/admin")
        for name in ("/metrics", "/v1/replicas", "/v1/status"):
            reply = page.request.get(page.get_by_role("link", name=name).get_attribute("href") or "")
            assert reply.ok, f"{name}: {reply.status}"


_PLOT = """<!doctype html><html lang="en"><title>Elsewhere</title><form method="post" action="{}">
<input name="do" value="delete"><input name="confirm" value="{}"><button>A prize</button></form>"""


def a_form_of_another_site_is_refused(world: World) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            target = f"{world.site.url}/bots/copies/bird-20"
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(_PLOT.format(target, "copies/bird-20").encode())

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        for host in ("127.0.0.1", "localhost"):  # another port of the same site, and another site
            elsewhere = f"http://{host}:{server.server_port}"
            with world.watch.window(also=[elsewhere]) as page:
                page.goto(elsewhere)
                with page.expect_navigation() as moved:
                    page.get_by_role("button").click()
                assert moved.value is not None and moved.value.status == 403, moved.value
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    world.site.ask("GET", "/v1/models/copies/bird-20")  # is still there
