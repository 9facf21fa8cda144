"""A port that answers scrapes, beside that of the service: the same one for all processes of a node.

It knows HTTP, and nothing of what is counted.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from socketserver import TCPServer
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from serve.logs import get_logger
from serve.metrics import Metrics

log = get_logger()

_REQUEST_S = 10.0
_MAX_AT_ONCE = 8


def listen(metrics: Metrics, port: int, host: str = "127.0.0.1") -> Callable[[], None] | None:
    """Answers scrapes of `metrics` on threads; gives back what ends it, None where the port cannot be had.

    All processes of a node listen at one port (SO_REUSEPORT), and the system picks: they must all say the same.
    """
    try:
        server = make_server(
            host, port, make_wsgi_app(metrics.registry), _Server6 if ":" in host else _Server, _Handler
        )
    except OSError as exc:
        log.warning("metrics_port_unusable", host=host, port=port, reason=exc.strerror)
        return None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def close() -> None:
        server.shutdown()
        server.server_close()

    return close


class _Server(ThreadingWSGIServer):
    allow_reuse_port = True

    def __init__(self, *args: Any) -> None:
        self._places = threading.BoundedSemaphore(_MAX_AT_ONCE)
        super().__init__(*args)

    def server_bind(self) -> None:
        """Without the look-up of the host's name that is usual, and may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._places.acquire()  # the next ones wait to be accepted
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_S

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for every scrape is of no use."""
