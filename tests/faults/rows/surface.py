"""What a browser is told by the answers of a running service."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import httpx

from tests.deployments.conftest import BASE, import_tiny_model, start_service, stop_service
from tests.faults.row import Measured, row

_PAGES = ("/", "/make", "/jobs", "/login", "/admin", "/admin/top", f"/bots/{BASE}", "/nowhere")
_WANTED = {
    "content-security-policy": re.compile(r"default-src '(self|none)'"),
    "x-frame-options": re.compile("DENY"),
    "x-content-type-options": re.compile("nosniff"),
    "referrer-policy": re.compile("same-origin"),
    "permissions-policy": re.compile(r"camera=\(\)"),
}
_INLINE = re.compile(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=|javascript:", re.IGNORECASE)
_SOURCE = re.compile(r'(?:src|href)="(/static/[^"]+)"')
_SECONDS = 30.0


@row(
    "B11c",
    did="every route of a live service with every method, and its pages, scripts and styles",
    expected="no answer without its 5 guarding headers, no page with anything inline",
    minutes=2,
)
def guarded_answers(folder: Path, share: float) -> Measured:
    import_tiny_model(folder / "data", BASE)
    service = start_service(folder / "data")
    try:
        with httpx.Client(base_url=service.url, headers={"accept": "text/html"}, timeout=_SECONDS) as browser:
            pages = [browser.get(page) for page in _PAGES]
            files = [
                browser.get(name) for name in sorted({name for page in pages for name in _SOURCE.findall(page.text)})
            ]
            routes = browser.get("/openapi.json").json()["paths"]
            asked = [(method, path) for path in sorted(routes) for method in sorted(routes[path])]
            answers = [
                browser.request(method, _filled(path)) for method, path in asked[: round(len(asked) * share) or 1]
            ]
    finally:
        stop_service(service)
    seen = [*pages, *files, *answers]
    bare = Counter(
        f"{reply.request.method} {reply.request.url.path}: {name}"
        for reply in seen
        for name, policy in _WANTED.items()
        if not policy.search(reply.headers.get(name, "")) or "unsafe" in reply.headers[name]
    )
    inline = [page.request.url.path for page in pages if _INLINE.search(page.text)]
    holds = not bare and not inline and len(files) > 3
    figure = f"{len(seen)} answers, {len(pages)} of them pages: {len(bare)} headers missing"
    return Measured(
        f"{figure}, {len(inline)} pages with anything inline", holds, {"missing": sorted(bare), "inline": inline}
    )


def _filled(path: str) -> str:
    """With the base model, or something that is nowhere, in the place of names."""
    with_model = re.sub(r"\{(model|model_id)[^}]*\}", quote(BASE), path)
    return re.sub(r"\{[^}]*\}", "none-0", with_model)
