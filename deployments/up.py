"""The whole service on one machine: a local Ray, the application, and `ready` once a token was really written.

    python -m deployments.up --port 8000

stdout gets the one line `ready URL`; how far the start is goes to stderr. Where a Rookery runs over the same data
folder already, nothing is started. Stays in the foreground. SIGTERM and Ctrl-C stop everything it
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
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]
from rich.console import Console

from deployments import haproxy, ray_env, running
from deployments.checklist import Checklist
from deployments.client import Client
from deployments.stopping import Signals, Stopped, caught_signals
from serve.errors import Conflict, RookeryError
from serve.logs import configure, get_logger
from serve.settings import PREFIX, BadSetting, Settings
from serve.version import VERSION

HOST = "127.0.0.1"
READY_TIMEOUT_S = 300.0
_POLL_S = 0.1
_LOOK_S = 1.0  # how often a service that runs looks whether a signal was lost
_INTERRUPTED = 130
_STOP_GRACE_S = 5.0  # for what is left after Ray's own shutdown

_WELCOME = """
The page   {url}
The API    {url}/v1
To end it  Ctrl-C, or: rookery down
"""


log = get_logger()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be started beside the settings. `verbose`: the logs of all replicas go to stderr, not to a file."""

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

    Raises: RookeryError when it cannot start; SystemExit with 130 when it is to end before it is ready.
    """
    remarks = remarks or Console(stderr=True, highlight=False)
    try:
        with caught_signals() as signals:
            if not find_service(plan.url, settings.data, remarks):
                _start(plan, settings, remarks, on_ready or (lambda url: None), signals)
    except running.RunsAlready:  # it was quicker
        find_service(plan.url, settings.data, remarks)
    except Stopped:
        raise SystemExit(_INTERRUPTED) from None


def _start(
    plan: Plan, settings: Settings, remarks: Console, on_ready: Callable[[str], object], signals: Signals
) -> None:
    _check_port(plan.port)
    if not settings.threads:
        settings = replace(settings, threads=max(1, len(os.sched_getaffinity(0)) // plan.num_generators))
    settings = _where_to_log(settings, plan.verbose)
    say = partial(print, file=sys.stdout, flush=True)

    def welcome() -> None:
        say(f"ready {plan.url}")
        log.info("service_ready", url=plan.url, generators=plan.num_generators, gateways=plan.num_gateways)
        remarks.print(_WELCOME.format(url=plan.url), markup=False, soft_wrap=True)
        on_ready(plan.url)

    with (
        running.announced(settings.data, plan.url),
        contextlib.redirect_stdout(sys.stderr),  # Ray's remarks; stdout is for the one line that callers wait for
    ):
        configure(settings, part="up")
        log.info("service_starting", version=VERSION, url=plan.url)
        checklist = Checklist(remarks)
        for check in (_check_versions, _check_data_folder, _check_database, _check_base):
            check(settings, checklist)
            signals.check()
        try:
            _serve(plan, settings, checklist, welcome, signals)
        finally:
            log.info("service_ended")


def _serve(
    plan: Plan, settings: Settings, checklist: Checklist, on_ready: Callable[[], object], signals: Signals
) -> None:
    """Until a signal comes. Raises: Stopped when it comes before the service is ready."""
    scratch = Path(f"/tmp/rookery-{secrets.token_hex(4)}")
    binary = haproxy.find_haproxy()
    switches = ray_env.for_laptop(verbose=plan.verbose)
    if binary:
        program = scratch / "haproxy"
        switches |= haproxy.switches(scratch, program, fallback_port=haproxy.free_port())  # Ray's may be another's
    _set_environment(settings, switches)
    import ray.serve  # noqa: F401  # not in the block that ends Ray: an import that is cut off cannot be repeated

    signals.check()
    with _private_folder(scratch):
        try:
            with checklist.step("Ray") as said:
                if binary:
                    haproxy.write_start(scratch, program, binary)
                # A folder below: Ray opens its own to everybody.
                _start_ray(str(scratch / "ray"), num_cpus=2 * plan.num_generators + 1, verbose=plan.verbose)
                signals.catch()  # again: ray.init puts a handler of its own in the place of ours
                said("started, HAProxy in front" if binary else "started, without HAProxy: streams take more CPU time")
            signals.check()
            with checklist.step("deployments") as said:
                device = _deploy(plan, settings.device)
                said(f"gateways {plan.num_gateways}, generators {plan.num_generators}, on the {device.upper()}")
            with checklist.step("first token"):
                _wait_until_ready(plan.url, signals)
            on_ready()
            with contextlib.suppress(Stopped):
                while True:
                    signals.check()
                    time.sleep(_LOOK_S)
        finally:
            signals.ignore()
            _stop()


def find_service(url: str, data: Path, remarks: Console, *, waits: bool = False) -> bool:
    """Whether a Rookery is over the folder already; tells where, with the line `ready` if it is. `waits`: until then.

    Raises: Conflict when one over another folder is at the address, CannotStart when it waits in vain.
    """
    found = running.find(data)
    with Client(found.url if found else url) as client:
        if found is None:
            if client.is_rookery():
                raise Conflict(f"A Rookery is at {url} already, over another folder than {data}; name another --port.")
            return False
        is_ready = client.is_ready()
        said = f"Rookery is {'running' if is_ready else 'starting'} already at {found.url}"
        elsewhere = "" if found.url == url else f"; nothing is started at {url}"
        remarks.print(f"{said} (process {found.pid} over {data}){elsewhere}.", markup=False, soft_wrap=True)
        if waits and not is_ready:
            _wait_for_another(found, data, client)
            is_ready = True
    if is_ready:
        print(f"ready {found.url}", flush=True)  # noqa: T201  # as for callers that wait for a new one
    return True


def _wait_for_another(found: running.Running, data: Path, client: Client) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while running.find(data) == found:
        if client.is_ready():
            return
        if time.monotonic() > deadline:
            raise CannotStart(f"It was not ready after {READY_TIMEOUT_S:g} s: {client.why_unready()}")
        time.sleep(_POLL_S)
    raise CannotStart("It has ended before it was ready.")


# --- What can be known before anything starts ---------------------------------------------------------------


def _check_versions(settings: Settings, checklist: Checklist) -> None:
    with checklist.step("versions") as said:
        others = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray"))
        said(f"Rookery {VERSION}, Python {platform.python_version()}, {others}")


def _check_data_folder(settings: Settings, checklist: Checklist) -> None:
    with checklist.step("data folder") as said:
        said(f"{settings.data.absolute()}, {shutil.disk_usage(settings.data).free / 1e9:,.1f} GB free")


def _check_database(settings: Settings, checklist: Checklist) -> None:
    """Raises: RookeryError."""
    with checklist.step("database") as said:
        from serve.database.connection import Database

        Database(settings.sql_url).close()  # brings its tables up to date, once for all processes
        said("SQLite, in the data folder" if not settings.database_url else settings.database_url.partition(":")[0])


def _check_base(settings: Settings, checklist: Checklist) -> None:
    """Fetches it where it is not here: no replica writes anything before. Raises: RookeryError."""
    with checklist.step("base model") as said:
        from serve.hub.opening import open_hub
        from serve.store.opening import open_store

        said(open_hub(settings, open_store(settings)).locate(settings.base).model_id)


@contextlib.contextmanager
def _private_folder(path: Path) -> Iterator[None]:
    """Made here, not before: until Ray's switches are set and Ray is imported, a signal would leave it behind."""
    path.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


