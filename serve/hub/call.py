"""One HTTP request by huggingface_hub's client that ends when it must, whatever it waits for.

Knows nothing of what is asked, nor of what an answer means.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import httpx2
from huggingface_hub import get_session


class Call:
    """One request, which can be cut off from another thread whatever it waits for.

    It knows the connections that were made for it. One that somebody else's request left open in huggingface_hub's
    client would be cut only once the headers are here; whoever waits is bounded in any case.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: list[Any] = []  # httpcore's network streams, the newest last: TLS wraps TCP
        self._is_cut = False
        self._answer: Future[httpx2.Response] = Future()

    @property
    def is_connected(self) -> bool:
        return bool(self._streams) or self.is_answered

    @property
    def is_answered(self) -> bool:
        """Whether the head of an answer is here."""
        return self._answer.done() and not self._answer.exception()

    def send(self, url: httpx2.URL, headers: dict[str, str], timeout: httpx2.Timeout, head_s: float) -> httpx2.Response:
        """The answer, its body unread. Raises: httpx2.HTTPError; httpx2.ReadTimeout after `head_s` at most."""
        # In a thread of its own because nothing else bounds the look-up of a name, or headers that come one at a time.
        threading.Thread(target=self._run, args=(url, headers, timeout), daemon=True, name="hub-request").start()
        try:
            return self._answer.result(head_s)
        except TimeoutError:
            self.cut()
            if self.is_answered:
                self._answer.result().close()  # it came at the last moment
            raise httpx2.ReadTimeout("no answer in time") from None

    def cut(self) -> None:
        """Ends all reading at once."""
        with self._lock:
            self._is_cut = True
            streams = list(self._streams)
        for stream in streams:
            _shut(stream)

    def _run(self, url: httpx2.URL, headers: dict[str, str], timeout: httpx2.Timeout) -> None:
        try:
            client = get_session()
            extensions = {"trace": self._trace}
            request = client.build_request("GET", url, headers=headers, timeout=timeout, extensions=extensions)
            response = client.send(request, stream=True, follow_redirects=False)
        except BaseException as exc:
            self._answer.set_exception(exc)
            return
        with self._lock:
            if not self._is_cut:
                self._streams.append(response.extensions["network_stream"])
                self._answer.set_result(response)
                return
        response.close()

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """httpcore's events, of which those count that bring a connection."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._streams.append(info["return_value"])
                if self._is_cut:
                    _shut(info["return_value"])


def _shut(stream: Any) -> None:
    with suppress(OSError):  # closed already, or wrapped by TLS since
        # Not SSLSocket's own, which takes the TLS state away from under the reader.
        socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)
