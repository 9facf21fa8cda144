"""The simulator against a real service: the same calls, over HTTP to two replicas and replayed with fitted costs.

    python -m loadtest.capacity.validate

Writes random models, more of them than fit, starts `deployments.up` with two generators, calibrates, then plays an
open-loop plan at each of a few parts of what was calibrated. Prints real beside simulated, and in the end one line of
JSON. Both sides warm up with the same requests, which replace whatever was in memory before; only what comes after
counts. The page cache holds all files, so no model comes from disk. It takes six minutes, in which the machine must do
nothing else: `drift` tells whether it did.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.capacity.calibrate import Prober, calibrate
from loadtest.capacity.costs import PRESETS, Costs
from loadtest.capacity.figures import records
from loadtest.capacity.simulate import Cluster, simulate
from loadtest.capacity.workload import of_records
from loadtest.client.facts import look_at, machine
from loadtest.client.run import run_plan
from loadtest.client.target import Target
from loadtest.models import NAMESPACE, write_linked_models
from loadtest.results.record import Run
from loadtest.results.summary import Summary, summarize
from loadtest.server import free_port
from loadtest.traffic.plan import Arrivals, Flow, Lengths, Models, Plan, Requests

NUM_REPLICAS = 2
SHAPE = {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 256}  # 30 million parameters, 60 MB in bfloat16
COMPARED = ("p50_itl_ms", "p50_ttft_ms", "p90_ttft_ms", "p50_ms", "p90_ms", "tokens_s", "hit_rate", "cold_share")
RARE = ("p99_ttft_ms", "p99_ms")  # where there are enough requests
ENOUGH_FOR_P99 = 1000  # ten are slower then
WITHIN = 0.15
WARMUP_S = 15.0  # several times as many requests as there are models


@contextmanager
def service(data: Path, *, slots: int) -> Iterator[str]:
    """Two generators over `data`, each with room for about so many models; yields the URL."""
    port = free_port()
    model_bytes = next(data.glob("models/*/*/model.safetensors")).stat().st_size
    environ = os.environ | {
        "ROOKERY_DATA": str(data),
        "ROOKERY_HUB_ENABLED": "0",
        "ROOKERY_DTYPE": "bfloat16",
        "ROOKERY_MEMORY_BYTES": str(int(model_bytes * (slots + 0.9))),
    }
    command = [sys.executable, "-m", "deployments.up", "--port", str(port), "--generators", str(NUM_REPLICAS)]
    with (data / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            line = next((line for line in server.stdout if line.startswith("ready ")), None)
            if line is None:
                raise SystemExit("the service did not start: " + (data / "server.log").read_text()[-2000:])
            yield line.split()[1]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


def write_models(data: Path, count: int) -> list[str]:
    """Random models, each with a file of its own: what is read of one does not bring another into the page cache."""
    names = write_linked_models(data, count, shape=SHAPE)
    for name in names[1:]:
        file = data / "models" / name / "model.safetensors"
        own = file.with_suffix(".own")
        shutil.copy(file, own)  # with its mode: only a published file is mapped
        own.replace(file)
    return names


def plan_of(rate: float, num_models: int, duration_s: float) -> Plan:
    """Zipf over more models than fit, texts as long as tweets."""
    arrivals = Arrivals(process="poisson", rate=rate)
    flow = Flow("steady", arrivals, Models(count=num_models, exponent=1.0), Requests())
    return Plan("validation", "", (flow,), duration_s=duration_s, warmup_s=WARMUP_S)


def first_look(num_models: int) -> Plan:
    """Each model once: a process that has not seen a file yet takes twice as long to load it as ever after."""
    arrivals = Arrivals(process="closed", clients=4)
    asked = Requests(output_tokens=Lengths(like_tweets=False, least=1, most=1))
    flow = Flow("first", arrivals, Models(count=num_models, popularity="distinct"), asked)
    return Plan("first look", "", (flow,), duration_s=num_models * 0.2, warmup_s=0.0)


def replay(run: Run, costs: Costs) -> Run:
    """The calls of a real run, those of its warm-up too; the models asked most often are in memory before."""
    outcome = simulate(of_records(run.records), Cluster(costs, NUM_REPLICAS, is_warm=True))
    return Run(run.header, tuple(records(outcome)))


def compare(real: Summary, simulated: Summary) -> dict[str, dict[str, float | None]]:
    """Each figure of both, and by what part of the real one the simulator is off."""
    found: dict[str, dict[str, float | None]] = {}
    for name in COMPARED + (RARE if real.requests >= ENOUGH_FOR_P99 else ()):
        ours, theirs = getattr(simulated, name), getattr(real, name)
        found[name] = {"real": theirs, "simulated": ours, "off": None}
        if ours is not None and theirs:
            found[name]["off"] = ours / theirs - 1
    return found


def worst(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each figure the error that is furthest from 0, in any run."""
    found: dict[str, float] = {}
    for run in runs:
        for name, values in run["figures"].items():
            if values["off"] is not None and abs(values["off"]) >= abs(found.get(name, 0.0)):
                found[name] = values["off"]
    return found


