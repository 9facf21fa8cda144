"""The whole service on one machine: a local Ray, the application, and `ready` once a token was really written.

    python -m deployments.up --port 8000

stdout gets the one line `ready URL`; how far the start is goes to stderr. Where a Rookery runs already, over the same
data folder or at the same port, nothing is started. Stays in the foreground. SIGTERM and Ctrl-C stop everything it
started. After a SIGKILL the replicas end by themselves within some 3 s, two idle agents of Ray's after a minute; a
folder /tmp/rookery-* with logs stays. Ray is imported only after its environment is set: it reads its switches at
import.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import platform
import secrets
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Literal

import psutil  # type: ignore[import-untyped]
from rich.console import Console

from deployments import haproxy, running
from deployments.checklist import Checklist
from deployments.client import Client
from serve.errors import RookeryError
from serve.settings import PREFIX, BadSetting, Settings
from serve.version import VERSION

HOST = "127.0.0.1"
READY_TIMEOUT_S = 300.0
_POLL_S = 0.1
_STOP_GRACE_S = 5.0  # for what is left after Ray's own shutdown
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Ray's switches; what the caller has set already wins, RAY_SERVE_ENABLE_HA_PROXY=0 among them. A token between
# deployments by gRPC costs a fifth of what it costs by Ray's object store, and one loop instead of three threads halves
# the rest: one token in 3.6 ms with HAProxy, in 8.4 ms without, in 13.4 ms with none of these (2 busy cores, November
# 2026).
_RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_worker_niceness": "0",  # Ray's own 15 would put generators behind everything, training included
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a dead proxy is back after 6 s, not 30
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # HAProxy's wait for other nodes: here there is one
    # An idle service takes 5 % of a core, not 9 %: the controller looks twice a second, not ten times, and Ray's own
    # metrics, which nothing here would read, are not gathered.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_enable_metrics_collection": "0",
}
_WELCOME = """
The page   {url}
The API    {url}/v1
To end it  Ctrl-C, or: rookery down
"""
# Two lines for each request, where nobody reads them, cost 32 streams of 60 tokens 5 % of their tokens a second. They
# are in the files under /tmp while the service runs, a thousand at a time, and at once from the first error on.
_QUIET_ENV = {"RAY_SERVE_LOG_TO_STDERR": "0", "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be started beside the settings. `verbose`: the logs of all replicas go to stderr."""

    port: int = 8000
    num_generators: int = 1
    num_gateways: int = 1
    verbose: bool = False

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


