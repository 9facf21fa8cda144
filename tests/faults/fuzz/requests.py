"""Requests with something wrong in what they say: ids, JSON, parameters, prompts, names, keys (B1 to B6, B11, B13)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from urllib.parse import quote

from tests.faults.fuzz.case import MARK, Case, Headers, request
from tests.faults.fuzz.surface import GOOD, Route, Surface
from tests.faults.fuzz.values import NUMBERS, hostile_id, hostile_json, hostile_text, whole_json, with_field

JSON = (b"content-type", b"application/json")
BOUNDARY = b"fuzzboundary"
MULTIPART = (b"content-type", b"multipart/form-data; boundary=" + BOUNDARY)
_URLENCODED = (b"content-type", b"application/x-www-form-urlencoded")
_BROWSER = (b"accept", b"text/html,application/xhtml+xml")
_MEGABYTE = 1 << 20


def b1_ids(rng: random.Random, surface: Surface) -> Case:
    """An id that no model has, wherever an id can stand."""
    value = hostile_id(rng)
    place = rng.choice(("path", "path", "query", "body", "header", "form", "suffix"))
    if place == "path":
        route = rng.choice([one for one in surface.routes if "{" in one.path])
        return _case("B1", _send(route, _fill(route, rng, value), rng))
    if place == "query":
        route = rng.choice([one for one in surface.routes if one.query])
        target = _fill(route, rng) + f"?{rng.choice(route.query)}={_quoted(value, rng)}"
        return _case("B1", _send(route, target, rng))
    if place == "header":
        names = (b"serve_multiplexed_model_id", b"x-model-id", b"x-request-id", b"idempotency-key", b"cookie")
        raw = _as_header(value)
        return _case("B1", _send(rng.choice(surface.json), None, rng, headers=[(rng.choice(names), raw)]))
    if place == "form":
        field = rng.choice(("base_model", "handle", "suffix", "filename"))
        return _case("B1", _upload(rng.choice(surface.forms), rng, {field: value.encode("utf-8", "replace")}))
    if place == "suffix":
        route = next(one for one in surface.json if one.path == "/v1/fine_tuning/jobs")
        return _case("B1", _send_field(route, rng.choice(("suffix", "model", "handle", "training_file")), value, rng))
    if rng.random() < 0.02:
        value = MARK.decode() + "a" * _MEGABYTE
    field = rng.choice(("model", "parameters.adapter_id", "revision"))
    return _case("B1", _send_field(rng.choice(surface.json), field, value, rng))


def b2_json(rng: random.Random, surface: Surface) -> Case:
    """JSON that is none, or that says strange things."""
    route = rng.choice(surface.json)
    if rng.random() < 0.5:
        body = whole_json(rng)
    else:
        text = with_field(_good(route), rng.choice([*route.fields, MARK.decode()]), hostile_json(rng))
        body = text.encode("utf-8", "replace")
    return _case("B2", _send(route, None, rng, headers=[JSON], body=body))


def b3_sizes(rng: random.Random, surface: Surface) -> Case:
    """More of something than is taken."""
    route = rng.choice(surface.routes)
    kind = rng.randrange(7)
    if kind == 0:  # all headers together
        return _case("B3", _send(route, None, rng, headers=[(b"x-long", MARK + b"a" * rng.choice((15_000, 17_000)))]))
    if kind == 1:
        many = [(b"x-%d" % number, MARK) for number in range(rng.choice((90, 130, 600)))]
        return _case("B3", _send(route, None, rng, headers=many))
    if kind == 2:
        target = _fill(route, rng) + "?q=" + MARK.decode() + "a" * rng.choice((8_000, 9_000, 15_000, 20_000))
        return _case("B3", _send(route, target, rng))
    if kind == 3:
        target = _fill(route, rng) + "?" + "&".join(f"a{number}=1" for number in range(rng.choice((100, 1_500))))
        return _case("B3", _send(route, target, rng))
    if kind == 4:  # announced, and never sent
        large = rng.choice((*surface.json, *surface.forms))
        length = b"%d" % rng.choice((10**12, 10**30) if large in surface.forms else (2 * _MEGABYTE, 10**30))
        return _case("B3", _send(large, None, rng, headers=[_type_of(large), (b"content-length", length)], body=b""))
    upload = rng.choice(surface.forms)
    if kind == 5:
        parts = {f"part{number}": MARK for number in range(rng.choice((20, 70, 300)))}
        return _case("B3", _upload(upload, rng, parts))
    return _case("B3", _upload(upload, rng, {"handle": MARK + b"a" * 70_000}))


def b4_types(rng: random.Random, surface: Surface) -> Case:
    """Another kind of body than the route takes, or one in a coding."""
    route = rng.choice((*surface.json, *surface.forms))
    types = (
        *(b"", b"text/plain", b"application/json; charset=utf-16", b"application/json; charset=" + MARK, MARK),
        *(b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=" + b"x" * 300),
        *(b"multipart/form-data; boundary=a; boundary=b", b"application/xml", b"application/json, text/plain"),
        *(b"application/x-www-form-urlencoded", b"multipart/mixed; boundary=a", b"application/" + b"json" * 500),
    )
    bodies = (b"{}", b"--a\r\n\r\n--a--\r\n", b"a=b&c=" + MARK, b"<?xml version='1.0'?><a>" + MARK + b"</a>", b"")
    headers: list[tuple[bytes, bytes]] = [(b"content-type", rng.choice(types))]
    if rng.random() < 0.3:
        headers = [_type_of(route), (b"content-encoding", rng.choice((b"gzip", b"br", b"deflate, gzip", MARK)))]
    if rng.random() < 0.3:
        headers.append((b"expect", rng.choice((b"100-continue", MARK))))
    if rng.random() < 0.3:
        headers.append((b"accept", rng.choice((b"text/html", b"image/png", b"*/*;q=0", MARK, b"a" * 5_000))))
    if rng.random() < 0.3:
        names = (
            b"x-http-method-override",
            b"x-method-override",
            b"x-original-url",
            b"x-rewrite-url",
            b"x-forwarded-host",
        )
        headers.append((rng.choice(names), rng.choice((b"DELETE", b"/admin/" + MARK))))
    return _case("B4", _send(route, None, rng, headers=headers, body=rng.choice(bodies)))


def b5_parameters(rng: random.Random, surface: Surface) -> Case:
    """One parameter of a text out of its range, or of another type; whatever is accepted writes little."""
    route = rng.choice(surface.writing)
    names = [
        name for name in route.fields if name.rpartition(".")[2] not in ("prompt", "inputs", "model", "adapter_id")
    ]
    name = rng.choice(names)
    strange = (
        "[]",
        '["a","b","c","d","e"]',
        '[""]',
        f'"{MARK.decode()}"',
        f'{{"{MARK.decode()}":1}}',
        '{"999999":101}',
    )
    text = with_field(_good(route), name, rng.choice((*NUMBERS, *strange)))
    return _case("B5", _send(route, None, rng, headers=[JSON], body=text.encode()))


def b6_prompts(rng: random.Random, surface: Surface) -> Case:
    """A prompt that no model can go on from, or that a tokenizer chokes on."""
    route = rng.choice(surface.writing)
    field = "prompt" if "prompt" in route.fields else "inputs"
    many = rng.choice((65, 10_000))
    value = rng.choice(
        (
            json.dumps(hostile_text(rng)),
            json.dumps(hostile_text(rng)),
            f'"{MARK.decode()}{"a" * rng.choice((5_000, 300_000, _MEGABYTE))}"',
            json.dumps([MARK.decode()] * many),
            json.dumps([rng.choice((-1, 50_257, 10**9, 2**63, 2**64, 10**30))] * rng.choice((1, 3))),
            json.dumps([[50_256], [rng.randrange(40_000, 60_000)]]),
            json.dumps([1] * rng.choice((1_025, 5_000, 100_000))),
            rng.choice(
                ("[]", "[[]]", "[null]", '["a", 1]', "[1, [2]]", "{}", "true", "1e999", '"\\ud800"', '["\\udfff"]')
            ),
        )
    )
    return _case("B6", _send(route, None, rng, headers=[JSON], body=with_field(_good(route), field, value).encode()))


def b10_urls(rng: random.Random, surface: Surface, url: str) -> Case:
    """An address that somebody might fetch, in any place."""
    place = rng.choice(("path", "query", "json", "form", "header", "line"))
    if place == "path":
        route = rng.choice([one for one in surface.routes if "{" in one.path])
        return _case("B10", _send(route, _fill(route, rng, url), rng))
    if place == "query":
        route = rng.choice([one for one in surface.routes if one.query])
        return _case("B10", _send(route, _fill(route, rng) + f"?{rng.choice(route.query)}={quote(url)}", rng))
    if place == "json":
        route = rng.choice(surface.json)
        return _case("B10", _send_field(route, rng.choice((*route.fields, "url", "avatar", "webhook")), url, rng))
    if place == "form":
        route = rng.choice(surface.forms)
        field = rng.choice((*route.fields, "url", "avatar"))
        return _case("B10", _upload(route, rng, {field: url.encode()}))
    if place == "line":
        raw = request(b"GET", url.encode().replace(b" ", b""))
        return _case("B10", raw)
    names = (b"referer", b"origin", b"x-forwarded-host", b"forwarded", b"x-original-url", b"link", b"x-forwarded-for")
    return _case("B10", _send(rng.choice(surface.routes), None, rng, headers=[(rng.choice(names), url.encode())]))


def b11_names(rng: random.Random, surface: Surface) -> Case:
    """Names that would break out of a page, a header, a table or a card."""
    value = hostile_text(rng).encode("utf-8", "replace")[:60_000]
    field = rng.choice(("handle", "suffix", "filename", "metadata[a]", "name", "validation", "integrations"))
    headers = [_BROWSER] if rng.random() < 0.5 else []
    return _case("B11", _upload(rng.choice(surface.forms), rng, {field: value}, headers))


def b13_keys(rng: random.Random, surface: Surface) -> Case:
    """Keys in every form but the right one."""
    schemes = (b"Bearer", b"bearer", b"Basic", b"Digest", b"Bearer Bearer", b"", MARK, b"Bearer\t")
    keys = (MARK, b"", b"sk-" + MARK, b"a" * 10_000, b"\xff\xfe" + MARK, b"a b " + MARK, b"Og==", b"," + MARK, b"\x7f")
    value = rng.choice(schemes) + rng.choice((b" ", b"  ", b"")) + rng.choice(keys)
    headers = [(b"authorization", value)]
    if rng.random() < 0.3:
        headers = [(b"cookie", b"rookery_key=" + rng.choice((MARK, b"%ff", b"%00", b'"' + MARK, b"a" * 4_000)))]
    if rng.random() < 0.2:
        headers.append((b"authorization", b"Bearer " + MARK))
    route = rng.choice(surface.routes)
    target = _fill(route, rng) + (f"?api_key={MARK.decode()}" if rng.random() < 0.1 else "")
    return _case("B13", _send(route, target, rng, headers=headers))


# --- Writing them -------------------------------------------------------------------------------------------


def _case(family: str, raw: bytes) -> Case:
    return Case(family, (raw,))


def target_of(route: Route, rng: random.Random) -> bytes:
    """Where it is asked: the path with ids of its own, of nothing that could be lost."""
    return _fill(route, rng).encode()


def _fill(route: Route, rng: random.Random, value: str | None = None) -> str:
    """The path with its places filled; one of them with `value`, percent-encoded or not."""
    places = {
        "model": route.model,
        "file_id": "file-0",
        "job_id": "ftjob-0",
        "number": "1",
        "digest": "0",
        "word": "refs",
    }
    path = route.path
    names = [part.split("}")[0] for part in path.split("{")[1:]]
    chosen = rng.choice(names) if value is not None else None
    for name in names:
        filled = places.get(name, rng.choice(("main/config.json", "main", "app.css")))
        path = path.replace(f"{{{name}}}", _quoted(value or "", rng) if name == chosen else filled, 1)
    return path


def _quoted(value: str, rng: random.Random) -> str:
    """As a client would, or as it stands, but for what would end the line; that is for B14."""
    if rng.random() < 0.5 and value.isascii() and value.isprintable() and " " not in value:
        return value
    return quote(value.encode("utf-8", "surrogatepass"), safe=rng.choice(("", "/")))


def _as_header(value: str) -> bytes:
    return bytes(byte for byte in value.encode("utf-8", "replace") if byte >= 32)


def _good(route: Route) -> dict[str, object]:
    return {**GOOD.get(route.path, {}), **({"model": route.model} if "model" in GOOD.get(route.path, {}) else {})}


def _type_of(route: Route) -> tuple[bytes, bytes]:
    if route.media_type == "multipart/form-data":
        return MULTIPART
    return (b"content-type", route.media_type.encode() or b"application/json")


def _send(
    route: Route,
    target: str | None,
    rng: random.Random,
    *,
    headers: Iterable[tuple[bytes, bytes]] = (),
    body: bytes | None = None,
) -> bytes:
    """A request to the route whose body, unless it is given, is one that it takes."""
    wanted: Headers = list(headers)
    if body is None and route.media_type == "application/json":
        body = json.dumps(_good(route)).encode()
    elif body is None and route.media_type == "application/x-www-form-urlencoded":
        body = f"{rng.choice(route.fields)}={MARK.decode()}".encode()
    elif body is None and route.media_type:
        body = _form({}, rng)
    if body is not None and not any(name == b"content-type" for name, _ in wanted):
        wanted = [*wanted, _type_of(route)]
    if rng.random() < 0.1:
        wanted = [*wanted, _BROWSER]
    return request(route.method.encode(), (target or _fill(route, rng)).encode(), wanted, body)


def _send_field(route: Route, name: str, value: str, rng: random.Random) -> bytes:
    text = with_field(_good(route), name, json.dumps(value))
    return _send(route, None, rng, headers=[JSON], body=text.encode())


def _upload(
    route: Route, rng: random.Random, fields: dict[str, bytes], headers: Iterable[tuple[bytes, bytes]] = ()
) -> bytes:
    return _send(route, None, rng, headers=[*headers, MULTIPART], body=_form(fields, rng))


def _form(fields: dict[str, bytes], rng: random.Random) -> bytes:
    """The fields, and a file that is no archive; the field `filename` is its name."""
    filename = fields.pop("filename", b"tweets.csv")
    parts = [b'name="%s"\r\n\r\n%s' % (name.encode(), value) for name, value in fields.items()]
    name = rng.choice((b"archive", b"file", b"archive[]", MARK))
    parts.append(
        b'name="%s"; filename="%s"\r\n\r\n%s' % (name, filename, rng.choice((b"", MARK, b"PK\x03\x04" + MARK)))
    )
    start = b"--" + BOUNDARY + b"\r\ncontent-disposition: form-data; "
    end = b"\r\n--" + BOUNDARY + rng.choice((b"--\r\n", b"--\r\n", b"--\r\n", b"\r\n", b""))
    return b"\r\n".join(start + part for part in parts) + end
