"""One bad request: the bytes that are sent, and what can be said of them before there is an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MARK = b"zqxjMARKjxqz"  # planted in what is sent: no answer that refuses may repeat it
HOST = b"localhost"
_HEADS = (b"HEAD ",)

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Case:
    """`family`: B1 to B14, or `loris`. `pieces` go out one after another, `pause_s` apart."""

    family: str
    pieces: tuple[bytes, ...]
    is_abandoned: bool = False  # whoever sends it leaves without waiting for an answer
    pause_s: float = 0.0
    max_s: float = 10.0  # without an answer for longer than this after the last byte, it hangs

    @property
    def is_head(self) -> bool:
        """Whether the answer has a head alone, whatever it says of its body."""
        return self.pieces[0].startswith(_HEADS)


def request(method: bytes, target: bytes, headers: Headers = (), body: bytes | None = None) -> bytes:
    """A request of the usual form, after which the connection ends. `headers` replace those of the same name."""
    own = [(b"host", HOST), (b"connection", b"close")]
    if body is not None:
        own.append((b"content-length", b"%d" % len(body)))
    named = {name.lower() for name, _ in headers}
    lines = [name + b": " + value for name, value in [*(one for one in own if one[0] not in named), *headers]]
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", *lines, b"", b""]) + (body or b"")
