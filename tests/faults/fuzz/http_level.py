"""What is wrong below the requests: framing, lines, ranges, connections that end early or never (B14)."""

from __future__ import annotations

import random

from tests.faults.fuzz.case import HOST, MARK, Case, Headers, request
from tests.faults.fuzz.requests import JSON, target_of
from tests.faults.fuzz.surface import MODEL, Route, Surface

LORIS_S = 40.0  # the head of a request may take 10 s in HAProxy, and a body 30 s


def b14_http(rng: random.Random, surface: Surface) -> Case:
    """Broken or abused HTTP on any route."""
    route = rng.choice(surface.routes)
    return rng.choice((_smuggled, _chunked, _lines, _lines, _pipelined, _ranges, _cut, _cut, _methods))(rng, route)


def loris(rng: random.Random, surface: Surface) -> Case:
    """A request that comes a few bytes at a time and stops: it must be ended from the other side."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\n" % HOST
    whole = rng.choice((b"GET / HT", head + b"x-a: b\r\n", head + b'content-length: 5000\r\n\r\n{"model":'))
    step = max(1, len(whole) // 5)
    pieces = tuple(whole[start : start + step] for start in range(0, len(whole), step))
    return Case("loris", pieces, pause_s=0.5, max_s=LORIS_S)


def _smuggled(rng: random.Random, route: Route) -> Case:
    inner = b"GET /zz%s HTTP/1.1\r\nhost: %s\r\n\r\n" % (MARK, HOST)
    body = b"0\r\n\r\n" + inner
    te = rng.choice(
        (
            b"Transfer-Encoding: chunked",
            b"Transfer-Encoding : chunked",
            b"Transfer-Encoding: xchunked",
            b"Transfer-Encoding: chunked, identity",
            b"Transfer-Encoding:\tchunked",
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: " + MARK,
            b" Transfer-Encoding: chunked",
            b"X: a\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: \x0bchunked",
        )
    )
    lengths = rng.choice((b"%d" % len(body), b"5", b"+5", b"5, 6", b"-1", b"0x5", b"5 5", b"9" * 30, b"", MARK))
    length = b"Content-Length: " + lengths
    if rng.random() < 0.3:
        length += b"\r\nContent-Length: " + rng.choice((lengths, b"4"))
    lines = [te, length] if rng.random() < 0.5 else [length, te] if rng.random() < 0.5 else [length]
    start = b"%s %s HTTP/1.1\r\nHost: %s\r\n" % (_method(route), target_of(route, rng), HOST)
    return Case("B14", (start + b"\r\n".join(lines) + b"\r\n\r\n" + body,), is_abandoned=lines == [length])


def _chunked(rng: random.Random, route: Route) -> Case:
    body = rng.choice(
        (
            b"zz\r\n" + MARK,
            b"-1\r\na\r\n0\r\n\r\n",
            b"ffffffffffffffffff\r\na",
            b"5;" + MARK * 500 + b"\r\nhello\r\n0\r\n\r\n",
            b"5\r\nhelloXX0\r\n\r\n",
            b"5\nhello\n0\n\n",
            b"0\r\n" + b"x-trailer: %s\r\n" % MARK * 1_000 + b"\r\n",
            b"2\r\n{}\r\n0\r\n\r\n",
            b"1\r\n{\r\n" * 500 + b"0\r\n\r\n",
            b"0x2\r\n{}\r\n0\r\n\r\n",
        )
    )
    headers: Headers = [JSON, (b"transfer-encoding", b"chunked")]
    raw = request(_method(route), target_of(route, rng), headers) + body
    return Case("B14", (raw,), is_abandoned=not body.endswith(b"\r\n\r\n"))


def _lines(rng: random.Random, route: Route) -> Case:
    target, host = target_of(route, rng), b"host: " + HOST
    raw = rng.choice(
        (
            b"GET " + target + b"\r\n\r\n",
            b"GET " + target + b" HTTP/0.9\r\n\r\n",
            b"GET " + target + b" HTTP/2.0\r\n" + host + b"\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\r\n" + host + b"\r\n" + host + b"\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\r\nhost: " + MARK + b"\r\nconnection: close\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\r\nhost: " + rng.choice((b"[::1", b"a:b:c", b"", b"\xff")) + b"\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\n" + host + b"\n\n",
            b"GET\t" + target + b"\tHTTP/1.1\r\n" + host + b"\r\n\r\n",
            b"GET  " + target + b"  HTTP/1.1\r\n" + host + b"\r\n\r\n",
            b"GET http://127.0.0.1:1" + target + b" HTTP/1.1\r\n" + host + b"\r\nconnection: close\r\n\r\n",
            b"GET //evil.example" + target + b" HTTP/1.1\r\n" + host + b"\r\nconnection: close\r\n\r\n",
            b"GET " + target + b"#" + MARK + b" HTTP/1.1\r\n" + host + b"\r\nconnection: close\r\n\r\n",
            b"GET " + target + b"\x00" + MARK + b" HTTP/1.1\r\n" + host + b"\r\n\r\n",
            b"GET " + target + b"\xff" + MARK + b" HTTP/1.1\r\n" + host + b"\r\nconnection: close\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\r\n" + host + b"\r\n" + MARK + b"\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\r\n" + host + b"\r\nx: a\r\n b\r\nconnection: close\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\r\n" + host + b"\r\nx\x00y: " + MARK + b"\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\r\n" + host + b"\r\n: " + MARK + b"\r\n\r\n",
            b"GET " + target + b" HTTP/1.1\r\n" + host + b"\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
            b"\r\n\r\n\r\nGET " + target + b" HTTP/1.1\r\n" + host + b"\r\nconnection: close\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
            b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + host + b"\r\n\r\n",
            rng.randbytes(300) + b"\r\n\r\n",
        )
    )
    return Case("B14", (raw,), is_abandoned=True)


def _pipelined(rng: random.Random, route: Route) -> Case:
    """Many at once on one connection, the last of which ends it."""
    one = request(b"GET", target_of(route, rng), [(b"connection", b"keep-alive")])
    last = request(b"GET", b"/" + MARK)
    return Case("B14", (one * rng.choice((2, 20)) + last,))


def _ranges(rng: random.Random, route: Route) -> Case:
    many = b",".join(b"%d-%d" % (number, number) for number in range(rng.choice((100, 1_500))))
    value = rng.choice(
        (
            b"bytes=" + many,
            b"bytes=-",
            b"bytes=9-1",
            b"bytes=" + b"9" * 400 + b"-",
            b"bytes=0-0," * 500,
            MARK,
            b"bytes=-0",
        )
    )
    path = rng.choice((f"/{MODEL}/resolve/main/config.json".encode(), target_of(route, rng)))
    return Case("B14", (request(b"GET", path, [(b"range", value), (b"if-range", rng.choice((b'""', MARK)))]),))


def _cut(rng: random.Random, route: Route) -> Case:
    """Part of a request, after which nothing comes; whoever sent it leaves."""
    raw = request(_method(route), target_of(route, rng), [JSON], b'{"model": "%s", "prompt": "a"}' % MODEL.encode())
    return Case("B14", (raw[: rng.randrange(1, len(raw))],), is_abandoned=True)


def _methods(rng: random.Random, route: Route) -> Case:
    method = rng.choice(
        (b"OPTIONS", b"TRACE", b"PATCH", b"PUT", b"PROPFIND", b"get", MARK, b"A" * 300, b"HEAD", b"QUERY")
    )
    return Case("B14", (request(method, target_of(route, rng)),))


def _method(route: Route) -> bytes:
    """Never one that removes: what is left of a broken request may be understood."""
    return b"GET" if route.changes else route.method.encode()
