"""What is wrong with an answer: the rules that every refusal keeps, whatever was asked.

A refusal is JSON in our shape of at most 4 KB, or the page of a browser, and repeats nothing of what was sent, with
these exceptions: the request's own id (`x-request-id`), the id of a thing or the name of an archive if it is well
formed, in quotes and cut short, and on a page the text of a form that is shown again, escaped.
"""

from __future__ import annotations

import gzip
import json
import re

from tests.faults.fuzz.answers import Answer
from tests.faults.fuzz.case import MARK, Case

MAX_BYTES = 4096
MAX_PAGE_BYTES = 16 << 10  # a form that is shown again
_PART = rb"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_QUOTED_ID = re.compile(rb"'" + _PART + rb"(?:/" + _PART + rb")?(?:@" + _PART + rb")?'")
_QUOTED_NAME = re.compile(rb"'[A-Za-z0-9 ._()-]{1,80}'")  # of a file in an error about it
_NAMES_THINGS = (403, 404, 409, 410)  # statuses of refusals about a thing that the caller has named
# HAProxy's own words about what is no HTTP: there is no request that could be answered as a gateway does.
_NO_HTTP = re.compile(rb"<html><body><h1>4[0-9][0-9] [A-Z][A-Za-z -]+</h1>")
_OF_HTTP = ("B14", "loris")  # families of which the server under a gateway says the same in plain text


def faults_of(case: Case, answer: Answer) -> list[str]:
    """Names of what is wrong with it: `status_5xx`, `cut`, `echo`, `large`, `misshapen`."""
    found = []
    if not (answer.is_whole or case.is_abandoned):
        return ["cut"]
    if answer.status >= 500:
        found.append("status_5xx")
    if answer.status < 400:
        return found
    body = _plain(answer)
    is_page = answer.header(b"content-type").startswith(b"text/html") and not _NO_HTTP.match(body)
    if len(body) > (MAX_PAGE_BYTES if is_page else MAX_BYTES):
        found.append("large")
    if _repeats(answer, body, is_page):
        found.append("echo")
    has_shape = is_page or _has_our_shape(body) or _NO_HTTP.match(body)
    if not (has_shape or case.is_head or case.family in _OF_HTTP):
        found.append("misshapen")
    return found


def _plain(answer: Answer) -> bytes:
    return gzip.decompress(answer.body) if answer.header(b"content-encoding") == b"gzip" else answer.body


def _repeats(answer: Answer, body: bytes, is_page: bool) -> bool:
    heads = b"\n".join(value for name, value in answer.headers if name != b"x-request-id")
    if is_page:
        return b"<" + MARK in body or MARK in heads
    if answer.status in _NAMES_THINGS:
        body, heads = _QUOTED_ID.sub(b"", body), _QUOTED_ID.sub(b"", heads)
    if b'"code":"bad_upload"' in body:
        body = _QUOTED_NAME.sub(b"", body)
    return MARK in body or MARK in heads


def _has_our_shape(body: bytes) -> bool:
    try:
        error = json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):
        return False
    return isinstance(error["message"] if isinstance(error, dict) else error, str)
