"""What is known of the two sides of a run before it begins: the tester's machine, and the server by its own words."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from loadtest.client.sender import TooLarge, open_session, read_body
from loadtest.client.target import Target
from loadtest.client.wire import Unreadable, code_of, count, objects, read_object
from loadtest.results.record import Header
from loadtest.traffic.plan import Plan
from loadtest.traffic.reading import as_mapping

_ANSWER_S = 10.0
_FIRST_TOKEN_S = 120.0  # a model may have to come from far away
_LISTED_S = 120.0
_PAGE = 1000
_MOST_MODELS = 1_000_000


class Unusable(Exception):
    """Nothing can be asked of the server; the message says of which, and why."""


class Unreachable(Unusable):
    """Nobody answers at the address."""


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself. `models` in its own order, what it calls its base last."""

    models: tuple[str, ...]
    models_that_fit: int | None = None
    told: Mapping[str, Any] = field(default_factory=dict)  # for the header


async def look_at(target: Target, *, patterns: Sequence[str] = (), is_fit_needed: bool = True) -> Server:
    """Asks for its models, of which those that `patterns` name are kept; loads one to learn how many fit in memory.

    That is the last of them but for the base: a plan asks for it least, if at all.

    Raises: Unusable, Unreachable
    """
    async with open_session(target) as session:
        try:
            status = await _get_if_there(session, target, "/v1/status")
            async with asyncio.timeout(_LISTED_S):
                models = await _list_models(session, target)
        except (Unreadable, TooLarge) as exc:
            raise Unusable(f"{target.url} does not list its models at /v1/models: {exc}") from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise Unreachable(f"nobody answers at {target.url}: {str(exc) or type(exc).__name__}") from exc
        base = status.get("base_model")
        models = _chosen(models, patterns) if patterns else sorted(models, key=lambda model: model == base)
        told: dict[str, Any] = {name: status[name] for name in _TOLD if name in status}
        fits: dict[str, Any] = {}
        if models and is_fit_needed:
            bots = [model for model in models[-2:] if model != base]
            fits = await _count_fitting(session, target, (bots or models)[-1])
    return Server(tuple(models), fits.get("models_that_fit"), {**told, **fits, "models_listed": len(models)})


_TOLD = ("version", "base_model", "replicas", "budget_bytes", "used_bytes", "resident_models", "models")


def _chosen(models: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """In the order of `patterns`: an id as it stands, whether it is listed or not; or what begins so: "bench/*"."""
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern.endswith("*"):
            found |= dict.fromkeys(model for model in models if model.startswith(pattern[:-1]))
        else:
            found[pattern] = None
    return list(found)


async def _list_models(session: aiohttp.ClientSession, target: Target) -> list[str]:
    """As many as there are, in the server's order; a page without a new one is the last.

    Raises: Unusable, Unreadable; aiohttp.ClientError
    """
    found: dict[str, None] = {}
    query = f"?limit={_PAGE}"
    while len(found) < _MOST_MODELS:
        page = await _get(session, target, f"/v1/models{query}")
        if not isinstance(page.get("data"), list):
            raise Unreadable("no list")
        ids = [model.get("id") for model in objects(page["data"])]
        new = dict.fromkeys(id_ for id_ in ids if isinstance(id_, str) and id_ and id_ not in found)
        found |= new
        if not page.get("has_more") or not new:
            break
        query = f"?limit={_PAGE}&after={quote(next(reversed(new)))}"
    return list(found)


async def _count_fitting(session: aiohttp.ClientSession, target: Target, model: str) -> dict[str, Any]:
    """How many models like this one fit in the memory of all replicas; {} where the server does not say."""
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    try:
        async with asyncio.timeout(_FIRST_TOKEN_S), session.post(target.at("/v1/completions"), json=body) as response:
            await read_body(response)
        replicas = objects((await _get_if_there(session, target, "/v1/replicas")).get("data"))
        size = max((_size_on(replica, model) for replica in replicas), default=0)
        room = [count(replica.get("budget_bytes")) for replica in replicas]
    except (aiohttp.ClientError, TimeoutError, OSError, Unusable, Unreadable, TooLarge):
        return {}
    if not size:
        return {}
    return {
        "models_that_fit": sum(each // size for each in room),
        "model_bytes": size,
        "devices": sorted({f"{replica.get('device')} {replica.get('dtype')}" for replica in replicas}),
    }


def _size_on(replica: Mapping[str, Any], model: str) -> int:
    """In bytes; 0 where it is not."""
    residents = objects(replica.get("residents"))
    return max((count(each.get("bytes")) for each in residents if each.get("model") == model), default=0)


async def _get_if_there(session: aiohttp.ClientSession, target: Target, path: str) -> dict[str, Any]:
    """The JSON object at `path`; {} where the server has no such path, or tells nothing there that can be read."""
    try:
        return await _get(session, target, path, is_optional=True)
    except (Unreadable, TooLarge):
        return {}


async def _get(
    session: aiohttp.ClientSession, target: Target, path: str, *, is_optional: bool = False
) -> dict[str, Any]:
    """The JSON object at `path`.

    Raises: Unusable where the server refuses it; Unreadable, TooLarge, TimeoutError; aiohttp.ClientError
    """
    async with asyncio.timeout(_ANSWER_S), session.get(target.at(path), allow_redirects=False) as response:
        if response.status == 404 and is_optional:
            return {}
        body = await read_body(response)
        if response.status == 200:
            return read_object(body)
    code = code_of(body)
    said = f"{target.url} answers {path.partition('?')[0]} with {response.status}" + (f", {code}" if code else "")
    if response.status in (401, 403):
        said += "; give another --key" if target.key else "; give --key"
    raise Unusable(said)


def header_of(plan: Plan, target: Target, facts: Mapping[str, Any], notes: Sequence[str] = ()) -> Header:
    """The first line of the result of a run that begins now."""
    return Header(
        plan=as_mapping(plan),
        url=target.url,
        target=target.name,
        command=_command(),
        machine=machine(),
        versions=versions(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        warmup_s=plan.warmup_s,
        duration_s=plan.duration_s,
        facts=dict(facts),
        notes=tuple(notes),
    )


def _command() -> str:
    """As it was typed, but for the key."""
    words = list(sys.argv[1:])
    for at, word in enumerate(words):
        if word == "--key" and at + 1 < len(words):
            words[at + 1] = "…"
        elif word.startswith("--key="):
            words[at] = "--key=…"
    return " ".join(["python -m loadtest", *words])


@cache
def machine() -> str:
    """The tester's processor, cores and memory; the server's may be another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {cores} cores, {gib:.0f} GiB"


@cache
def versions() -> Mapping[str, str]:
    """Of what the tester is made of; the commit where it runs from a repository."""
    found = {"python": platform.python_version()}
    for name in ("aiohttp", "uvloop", "rookery"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if commit := _git("rev-parse", "--short", "HEAD"):
        found["commit"] = commit + (" and changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return found


def _git(*words: str) -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