def main(
    plan: Plan, settings: Settings, remarks: Console | None = None, on_ready: Callable[[str], object] | None = None
) -> None:
    """Serves until SIGTERM or Ctrl-C; `on_ready` gets the address when it answers.

    Raises: SystemExit with a sentence when it cannot start, RookeryError when it cannot use its data.
    """
    remarks = remarks or Console(stderr=True, highlight=False)
    if find_service(plan.url, settings.data, remarks):
        return
    _check_port(plan.port)
    if not settings.threads:
        settings = replace(settings, threads=max(1, len(os.sched_getaffinity(0)) // plan.num_generators))
    say = partial(print, file=sys.stdout, flush=True)

    def welcome() -> None:
        say(f"ready {plan.url}")
        remarks.print(_WELCOME.format(url=plan.url), markup=False, soft_wrap=True)
        if on_ready is not None:
            on_ready(plan.url)

    with (
        running.announced(settings.data, plan.url),
        contextlib.redirect_stdout(sys.stderr),  # Ray's remarks; stdout is for the one line that callers wait for
    ):
        checklist = Checklist(remarks)
        _check_machine(settings, checklist)
        _serve(plan, settings, checklist, welcome)


def _serve(plan: Plan, settings: Settings, checklist: Checklist, on_ready: Callable[[], object]) -> None:
    """Until a signal comes."""
    scratch = Path(f"/tmp/rookery-{secrets.token_hex(4)}")
    binary = haproxy.find_haproxy()
    _set_environment(settings, (haproxy.switches(scratch) if binary else {}) | ({} if plan.verbose else _QUIET_ENV))
    import ray.serve  # noqa: F401  # before signals are caught: an import that one cuts off cannot be repeated

    with _private_folder(scratch):
        try:
            _catch_signals()
            with checklist.step("Ray") as said:
                if binary:
                    haproxy.write_start(scratch, binary)
                # A folder below: Ray opens its own to everybody.
                _start_ray(str(scratch / "ray"), num_cpus=2 * plan.num_generators + 1, verbose=plan.verbose)
                _catch_signals()  # again: ray.init puts a handler of its own in the place of ours
                said("started, HAProxy in front" if binary else "started, without HAProxy: streams take more CPU time")
            with checklist.step("deployments") as said:
                device = _deploy(plan, settings.device)
                said(f"gateways {plan.num_gateways}, generators {plan.num_generators}, on the {device.upper()}")
            with checklist.step("first token"):
                _wait_until_ready(plan.port)
            on_ready()
            signal.pause()
        except _Stopped:
            pass
        finally:
            _stop()


def find_service(url: str, data: Path, remarks: Console) -> bool:
    """Whether a Rookery is over the folder or at the address already; tells where, with the line `ready` if it is."""
    found = running.find(data)
    at = found.url if found else url
    with Client(at) as client:
        if found is None and not client.is_rookery():
            return False
        is_ready = client.is_ready()
    about = f"process {found.pid} over {data}" if found else "over another folder"
    state = "running" if is_ready else "starting"
    remarks.print(f"Rookery is {state} already at {at} ({about}).", markup=False, soft_wrap=True)
    if is_ready:
        print(f"ready {at}", flush=True)  # noqa: T201  # as for callers that wait for a new one
    return True


def _check_machine(settings: Settings, checklist: Checklist) -> None:
    """What can be known before anything starts. Raises: SystemExit, RookeryError."""
    with checklist.step("versions") as said:
        others = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray"))
        said(f"Rookery {VERSION}, Python {platform.python_version()}, {others}")
    with checklist.step("data folder") as said:
        said(f"{settings.data.absolute()}, {shutil.disk_usage(settings.data).free / 1e9:,.1f} GB free")
    with checklist.step("database") as said:
        from serve.database.connection import Database

        Database(settings.sql_url).close()  # brings its tables up to date, once for all processes
        said("SQLite, in the data folder" if not settings.database_url else settings.database_url.partition(":")[0])


@contextlib.contextmanager
def _private_folder(path: Path) -> Iterator[None]:
    """Made here, not before: until Ray's switches are set and Ray is imported, a signal would leave it behind."""
    path.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


class _Stopped(BaseException):
    """SIGTERM or SIGINT came. Not an Exception, so that nobody in between takes it for a failure."""


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            raise SystemExit(f"Port {port} on {HOST} cannot be used ({exc.strerror}); choose another one.") from exc


def _set_environment(settings: Settings, switches: Mapping[str, str]) -> None:
    """All that Ray starts inherits it; a `runtime_env` would cost every process a start of its own."""
    settings = replace(settings, data=settings.data.absolute())
    if not settings.hosts and f"{PREFIX}HOSTS" not in os.environ:
        settings = replace(settings, hosts="localhost")  # nobody calls a loopback address by another name
    settings.data.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ.update(settings.to_env(), PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)))
    for name, value in {**_RAY_ENV, **switches, "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
        os.environ.setdefault(name, value)


def _start_ray(scratch: str, *, num_cpus: int, verbose: bool) -> None:
    import ray

    # `num_cpus` is what deployments book, not what they use: one core is enough to start.
    try:
        ray.init(
            address="local",  # never join a cluster that happens to run here
            num_cpus=num_cpus,
            object_store_memory=128 << 20,  # hardly used: deltas are small
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.WARNING,
            _temp_dir=scratch,
        )
    except SystemExit as exc:
        raise _Stopped from exc  # Ray's own handler of SIGTERM


def _deploy(plan: Plan, device: str) -> Literal["gpu", "cpu"]:
    """Returns what the generators compute on. Raises: SystemExit."""
    import ray
    from ray import serve

    from deployments.app import APP_NAME, AppArgs, build

    logging.getLogger("ray.serve").setLevel(logging.INFO if plan.verbose else logging.WARNING)
    serve.start(http_options={"host": HOST, "port": plan.port})
    has_gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    if device == "cuda" and not has_gpu:
        raise SystemExit("ROOKERY_DEVICE is cuda, but no GPU was found here; use auto or cpu.")
    found: Literal["gpu", "cpu"] = "gpu" if has_gpu else "cpu"
    args = AppArgs(num_generators=plan.num_generators, num_gateways=plan.num_gateways, device=found)
    serve.run(build(args), name=APP_NAME)
    return found


def _wait_until_ready(port: int) -> None:
    """Until a token was generated. Raises: SystemExit with the last answer."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    answer = "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/readyz", timeout=READY_TIMEOUT_S):
                return
        except urllib.error.HTTPError as exc:
            answer = exc.read(1000).decode(errors="replace")
        except OSError as exc:
            answer = str(exc)
        time.sleep(_POLL_S)
    raise SystemExit(f"The service was not ready after {READY_TIMEOUT_S:g} s: {answer}")


def _catch_signals() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        _ignore_signals()
        raise _Stopped

    for number in _SIGNALS:
        signal.signal(number, stop)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop() -> None:
    """Serve, then Ray, then whatever of ours has not ended by itself."""
    import ray
    from ray import serve

    _ignore_signals()
    started = psutil.Process().children(recursive=True)
    try:
        if ray.is_initialized():
            with contextlib.redirect_stdout(io.StringIO()):  # Ray complains of the very processes it ends here
                serve.shutdown()  # replicas drain; the running training job goes back to the queue
                ray.shutdown()
    finally:
        _, left = psutil.wait_procs(started, timeout=_STOP_GRACE_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_STOP_GRACE_S)


def _parse_args() -> Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--generators", type=int, default=1, help="replicas that write text")
    parser.add_argument("--gateways", type=int, default=1, help="replicas that speak HTTP")
    parser.add_argument("--verbose", action="store_true", help="show the logs of all replicas")
    args = parser.parse_args()
    return Plan(args.port, args.generators, args.gateways, args.verbose)


if __name__ == "__main__":
    _plan = _parse_args()
    try:
        main(_plan, Settings.from_env())
    except (BadSetting, RookeryError) as error:
        raise SystemExit(str(error)) from error
