"""What Kubernetes has between a client and the gateways: a Service, and the probes that tell it who is ready.

The Service is kube-proxy's: it shares out connections in turns, and knows neither HTTP nor a second try. A connection
that is there stays with its pod, whatever becomes of the pod's readiness. Probes are the kubelet's, one a pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import Future
from threading import Event

from tests.k8s.pods import Pod

PORT = 8000
_START_PERIOD_S, _START_TIMEOUT_S = 1.0, 15.0  # of the manifests' startup probe, but for its longer period
_PERIOD_S, _TIMEOUT_S, _FAILURES = 5.0, 5.0, 2  # of their readiness probe
_CONNECT_S = 5.0  # as long as clients wait for a connection; the one to this process they have at once


class Service:
    """Listens in a pod of its own; `with` it runs. Every change is in `events`, with its time."""

    def __init__(self, pod: Pod) -> None:
        self.url = f"http://{pod.address}:{PORT}"
        self.events: list[tuple[float, str, bool]] = []
        self._pod = pod
        self._ready: list[Pod] = []
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._turn = 0
        self._has_begun = Event()

    def add(self, pod: Pod) -> None:
        """It gets connections as soon as, and for as long as, its probe is good."""

        async def begin() -> None:
            self._probes[pod.name] = asyncio.create_task(self._watch(pod))

        self._do(begin())

    def remove(self, pod: Pod) -> None:
        """It terminates, or is gone: no new connections."""

        async def end() -> None:
            if probe := self._probes.pop(pod.name, None):
                probe.cancel()
            self._set(pod, False)

        self._do(end())

    @property
    def ready(self) -> list[str]:
        return [pod.name for pod in self._ready]

    def wait_for(self, count: int, timeout_s: float) -> None:
        """Until so many are ready. Raises: TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while len(self._ready) != count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.ready} are ready after {timeout_s:g} s, not {count}")
            time.sleep(0.05)

    def __enter__(self) -> Service:
        self._done: Future[None] = self._pod.begin(lambda: asyncio.run(self._serve()))
        assert self._has_begun.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._done.result(30)

    def _do(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)  # type: ignore[arg-type]

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._forward, "0.0.0.0", PORT, backlog=1024)
        self._has_begun.set()
        await self._end.wait()
        server.close()

    # --- Connections --------------------------------------------------------------------------------------------

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not self._ready:
                raise ConnectionRefusedError
            self._turn += 1
            pod = self._ready[self._turn % len(self._ready)]
            ahead, behind = await asyncio.wait_for(asyncio.open_connection(pod.address, PORT), _CONNECT_S)
        except OSError:
            writer.transport.abort()
            return
        try:
            await asyncio.gather(_pump(reader, behind, writer), _pump(ahead, writer, behind))
        finally:
            writer.close()
            behind.close()

    # --- Probes -------------------------------------------------------------------------------------------------

    async def _watch(self, pod: Pod) -> None:
        while not await _is_good(pod, "/readyz", _START_TIMEOUT_S):
            await asyncio.sleep(_START_PERIOD_S)
        num_bad = 0
        while True:
            num_bad = 0 if await _is_good(pod, "/-/healthz", _TIMEOUT_S) else num_bad + 1
            if num_bad in (0, _FAILURES):
                self._set(pod, num_bad == 0)
            await asyncio.sleep(_PERIOD_S)

    def _set(self, pod: Pod, is_ready: bool) -> None:
        if is_ready == (pod in self._ready):
            return
        self._ready = [*self._ready, pod] if is_ready else [one for one in self._ready if one is not pod]
        self.events.append((time.monotonic(), pod.name, is_ready))


async def _is_good(pod: Pod, path: str, timeout_s: float) -> bool:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(pod.address, PORT)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {pod.address}\r\nConnection: close\r\n\r\n".encode())
                return b" 200 " in await reader.readline()
            finally:
                writer.transport.abort()
    return False


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: asyncio.StreamWriter) -> None:
    """Bytes from one to the other; an end as an end, a break as a break for both."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()
        other.transport.abort()