class CannotStart(RookeryError):
    """What the service needs is not to be had."""

    code = "cannot_start"


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            by = f" by {holder}" if (holder := running.holder(port)) else ""
            said = f"Port {port} on {HOST} cannot be used ({exc.strerror}{by}); choose another one."
            raise CannotStart(said) from exc


def _where_to_log(settings: Settings, verbose: bool) -> Settings:
    """Into the data folder; with `verbose` where somebody reads along."""
    if settings.log_file:
        return replace(settings, log_file=str(Path(settings.log_file).absolute()))
    if not verbose:
        return replace(settings, log_file=str(settings.data.absolute() / running.EVENTS))
    is_text = settings.log_format == "auto" and sys.stderr.isatty()  # replicas cannot know: Ray is between
    return replace(settings, log_format="text" if is_text else settings.log_format)


def _set_environment(settings: Settings, switches: Mapping[str, str]) -> None:
    """All that Ray starts inherits it; a `runtime_env` would cost every process a start of its own.

    What the caller has set already wins, RAY_SERVE_ENABLE_HA_PROXY=0 among it.
    """
    settings = replace(settings, data=settings.data.absolute())
    if not settings.hosts and f"{PREFIX}HOSTS" not in os.environ:
        settings = replace(settings, hosts="localhost")  # nobody calls a loopback address by another name
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ.update(settings.to_env(), PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)))
    for name, value in {**switches, "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
        os.environ.setdefault(name, value)
    if _is_behind_our_haproxy(switches):
        os.environ[f"{PREFIX}ADDRESS_HEADER"] = settings.address_header or haproxy.CALLER_HEADER
    else:  # uvicorn, by which Ray serves, would believe the x-forwarded-for of whatever calls from this machine
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "")


def _is_behind_our_haproxy(switches: Mapping[str, str]) -> bool:
    """Not where the caller has said otherwise: another HAProxy lets through whatever is in our header."""
    names = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"
    return all(name in switches and os.environ[name] == switches[name] for name in names)


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
        raise Stopped from exc  # Ray's own handler of SIGTERM


def _deploy(plan: Plan, device: str) -> Literal["gpu", "cpu"]:
    """Returns what the generators compute on. Raises: CannotStart."""
    import ray
    from ray import serve

    from deployments.app import APP_NAME, AppArgs, build

    logging.getLogger("ray.serve").setLevel(logging.INFO if plan.verbose else logging.WARNING)
    serve.start(http_options={"host": HOST, "port": plan.port, "keep_alive_timeout_s": haproxy.KEEP_ALIVE_S})
    has_gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    if device == "cuda" and not has_gpu:
        raise CannotStart("ROOKERY_DEVICE is cuda, but no GPU was found here; use auto or cpu.")
    found: Literal["gpu", "cpu"] = "gpu" if has_gpu else "cpu"
    # Nobody but this machine reaches HOST.
    args = AppArgs(num_generators=plan.num_generators, num_gateways=plan.num_gateways, device=found, needs_keys=False)
    serve.run(build(args), name=APP_NAME)
    return found


def _wait_until_ready(url: str, signals: Signals) -> None:
    """Until a token was generated. Raises: CannotStart with the last answer."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    with Client(url) as client:
        while answer := client.why_unready():
            signals.check()
            if time.monotonic() > deadline:
                raise CannotStart(f"The service was not ready after {READY_TIMEOUT_S:g} s: {answer}")
            time.sleep(_POLL_S)


def _stop() -> None:
    """Serve, then Ray, then whatever of ours has not ended by itself."""
    import ray
    from ray import serve

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
