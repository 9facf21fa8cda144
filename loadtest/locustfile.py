"""Plays a plan with Locust, for those who have it: the same requests at the same times.

    pip install 'rookery[locust]'
    locust -f loadtest/locustfile.py --headless --plan steady --capacity 20 --fit 8 --host http://127.0.0.1:8000

One user plays the whole plan, whatever `--users` says, and starts a greenlet for each request when it is due: open
loop, as `python -m loadtest run` does it. Times are Locust's, from the sending on. Streams count to their end, and the
time to their first token is an entry of its own, TTFT. With `--processes` or workers, each would play all: use one.
"""
# Locust is there only for those who want it, and gevent has no types.
# mypy: disable-error-code="import-not-found,import-untyped,misc,untyped-decorator,no-any-return"

from __future__ import annotations

from locust import FastHttpUser, events, task  # first: it patches what the others import

# isort: split
import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group

from loadtest.client.target import Target
from loadtest.client.wire import Answer, question
from loadtest.traffic.changing import override, resolve
from loadtest.traffic.plan import BadPlan, Call, Plan
from loadtest.traffic.reading import read_plan
from loadtest.traffic.schedule import schedule


@events.init_command_line_parser.add_listener
def add_options(parser: argparse.ArgumentParser, **_: Any) -> None:
    """Each option can be an environment variable too: LOCUST_PLAN and so on."""
    # Not of the group, which does not know what is not to be shown.
    parser.add_argument("--key", default="", env_var="ROOKERY_API_KEY", include_in_web_ui=False, help="The API key.")
    options = parser.add_argument_group("Plan")
    options.add_argument("--plan", default="smoke", env_var="LOCUST_PLAN", help="The name of a plan, or a TOML file.")
    options.add_argument("--models", default="", help="Their ids, with commas between; else all that the server lists.")
    options.add_argument("--rate-scale", type=float, default=1.0, help="Times the rates of the plan.")
    options.add_argument("--duration", type=float, help="Seconds, instead of the plan's.")
    options.add_argument("--seed", type=int, help="Instead of the plan's.")
    options.add_argument("--capacity", type=float, help="Requests a second of which the plan's rates are multiples.")
    options.add_argument("--fit", type=int, help="Models of which the plan's counts are multiples.")
    options.add_argument("--calls", type=Path, help="Write what became of each call: a JSON line each.")


class Readers(FastHttpUser):
    """All who read, as one user: Locust's users wait for their answers, and arrivals must not."""

    fixed_count = 1
    concurrency = 100_000  # connections
    max_retries = 0
    network_timeout = connection_timeout = 3600.0  # the plan's timeout ends a request

    @task
    def play(self) -> None:
        """Sends every call when it is due, waits for the last answer and ends the run."""
        try:
            plan, model_ids = self._plan(), self._model_ids()
            calls = schedule(plan, model_ids)
        except BadPlan as exc:
            print(f"locustfile: {exc}", file=sys.stderr)  # noqa: T201
            self.environment.process_exit_code = 2
            self.environment.runner.quit()
            return
        self._requests = {flow.name: flow.requests for flow in plan.flows}
        self._keys = {flow.name: flow.key or self._key for flow in plan.flows}
        self._timeout_s = plan.timeout_s
        self._lines: list[dict[str, Any]] = []
        asking, started = Group(), time.perf_counter()
        for call in calls:
            gevent.sleep(max(0.0, call.at_s - (time.perf_counter() - started)))
            asking.spawn(self._ask, call)
        asking.join()
        self._write_calls()
        self.environment.runner.quit()

    def _plan(self) -> Plan:
        options = self.environment.parsed_options
        plan = read_plan(options.plan)
        plan = override(plan, rate_scale=options.rate_scale, duration_s=options.duration, seed=options.seed)
        return resolve(plan, capacity_rps=options.capacity, models_that_fit=options.fit)

    @property
    def _key(self) -> str:
        return str(self.environment.parsed_options.key)

    def _model_ids(self) -> list[str]:
        if named := self.environment.parsed_options.models:
            return [model_id.strip() for model_id in named.split(",")]
        ids: list[str] = []
        while True:
            after = f"&after={ids[-1]}" if ids else ""
            path = f"/v1/models?limit=1000{after}"
            answer = self.client.get(path, name="/v1/models", headers=_headers(self._key))
            if answer.status_code != 200:
                raise BadPlan(f"{self.host} answers /v1/models with {answer.status_code}; is there a --key?")
            page = answer.json()
            ids += [model["id"] for model in page["data"]]
            if not page.get("has_more"):
                return ids

    def _ask(self, call: Call) -> None:
        stays_s = self._timeout_s if call.leaves_after_s is None else min(call.leaves_after_s, self._timeout_s)
        line: dict[str, Any] = {"number": call.number, "ok": False}
        self._lines.append(line)
        with gevent.Timeout(stays_s, False):
            self._exchange(call, line)

    def _exchange(self, call: Call, line: dict[str, Any]) -> None:
        asked = self._requests[call.flow]
        path, body = question(call, asked, Target(self.host or ""))
        headers = {"Content-Type": "application/json"} | _headers(self._keys[call.flow])
        answer, sent = Answer(asked.api), time.perf_counter()
        with self.client.post(
            path, data=body.decode(), headers=headers, name=call.flow, catch_response=True, stream=call.is_streaming
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            if call.is_streaming:
                line["ttft_ms"] = self._read_along(response, answer, call.flow, sent)
                # Until now it was the time to the head of the answer.
                response.request_meta["response_time"] = (time.perf_counter() - sent) * 1000
            else:
                answer.read_whole(response.content)
            line["ok"] = answer.is_complete and not answer.error
            line |= {"took_ms": response.request_meta["response_time"], "tokens": answer.output_tokens}
            if not line["ok"]:
                response.failure(answer.error or "cut")

    def _read_along(self, response: Any, answer: Answer, flow: str, sent: float) -> float | None:
        first_ms: float | None = None
        while event := response.stream.readline(b"\n\n"):
            if answer.feed(bytes(event)) and first_ms is None:
                first_ms = (time.perf_counter() - sent) * 1000
                self.environment.events.request.fire(
                    request_type="TTFT",
                    name=flow,
                    response_time=first_ms,
                    response_length=0,
                    exception=None,
                    context={},
                )
        return first_ms

    def _write_calls(self) -> None:
        if path := self.environment.parsed_options.calls:
            path.write_text("".join(json.dumps(line) + "\n" for line in self._lines), encoding="utf-8")


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
