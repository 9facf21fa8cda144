"""A server on a local port that does byte for byte what a test says, connection by connection."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    target: str
    headers: dict[str, str]  # names in lower case


Act = Callable[[socket.socket, Request], None]


@dataclass
class Server:
    """Answers the i-th request with the i-th act, and all further ones with the last."""

    url: str
    acts: list[Act]
    over: threading.Event = field(default_factory=threading.Event)  # set when the test is over
    requests: list[Request] = field(default_factory=list)


@contextmanager
def scripted(*acts: Act, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A server until the block ends; acts that wait should wait for its `over`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}", list(acts))
        threads = [threading.Thread(target=_accept, args=(listener, server, tls))]
        threads[0].start()
        try:
            yield server
        finally:
            server.over.set()
            listener.shutdown(socket.SHUT_RDWR)
            threads[0].join()


def _accept(listener: socket.socket, server: Server, tls: ssl.SSLContext | None) -> None:
    threads: list[threading.Thread] = []
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threads.append(threading.Thread(target=_serve, args=(connection, server, tls)))
            threads[-1].start()
    for thread in threads:
        thread.join()


def _serve(plain: socket.socket, server: Server, tls: ssl.SSLContext | None) -> None:
    with plain, contextlib.suppress(OSError), tls.wrap_socket(plain, server_side=True) if tls else plain as connection:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (more := connection.recv(65536)):
                return
            head += more
        first, *lines = head.decode().split("\r\n\r\n")[0].split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        request = Request(first.split()[1], headers)
        server.requests.append(request)
        server.acts[min(len(server.requests), len(server.acts)) - 1](connection, request)


def head(status: int, headers: dict[str, str] | None = None, length: int | None = 0) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def answer(status: int, headers: dict[str, str] | None = None, body: bytes = b"", *, length: int | None = None) -> Act:
    """`length`: what Content-Length says, if not the truth."""
    data = head(status, headers, len(body) if length is None else length) + body
    return lambda connection, _: connection.sendall(data)


def json_answer(body: bytes = b"{}") -> Act:
    return answer(200, {"Content-Type": "application/json"}, body)


def file_answer(content: bytes, headers: dict[str, str] | None = None, *, cut: int | None = None) -> Act:
    """A file server that knows ranges; closes after sending `cut` bytes of an answer."""

    def act(connection: socket.socket, request: Request) -> None:
        start = int(request.headers.get("range", "bytes=0-")[len("bytes=") : -1])
        said = dict(headers or {})
        if start:
            said["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        connection.sendall(head(206 if start else 200, said, len(content) - start) + content[start:][:cut])

    return act


def reset(connection: socket.socket, _: Request) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hang_up(connection: socket.socket, _: Request) -> None:
    pass


def trickle(server: Sequence[Server], start: bytes, *, every_s: float, drop: bytes = b"x") -> Act:
    """Sends `start`, and then `drop` from time to time until the client or the test is gone."""

    def act(connection: socket.socket, _: Request) -> None:
        connection.sendall(start)
        while not server[0].over.wait(every_s):
            connection.sendall(drop)

    return act
