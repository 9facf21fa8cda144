"""llama.cpp's own server, `llama-server`, from the sources that come with llama-cpp-python.

The Python server of that package answers one request at a time; the C++ one has slots and continuous
batching, so it is the peer to beat. It is built once, natively, into a cache folder outside the project.
One server a model; its router mode would start the same processes and add a proxy.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from loadtest.engine.work import CASES, Case, PeerUnavailableError, Work
from loadtest.server import free_port

VERSION = "0.3.36"  # of llama-cpp-python
CONTEXT = 256  # tokens a slot: the least the server gives
READY_TIMEOUT_S = 120
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
)  # fmt: skip

# httpx logs each request, which takes time from what is measured
logging.getLogger("httpx").setLevel(logging.WARNING)


def build_server(cache: Path) -> Path:
    """The server's binary; built at the first call, in about five minutes. Raises: PeerUnavailableError."""
    source = cache / f"llama_cpp_python-{VERSION}"
    binary = source / "build" / "bin" / "llama-server"
    if binary.exists():
        return binary
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    if missing:
        raise PeerUnavailableError(f"llama.cpp cannot be built: {', '.join(missing)} not found")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "build.log").open("w") as log:
        if not source.exists():
            package = f"llama-cpp-python=={VERSION}"
            download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", package]
            _run([*download, "--dest", str(cache)], log)
            with tarfile.open(cache / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
                archive.extractall(cache, filter="data")
        tree = str(source / "vendor" / "llama.cpp")
        _run(["nice", "-n", "10", "cmake", "-G", "Ninja", "-S", tree, "-B", str(source / "build"), *CMAKE], log)
        _run(["nice", "-n", "10", "cmake", "--build", str(source / "build"), "--target", "llama-server"], log)
    return binary


def _run(command: list[str], log: Any) -> None:
    done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise PeerUnavailableError(f"llama.cpp cannot be built: '{command[0]} ...' failed, see {log.name}")


class Server:
    """One process with one model."""

    def __init__(self, binary: Path, model: Path, *, threads: int, slots: int) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        # -ub: no more than a step can have, else it keeps 100 MB for logits of 512 rows
        self._process = subprocess.Popen(
            [
                str(binary), "--model", str(model), "--port", str(port), "--threads", str(threads),
                "--parallel", str(slots), "--ctx-size", str(slots * CONTEXT), "-ub", "128",
                "--no-webui", "--no-warmup",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def wait_ready(self) -> None:
        """Raises: PeerUnavailableError."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        with httpx.Client(base_url=self.url) as client:
            while time.monotonic() < deadline and self._process.poll() is None:
                try:
                    if client.get("/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.002)
        raise PeerUnavailableError("llama.cpp's server did not start")

    @property
    def memory_bytes(self) -> int:
        """Its proportional share of memory: weights that it maps from the page cache count."""
        return int(psutil.Process(self._process.pid).memory_full_info().pss)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class LlamaCpp:
    """A contender: one server for the cases of one model, and one server for each of many models."""

    def __init__(self, name: str, binary: Path, models: Sequence[Path], *, one_threads: int, many_threads: int) -> None:
        self.name = name
        self.cases = frozenset(case.name for case in CASES)
        self._one: Server | None = None
        self._many: list[Server] = []
        try:
            self._one = Server(binary, models[0], threads=one_threads, slots=32)
            self._one.wait_ready()
            for model in models:
                self._many.append(Server(binary, model, threads=many_threads, slots=4))
                self._many[-1].wait_ready()
        except BaseException:
            self.close()
            raise

    @property
    def memory_bytes(self) -> int:
        """Of the servers of many models together."""
        return sum(server.memory_bytes for server in self._many)

    def run(self, case: Case, work: Work, seed: int) -> int:
        assert self._one is not None
        servers = [self._one] if case.models == 1 else self._many[: case.models]
        return asyncio.run(_complete_all([server.url for server in servers] * case.streams, work, seed))

    def close(self) -> None:
        for server in filter(None, [self._one, *self._many]):
            server.close()


def best_threads(binary: Path, model: Path, work: Work, candidates: Sequence[int]) -> int:
    """The number of threads with which one model's server is fastest at 8 streams."""
    rates: dict[int, float] = {}
    for threads in candidates:
        server = Server(binary, model, threads=threads, slots=8)
        try:
            server.wait_ready()
            asyncio.run(_complete_all([server.url] * 8, work, 0))
            for seed in (1, 2):  # the better of two: neighbours disturb
                started = time.perf_counter()
                count = asyncio.run(_complete_all([server.url] * 8, work, seed))
                rates[threads] = max(rates.get(threads, 0), count / (time.perf_counter() - started))
        finally:
            server.close()
    return max(rates, key=lambda threads: rates[threads])


def greedy(binary: Path, model: Path, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """What it writes at temperature 0: whether the converted model is the same model."""
    server = Server(binary, model, threads=1, slots=1)
    try:
        server.wait_ready()
        body = {
            "prompt": list(prompt_ids), "n_predict": num_tokens, "temperature": 0,
            "ignore_eos": True, "return_tokens": True,
        }  # fmt: skip
        answer = httpx.post(f"{server.url}/completion", json=body, timeout=60)
        return [int(token) for token in answer.raise_for_status().json()["tokens"]]
    finally:
        server.close()


def swap_s(binary: Path, model: Path, work: Work, *, threads: int) -> float:
    """Seconds by which the first token of a model that is not running comes later than that of one that is."""
    one_token = Work(work.prompt_ids, 1, work.top_p, work.temperature)
    started = time.perf_counter()
    server = Server(binary, model, threads=threads, slots=4)
    try:
        server.wait_ready()
        times = [started]
        for seed in range(4):
            asyncio.run(_complete_all([server.url], one_token, seed))
            times.append(time.perf_counter())
        cold, *warm = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        return cold - sorted(warm)[1]
    finally:
        server.close()


async def _complete_all(urls: Sequence[str], work: Work, seed: int) -> int:
    """One request to each of `urls`, all at once; the number of tokens."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        counts = await asyncio.gather(
            *(_complete(client, url, work, seed * len(urls) + i) for i, url in enumerate(urls))
        )
    return sum(counts)


async def _complete(client: httpx.AsyncClient, url: str, work: Work, seed: int) -> int:
    body = {
        "prompt": list(work.prompt_ids),
        "n_predict": work.num_tokens,
        "samplers": ["top_p", "temperature"],  # and none of the others, as everyone
        "top_p": work.top_p,
        "temperature": work.temperature,
        "seed": seed,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    answer = await client.post(f"{url}/completion", json=body)
    answer.raise_for_status()
    return int(answer.json()["tokens_predicted"])