async def validate(
    url: str, names: Sequence[str], loads: Sequence[float], duration_s: float, console: Console
) -> dict[str, Any]:
    """Calibrates, then plays and replays a plan at each of `loads`, as parts of what the costs say can be done."""
    await run_plan(first_look(len(names)), Target(url), models=names)
    costs = await calibrate(url, [f"{NAMESPACE}/*"], like=PRESETS["cpu"])
    console.print(f"Costs: {costs.source}.", soft_wrap=True)
    rate = capacity(costs) * NUM_REPLICAS
    found: dict[str, Any] = {"machine": machine(), "costs": json.loads(costs.to_json()), "runs": []}
    for load in loads:
        run = await run_plan(plan_of(load * rate, len(names), duration_s), Target(url), models=names)
        real, simulated = summarize(run), summarize(replay(run, costs))
        found["runs"].append(
            {
                "load": load,
                "rate": load * rate,
                "requests": real.requests,
                "refused": real.refused,
                "errors": real.errors,
                "drift": await drift(url, costs),
                "figures": compare(real, simulated),
            }
        )
        show(found["runs"][-1], console)
    drifts = [run["drift"] for run in found["runs"]]
    return found | {"worst": worst(found["runs"]), "drift": max(drifts, key=lambda ratio: abs(math.log(ratio)))}


async def drift(url: str, costs: Costs) -> float:
    """How many times as long as the costs say a step takes now: far from 1, the machine is not what was calibrated."""
    target = Target(url)
    prober = Prober(target, await look_at(target, patterns=[f"{NAMESPACE}/*"], is_fit_needed=False), probe_s=2.0)
    probe = await prober.probe(4, 1, range(prober.num_replicas))
    return probe.step_s / costs.step.slowed_s(probe.num_models, round(probe.num_rows), float(prober.num_replicas > 1))


def capacity(costs: Costs, tokens: float = 35.0) -> float:
    """Requests a second of one replica with a text of each of four models in every step: a figure to scale by."""
    return 4 / costs.step.slowed_s(4, 4, 1.0) / tokens


def show(run: Mapping[str, Any], console: Console) -> None:
    """Real beside simulated."""
    table = Table(
        title=f"{run['rate']:.1f} requests a second ({run['load']:g} of capacity), {run['requests']} requests"
    )
    for heading in ("", "real", "simulated", "off"):
        table.add_column(heading, justify="right")
    for name, values in run["figures"].items():
        off = values["off"]
        within = "" if off is None else f"{off:+.1%}" + ("" if abs(off) <= WITHIN else " !")
        table.add_row(name, *(_shown(values[side]) for side in ("real", "simulated")), within)
    console.print(table)
    console.print(f"After this run a step took {run['drift']:.2f} times as long as was calibrated.")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3f}" if value < 2 else f"{value:,.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Tables to stderr, one line of JSON to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--slots", type=int, default=10, help="of each replica")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.4, 0.8])
    parser.add_argument("--duration-s", type=float, default=50.0)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service and its folder do not outlive this
    with tempfile.TemporaryDirectory(prefix="rookery-validate-") as folder:
        data = Path(folder)
        names = write_models(data, arguments.models)
        with service(data, slots=arguments.slots) as url:
            found = asyncio.run(validate(url, names, arguments.loads, arguments.duration_s, Console(stderr=True)))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
