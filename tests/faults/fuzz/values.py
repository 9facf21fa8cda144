"""Values that are wrong somewhere: ids, texts, numbers, whole JSON documents. All may carry the mark."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.faults.fuzz.case import MARK

_MARK = MARK.decode()

IDS = (
    *("", ".", "..", "/", "//", "-", "@", "@main", "a@", "a@b@c", "a/b/c", "a--b", "a..b", "x.git", "_/a", "a.", "a-"),
    *("../../../etc/passwd", "..\\..\\windows", "/etc/passwd", "C:\\x", "\\\\host\\share", "~root", "a\\b"),
    *(
        "%2e%2e",
        "%2e%2e%2fetc%2fpasswd",
        "..%2f..%2fetc",
        "%252e%252e%252f",
        "%c0%ae%c0%ae",
        "%00",
        "a%00",
        "%ff",
        "a%",
    ),
    *("a\0b", "a b", "a\tb", "a\r\nx-evil: 1", "a\nb", "\x1b[31ma", "\x7f"),
    *("\u202eabc", "a\u200bb", "\ufeffa", "\u0430da", "\uff41da", "a\u0301" * 50, "\U0001f600", "\u0131", "\u212a"),
    *("CON", "NUL", "aux.txt", "COM1", "LPT1.git", "a:b", "a|b", "a*", "a?", "a<b>", 'a"b', "a;b", "a&b=c", "a#b"),
    *("' OR 1=1--", "${jndi:ldap://127.0.0.1/a}", "{{7*7}}", "<script>alert(1)</script>", "`id`", "$(id)", "%n%s%x"),
    *("http://169.254.169.254/latest", "file:///etc/passwd", "__proto__", "constructor", "null", "None", "NaN"),
)
NUMBERS = (
    *("0", "-0", "-0.0", "-1", "1.5", "1e9", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e-320", "0.0001"),
    *("2147483648", "9223372036854775808", "18446744073709551616", "9" * 400, "-" + "9" * 5000, "0x10", "1_0", "01"),
    *("true", "null", '"1"', "[]", "{}", '""', "[1]", '{"a":1}', "1" + "0" * 4400, "1." + "0" * 4400 + "1"),
)
TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\ud800",
        "\udfff\ud800",
        "\ufffe",
        "\u202e",
        "e" + "\u0301" * 10_000,
        "\U0001f468\u200d" * 50,
    ),
    *("<|endoftext|>", "<|endoftext|>" * 200, "\r\n\r\n", "\x1b[2J\x1b[31m", "a" * 70_000, "\u2028\u2029", "\ufeff"),
    *("<script>alert(1)</script>", "=cmd|' /C calc'!A0", "]]>", "--", "{{7*7}}", "a,b\n@c", '"; drop table', "\\u0000"),
)


def hostile_id(rng: random.Random) -> str:
    """With the mark, now and then; rarely of a megabyte."""
    drawn = rng.random()
    if drawn < 0.02:
        return _MARK + "a" * rng.choice((250, 300, 5_000, 12_000))
    one = rng.choice(IDS)
    return one if drawn < 0.4 else f"{_MARK}{one}" if drawn < 0.7 else f"{one}<{_MARK}>"


def hostile_text(rng: random.Random) -> str:
    one = rng.choice(TEXTS)
    return one if rng.random() < 0.3 else f'{one}"<{_MARK}>'


def hostile_json(rng: random.Random, depth: int = 3) -> str:
    """A JSON value, or nearly one."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 5:
        return json.dumps(hostile_text(rng), ensure_ascii=rng.random() < 0.9).encode("utf-8", "replace").decode()
    parts = [hostile_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return "[" + ",".join(parts) + "]"
    keys = [rng.choice((_MARK, "a", "", "model", "prompt", "\\ud800", "__proto__")) for _ in parts]
    return "{" + ",".join(f'"{key}":{part}' for key, part in zip(keys, parts, strict=True)) + "}"


def whole_json(rng: random.Random) -> bytes:
    """A whole document of which a parser could choke."""
    depth = rng.choice((70, 200, 1_000, 50_000))
    return rng.choice(
        (
            b"",
            b"{",
            b'{"a":',
            b"null",
            b"[" * depth,
            b'{"a":' * depth,
            b"[" * depth + b"]" * depth,
            b'{"model":"' + MARK + b'"' + b',"model":"a"' * 500 + b"}",
            b'{"a":"\xff\xfe' + MARK + b'"}',
            b"\xef\xbb\xbf{}",
            ('{"model":"' + _MARK + '"}').encode("utf-16"),
            b"{" + b",".join(b'"%d%s":0' % (number, MARK) for number in range(5_000)) + b"}",
            b'"' + MARK + b'"' * 3,
            b'{"model": "' + MARK + b"\n" + b'"}',
            b'{"n": ' + b"9" * 100_000 + b"}",
            b'{"n": 1e' + b"9" * 1_000 + b"}",
            b"{'model': '" + MARK + b"'}",
            b'{"model": "a"} {"model": "' + MARK + b'"}',
            b"/*" + MARK + b"*/{}",
            rng.randbytes(rng.randrange(1, 200)) + MARK,
        )
    )


def with_field(good: Any, name: str, value: str) -> str:
    """JSON of `good` with the field `name`, dotted, set to `value`, which is JSON already."""
    first, _, rest = name.partition(".")
    shown = {key: json.dumps(old) for key, old in (good or {}).items()}
    inner = (good or {}).get(first)
    shown[first] = with_field(inner if isinstance(inner, dict) else {}, rest, value) if rest else value
    return "{" + ",".join(f"{json.dumps(key)}:{one}" for key, one in shown.items()) + "}"
