"""A server that does nothing, as fast as can be: what a load tester is measured against.

    python -m loadtest.client.noop [--port 8999] [--pieces 4] [--gap-ms 0] [--delay-ms 0]

Any POST gets the same completion, whole or as server-sent events, whichever it asks for; any GET a list of one model.
It reads no JSON and knows no model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any, cast

MODEL = "noop/noop"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream": *true')
_TIER = "x-model-tier: device\r\nx-model-load-time: 0\r\nx-request-id: noop\r\n"


class Noop(asyncio.Protocol):
    """One connection; requests on it are answered one after another."""

    def __init__(self, pieces: Sequence[bytes], whole: bytes, gap_s: float, delay_s: float) -> None:
        self._pieces, self._whole = pieces, whole
        self._gap_s, self._delay_s = gap_s, delay_s
        self._models = _reply({"object": "list", "data": [{"id": MODEL, "object": "model"}], "has_more": False})
        self._read = b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not derived from it

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, mark, body = self._read.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not mark or len(body) < (int(length[1]) if length else 0):
            return
        self._read = b""
        if head.startswith(b"GET"):
            self._transport.write(self._models)
        elif self._delay_s:
            self._loop.call_later(self._delay_s, self._answer, bool(_STREAM.search(body)))
        else:
            self._answer(bool(_STREAM.search(body)))

    def _answer(self, is_stream: bool) -> None:
        if not is_stream:
            self._transport.write(self._whole)
        elif self._gap_s:
            self._write_piece(0)
        else:
            for piece in self._pieces:  # a write each, so that each can be a read for the client
                self._transport.write(piece)

    def _write_piece(self, number: int) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(self._pieces[number])
        if number + 1 < len(self._pieces):
            self._loop.call_later(self._gap_s, self._write_piece, number + 1)


async def start(
    port: int = 0, *, num_pieces: int = 4, gap_s: float = 0.0, delay_s: float = 0.0, backlog: int = 4096
) -> tuple[asyncio.Server, str]:
    """The running server and its URL. `gap_s`: between two pieces. `delay_s`: before an answer begins."""
    pieces, whole = _stream(num_pieces), _reply(_completion("and so on" * num_pieces, num_pieces))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Noop(pieces, whole, gap_s, delay_s), "127.0.0.1", port, backlog=backlog)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def _completion(text: str, num_tokens: int, finish: str | None = "length") -> dict[str, Any]:
    completion: dict[str, Any] = {
        "id": "cmpl-noop",
        "object": "text_completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}],
    }
    if num_tokens:
        usage = {"prompt_tokens": 8, "completion_tokens": num_tokens, "total_tokens": 8 + num_tokens}
        completion["usage"] = usage
    return completion


def _stream(num_pieces: int) -> list[bytes]:
    """The answer in chunks: a token each; the usage and the end come with the last."""
    events = [_event(_completion("and so on", 0, None)) for _ in range(num_pieces)]
    events[-1] += _event(_completion("", num_pieces) | {"choices": []}) + b"data: [DONE]\n\n"
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{_TIER}transfer-encoding: chunked\r\n\r\n"
    chunks[0] = head.encode() + chunks[0]
    chunks[-1] += b"0\r\n\r\n"
    return chunks


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _reply(content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{_TIER}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _serve(options: argparse.Namespace) -> None:
    server, url = await start(
        options.port,
        num_pieces=options.pieces,
        gap_s=options.gap_ms / 1000,
        delay_s=options.delay_ms / 1000,
    )
    print(f"ready {url}", flush=True)  # noqa: T201
    await server.serve_forever()


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8999)
    parser.add_argument("--pieces", type=int, default=4, help="events with text in a stream")
    parser.add_argument("--gap-ms", type=float, default=0.0, help="between two of them")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="before the first")
    import uvloop

    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
