"""The whole service on one machine: a local Ray, the application, and `ready` once a token was really written.

    python -m deployments.up --port 8000

Stays in the foreground. SIGTERM and Ctrl-C stop everything it started. After a SIGKILL the replicas end by
themselves within some 3 s, two idle agents of Ray's after a minute; a folder /tmp/rookery-* with logs stays. Ray is
imported only after its environment is set: it reads its switches at import.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]

from deployments import haproxy
from serve.settings import BadSetting, Settings

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
# Two lines for each request, where nobody reads them, cost 32 streams of 60 tokens 5 % of their tokens a second. They
# are in the files under /tmp while the service runs, a thousand at a time, and at once from the first error on.
_QUIET_ENV = {"RAY_SERVE_LOG_TO_STDERR": "0", "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000"}


def main(
    port: int, settings: Settings, *, num_generators: int = 1, num_gateways: int = 1, verbose: bool = False
) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises: SystemExit with a sentence when it cannot start."""
    _check_port(port)
    if not settings.threads:
        settings = replace(settings, threads=max(1, len(os.sched_getaffinity(0)) // num_generators))
    scratch = Path(f"/tmp/rookery-{secrets.token_hex(4)}")
    binary = haproxy.find_haproxy()
    _set_environment(settings, (haproxy.switches(scratch) if binary else {}) | ({} if verbose else _QUIET_ENV))
    import ray.serve  # noqa: F401  # before signals are caught: an import that one cuts off cannot be repeated

    say = partial(print, file=sys.stdout, flush=True)
    with (
        contextlib.redirect_stdout(sys.stderr),  # Ray's remarks; stdout is for the one line that callers wait for
        _private_folder(scratch),
    ):
        try:
            _catch_signals()
            if binary:
                haproxy.write_start(scratch, binary)
            # A folder below: Ray opens its own to everybody.
            _start_ray(str(scratch / "ray"), num_cpus=2 * num_generators + 1, verbose=verbose)
            _catch_signals()  # again: ray.init puts a handler of its own in the place of ours
            _deploy(port, num_generators, num_gateways, settings.device, verbose=verbose)
            _wait_until_ready(port)
            say(f"ready http://{HOST}:{port}")
            signal.pause()
        except _Stopped:
            pass
        finally:
            _stop()


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


def _deploy(port: int, num_generators: int, num_gateways: int, device: str, *, verbose: bool) -> None:
    import ray
    from ray import serve

    from deployments.app import APP_NAME, AppArgs, build

    logging.getLogger("ray.serve").setLevel(logging.INFO if verbose else logging.WARNING)
    serve.start(http_options={"host": HOST, "port": port})
    has_gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    if device == "cuda" and not has_gpu:
        raise SystemExit("ROOKERY_DEVICE is cuda, but no GPU was found here; use auto or cpu.")
    args = AppArgs(num_generators=num_generators, num_gateways=num_gateways, device="gpu" if has_gpu else "cpu")
    serve.run(build(args), name=APP_NAME)


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


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--generators", type=int, default=1, help="replicas that write text")
    parser.add_argument("--gateways", type=int, default=1, help="replicas that speak HTTP")
    parser.add_argument("--verbose", action="store_true", help="show the logs of all replicas")
    return parser.parse_args()


if __name__ == "__main__":
    _args = _parse_args()
    try:
        _settings = Settings.from_env()
    except BadSetting as error:
        raise SystemExit(str(error)) from error
    main(
        _args.port,
        _settings,
        num_generators=_args.generators,
        num_gateways=_args.gateways,
        verbose=_args.verbose,
    )
