"""Who asks while a cluster is upgraded and broken: `python -m loadtest`, and the `openai` client as it comes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from loadtest.results.files import read
from loadtest.results.record import STOPPED, Record
from tests.k8s.pods import ROOT, Pod

_LEAD_S = 8.0  # until the load test has begun, and all is warm


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did to the requests that were asked meanwhile."""

    requests: int
    failed: int
    detail: dict[str, Any] = field(default_factory=dict)


SLOW = {"n_layer": 6, "n_embd": 256, "n_head": 4}  # some 5 ms a token: its streams are there when something dies
_PLAN = """
about = "Short texts and long ones, while pods come and go."
duration_s = 600
warmup_s = 0
timeout_s = 60

[[flow]]
name = "readers"
[flow.arrivals]
rate = 3
[flow.models]
count = 1
[flow.requests]
streaming = 0.5
choices = { 1 = 0.8, 3 = 0.2 }
output_tokens = [8, 40]

[[flow]]
name = "long streams"
[flow.arrivals]
rate = 0.3
[flow.models]
first = 1
count = 1
[flow.requests]
streaming = 1
output_tokens = [150, 300]

[[flow]]
name = "leavers"
[flow.arrivals]
process = "constant"
rate = 0.2
[flow.models]
count = 1
[flow.requests]
output_tokens = 200
cancelled = 1
patience_s = 0.01
"""
_HANGS_S = 30.0  # a request of which nothing has come for so long when the load is stopped


class Load:
    """`python -m loadtest` in the client's pod, from `with` to its end."""

    def __init__(self, folder: Path, client: Pod, url: str, plan: str | None = None) -> None:
        self._out = folder / f"load-{time.monotonic_ns()}.jsonl"
        if plan is None:
            (folder / "plan.toml").write_text(_PLAN)
        what = [
            "run",
            plan or str(folder / "plan.toml"),
            "--url",
            url,
            "--models",
            "fledgling,bench/m00000",
        ]
        with (folder / "load.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["nsenter", "--target", str(client.pid), "--net", sys.executable, "-m", "loadtest", *what]
                + ["--json", "--out", self._out],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = 120.0) -> Load:
        """Until the plan has ended by itself."""
        self._process.wait(timeout_s)
        return self

    def records(self) -> list[Record]:
        """Those that have ended, or hang."""
        return [one for one in read(self._out).records if one.error != STOPPED or _silent_s(one) > _HANGS_S]

    def outcome(self, **detail: Any) -> Outcome:
        """Whatever is neither an answer nor a reader who left as planned has failed, a refusal too."""
        records = self.records()
        failed = [one for one in records if one.outcome not in ("ok", "cancelled")]
        kinds = Counter(f"{one.outcome} {one.status} {one.error}" for one in failed)
        slowest = max((one.took_s for one in records if one.outcome == "ok"), default=0.0)
        return Outcome(len(records), len(failed), {"slowest_s": round(slowest, 2), "kinds": dict(kinds), **detail})

    def __enter__(self) -> Load:
        time.sleep(_LEAD_S)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(30)


def _silent_s(record: Record) -> float:
    """How long before its end its last piece came."""
    return record.ended_s - (record.at_s if record.first_s is None else record.first_s + sum(record.gaps_s))


class OpenaiLoad:
    """The `openai` client as it comes: it asks again, twice, where an answer has not begun."""

    _EVERY_S = 0.5

    def __init__(self, client: Pod, url: str) -> None:
        self._url, self._is_over = f"{url}/v1", False
        self._failed = Counter[str]()
        self._count = 0
        self._done = client.begin(lambda: asyncio.run(self._play()))

    def outcome(self) -> Outcome:
        self._is_over = True
        self._done.result(120)
        return Outcome(self._count, self._failed.total(), {"kinds": dict(self._failed)})

    async def _play(self) -> None:
        client = AsyncOpenAI(base_url=self._url, api_key="none", max_retries=2, timeout=60)
        async with client, asyncio.TaskGroup() as group:
            while not self._is_over:
                self._count += 1
                group.create_task(self._ask(client, is_streaming=self._count % 2 == 0))
                await asyncio.sleep(self._EVERY_S)

    async def _ask(self, client: AsyncOpenAI, *, is_streaming: bool) -> None:
        kind = "stream" if is_streaming else "whole"
        asked: dict[str, Any] = {"model": "bench/m00000", "prompt": "I think", "max_tokens": 150}
        try:
            if is_streaming:
                kind = "not begun"
                async for chunk in await client.completions.create(stream=True, **asked):
                    kind = "broken off" if chunk else kind
            else:
                await client.completions.create(**asked)
        except Exception as exc:
            self._failed[f"{kind}: {type(exc).__name__}"] += 1
