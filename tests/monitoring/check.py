"""Dashboards and rules against a live service and a real Prometheus: `make metrics-check`.

    python -m tests.monitoring.check [--seconds 100] [--dump FILE] [--picture FILE.png] [--no-overhead]

Starts `rookery up` with more models than fit, a Hub, a Prometheus with our rules; makes traffic of every kind; then
asks what every panel and every rule asks. After that the same service with and without metrics and logs, by turns.
What is done goes to stderr. Ends with one JSON line, and status 0 if every panel and rule has data, the exposition is
as it should be and promtool is content; 2 where there is no Prometheus.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.deployments.conftest import start_service, stop_service
from tests.fakes.hub import fake_hub
from tests.monitoring import exposition, overhead
from tests.monitoring.picture import draw
from tests.monitoring.prometheus import NoPrometheus, Prometheus, Series, running_prometheus
from tests.monitoring.queries import RULE_TESTS, RULES, RUNBOOK, Panel, fill, read_panels, read_rules, selectors
from tests.monitoring.traffic import (
    BASE,
    HUB_BYTES,
    KEY,
    LEASE_TIMEOUT_S,
    MEMORY_BYTES,
    PROMPT,
    Traffic,
    add_hub_models,
    write_models,
)

SECONDS = 80.0
RATE_INTERVAL_S = 8  # Grafana takes four scrapes at least
SCRAPE_S = 2
STEP_S = 2.0
OVERHEAD_LIMIT_PERCENT = 2.0
MOST_SERIES = 3000  # of one node: some forty routes with a histogram of fifteen series each are the most of it

Figures = dict[str, Any]


class Check:
    """The questions, and what came of them."""

    def __init__(self, prometheus: Prometheus, started: float) -> None:
        self._prometheus = prometheus
        self._started, self._ended = started, time.time()
        self.panels = read_panels()
        self.answers: dict[str, list[list[Series]]] = {}
        self.dumped: list[Figures] = []

    def ask_panels(self) -> Figures:
        """Each query of each panel, over the whole run."""
        silent: list[str] = []
        for panel in self.panels:
            self.answers[panel.name] = [self._ask(panel, query) for query in panel.queries]
            if not all(map(_has_numbers, self.answers[panel.name])):
                silent.append(panel.name)
        return {
            "panels": len(self.panels),
            "panels_with_data": len(self.panels) - len(silent),
            "panels_without_data": silent,
        }

    def ask_rules(self) -> Figures:
        """What each rule records; alerts say nothing while all is well, so whether what they look at is there."""
        rules = read_rules()
        seen = {rule["name"]: rule for rule in self._prometheus.rules()}
        ill = {name: rule["lastError"] for name, rule in seen.items() if rule["health"] != "ok"}
        recorded = [rule for rule in rules if not rule.is_alert]
        alerts = [rule for rule in rules if rule.is_alert]
        empty = [
            rule.name for rule in recorded if not any(one.has_numbers for one in self._range(rule.name, rule.name))
        ]
        looked_at = {one.text for rule in alerts for one in selectors(rule.query)}
        return {
            "rules": len(rules),
            "rules_ill": ill,
            "recorded": len(recorded),
            "recorded_with_data": len(recorded) - len(empty),
            "recorded_without_data": empty,
            "alerts": len(alerts),
            "alert_series_never_seen": sorted(text for text in looked_at if not self._range("alerts", text)),
            "alerts_that_fired": sorted(
                {one.labels["alertname"] for one in self._range("alerts", 'ALERTS{alertstate="firing"}')}
            ),
        }

    def _ask(self, panel: Panel, query: str) -> list[Series]:
        range_s = max(RATE_INTERVAL_S, round(self._ended - self._started))
        return self._range(panel.name, fill(query, interval_s=RATE_INTERVAL_S, range_s=range_s))

    def _range(self, asker: str, query: str) -> list[Series]:
        found = self._prometheus.query_range(query, self._started, self._ended, STEP_S)
        last = [{"labels": one.labels, "points": len(one.points), "last": one.points[-1][1]} for one in found]
        self.dumped.append({"asker": asker, "query": query, "series": last})
        return found


def check_live(folder: Path, seconds: float, dump: Path | None, picture: Path | None) -> Figures:
    """A service under traffic, and what Prometheus knows of it."""
    with fake_hub() as hub:
        models = write_models(folder / "data", folder)
        add_hub_models(hub, folder)
        settings = {
            "ROOKERY_MEMORY_BYTES": str(MEMORY_BYTES),
            "ROOKERY_HUB_ENABLED": "true",
            "ROOKERY_HUB_ENDPOINT": hub.endpoint,
            "ROOKERY_HUB_BYTES": str(HUB_BYTES),
            "ROOKERY_LEASE_TIMEOUT_S": str(LEASE_TIMEOUT_S),
            "ROOKERY_API_KEYS": KEY,
            "ROOKERY_ANONYMOUS_REQUESTS_PER_S": "1",  # who sends no key comes more often
            "ROOKERY_LOG_FILE": str(folder / "service.log"),
        }
        service = start_service(folder / "data", **settings)
        try:
            target = service.url.removeprefix("http://")
            with running_prometheus(folder / "prometheus", [target], KEY, every_s=SCRAPE_S) as prometheus:
                started = time.time()
                asyncio.run(Traffic(service.url, hub, models).run(seconds, _say))
                time.sleep(2 * SCRAPE_S + 2)  # the last scrape, and the rules after it
                check = Check(prometheus, started)
                figures = check.ask_panels() | check.ask_rules()
                figures["scrape_errors"] = [one["lastError"] for one in prometheus.targets() if one["lastError"]]
            figures |= check_runbook(service.url)
            figures |= check_exposition(service.url, [*models, BASE, "huggingtweets", "barney", KEY, PROMPT])
        finally:
            stop_service(service)
    if dump:
        dump.write_text("".join(json.dumps(one) + "\n" for one in check.dumped))
    if picture:
        draw(check.panels, check.answers, picture)
    return figures


def check_exposition(url: str, secrets: Sequence[str]) -> Figures:
    text = exposition.scrape(url, KEY)
    families = exposition.series_of(text)
    return {
        "openmetrics_ok": True,
        "series": families.total(),
        "largest_families": dict(families.most_common(3)),
        "exposition_bytes": len(text.encode()),
        "labels_that_tell": exposition.leaks(text, secrets),
    }


def check_runbook(url: str) -> Figures:
    """Its commands that ask the service, each as it stands, behind those that it begins with."""
    beginning, *blocks = re.findall(r"^```\n(.*?)^```$", RUNBOOK.read_text(encoding="utf-8"), re.M | re.S)
    beginning += f"ROOKERY_URL={url} ROOKERY_API_KEY={KEY}\n"
    asking = [block for block in blocks if "$ROOKERY_URL" in block]
    failed = [block for block in asking if not _runs(beginning + block)]
    return {"runbook_commands": len(asking), "runbook_commands_failed": failed}


def _runs(script: str) -> bool:
    done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, check=False, timeout=60)
    return done.returncode == 0 and bool(done.stdout)


def check_rules() -> Figures:
    """What promtool says of the rules and of their tests."""
    if shutil.which("promtool") is None:
        return {"promtool_ok": None}
    commands = (["promtool", "check", "rules", str(RULES)], ["promtool", "test", "rules", str(RULE_TESTS)])
    done = [subprocess.run(command, capture_output=True, text=True, check=False) for command in commands]
    for one in done:
        if one.returncode:
            _say(one.stdout + one.stderr)
    return {"promtool_ok": all(one.returncode == 0 for one in done)}


def _has_numbers(found: Sequence[Series]) -> bool:
    return any(one.has_numbers for one in found)


def _is_well(figures: Mapping[str, Any]) -> bool:
    kept = (
        figures["panels_with_data"] == figures["panels"],
        figures["recorded_with_data"] == figures["recorded"],
        not figures["rules_ill"],
        not figures["labels_that_tell"],
        not figures["scrape_errors"],
        not figures["runbook_commands_failed"],
        figures["series"] <= MOST_SERIES,
        figures["promtool_ok"] is not False,
        figures.get("overhead_interval_percent", [0.0])[0] <= OVERHEAD_LIMIT_PERCENT,
        figures.get("overhead_direct_percent", 0.0) <= OVERHEAD_LIMIT_PERCENT,
    )
    return all(kept)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of traffic; models from the Hub stay for 62")
    parser.add_argument("--dump", type=Path, help="every query and what came of it, a JSON line each")
    parser.add_argument("--picture", type=Path, help="every panel, as PNG")
    parser.add_argument("--blocks", type=int, default=20, help="of four rounds, to measure the overhead")
    parser.add_argument("--no-overhead", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through all that cleans up
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="rookery-metrics-") as scratch:
        try:
            _say(f"{arguments.seconds:g} s of traffic ...")
            figures |= check_live(Path(scratch), arguments.seconds, arguments.dump, arguments.picture)
        except NoPrometheus as exc:
            _say(str(exc))
            sys.exit(2)
        for name in figures["panels_without_data"]:
            _say(f"no data: {name}")
        figures |= check_rules()
        if not arguments.no_overhead:
            _say("with and without metrics and logs ...")
            (work := Path(scratch) / "overhead").mkdir()
            measured = overhead.measure(work, arguments.blocks, _say)
            figures |= measured.as_figures()
    first = ("panels", "panels_with_data", "alerts", "promtool_ok", "overhead_percent")
    print(json.dumps({name: figures.get(name) for name in first} | figures))
    sys.exit(not _is_well(figures))


if __name__ == "__main__":
    main()
