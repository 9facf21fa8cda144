"""Models that go while they are in use, find no memory, give NaN, or hang; and engines that stop."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import torch
from safetensors.torch import load_file, save_file

from serve.engine.engine import EngineConfig
from serve.engine.sequence import Sequence as Text
from serve.store.revisions import Store
from serve.types import SamplingParams
from tests.deployments.conftest import wait_until
from tests.engine.harness import Collected, Harness, read_tensors
from tests.fakes.models import write_tiny_gpt2
from tests.faults.hanging import hanging
from tests.faults.hold import busiest_thread, held
from tests.faults.live import MODELS, Flock, flock
from tests.faults.row import Measured, row
from tests.faults.traffic import Outcome, Traffic, differing, make_asks, undisturbed

_LEFT_BYTES = 16 << 20  # of address space; weights have 20 MB
WEIGHTS = "model.safetensors"
GENERATOR = "ray::ServeReplica:rookery:generator"


@row(
    "F16",
    did="DELETE of a model that 8 clients read, 20 times; another replaced 20 times",
    expected="404 at once, no 5xx, out of memory in 5 s; the new revision answers at once",
    minutes=4,
)
def gone_in_use(folder: Path, share: float) -> Measured:
    times = max(2, round(20 * share))
    with flock(folder / "data") as live:
        found = [delete_and_replace(live, number) for number in range(times)]
    outcomes = [outcome for gone in found for outcome in gone.outcomes]
    broken = sum(one.status >= 500 or one.is_lost for one in outcomes)
    after = sum(gone.num_after for gone in found)
    gone_s, old_s = max(gone.gone_s for gone in found), max(gone.old_s for gone in found)
    return Measured(
        f"{broken} of {len(outcomes):,} 5xx or lost; {after} answers after the deletion; out of memory after "
        f"{gone_s:.1f} s at most, a replaced revision after {old_s:.1f} s, {times} times each",
        broken == after == 0 and gone_s <= 5 and old_s <= 10,
        {"ends": dict(Counter(f"{one.ended} {one.status} {one.error}" for one in outcomes))},
    )


@row(
    "F17",
    did="RLIMIT_AS of both generators 16 MB above what they have: 6 models find no memory; 1 is over the budget",
    expected="503 with Retry-After, warm models unaffected, loaded when the limit is gone; too large: 422",
    minutes=2,
)
def no_memory(folder: Path, share: float) -> Measured:
    del share
    cold = [f"flock/cold{number}" for number in range(6)]
    with flock(folder / "data", ROOKERY_MEMORY_BYTES="120000000") as live:
        for number, model in enumerate(cold):
            publish(live, model, seed=100 + number)
        write_tiny_gpt2(folder / "large", n_layer=8, n_embd=640, n_head=8)
        Store(live.service.data, embedded={}).import_folder(folder / "large", "flock/large")
        asks = make_asks(MODELS[:2], 32)
        with Traffic(live.url, asks, unary=4, streams=2) as traffic:
            traffic.wait_for(32)
            with without_memory(live.pids_of(GENERATOR)):
                short = [ask_status(live, model) for model in cold for _ in range(2)]
                traffic.wait_for(len(traffic.outcomes) + 32)
            again = [ask_status(live, model) for model in cold]
            large = ask_status(live, "flock/large")
        verdict = traffic.verdict()
    return Measured(
        f"{short.count('503 out_of_memory')} of {len(short)} got 503 with Retry-After, {short.count('200')} memory; "
        f"{verdict.lost} of {verdict.requests} warm ones lost; afterwards {again.count('200')} of 6 load; "
        f"too large: {large}",
        set(short) <= {"200", "503 out_of_memory"}
        and "503 out_of_memory" in short
        and again == ["200"] * 6
        and verdict.lost == verdict.refused == 0
        and large == "422 model_too_large",
        {"short": dict(Counter(short)), **asdict(verdict)},
    )


@row(
    "F18",
    did="texts of a model that gives NaN in the batch of 3 others, 1,000 runs",
    expected="it fails alone; the others' log-probabilities are the same bits as beside a sound one",
    minutes=3,
)
def not_finite(folder: Path, share: float) -> Measured:
    runs = max(10, round(1000 * share))
    harness = Harness(folder, 4, EngineConfig(budget_bytes=16 << 20))
    tensors = read_tensors(harness.folders[3])
    broken = harness.engine.load(harness.layout, tensors | {"ln_f.bias": torch.full_like(tensors["ln_f.bias"], 3e38)})
    different = failed = 0
    for run in range(runs):
        sound = together(harness, harness.slots[3].index, run)
        beside = together(harness, broken.index, run)
        different += [one.tokens for one in sound[1:]] != [one.tokens for one in beside[1:]]
        last = beside[0].last
        failed += last is not None and last.error is not None and last.error.code == "generation_failed"
    harness.engine.close()
    return Measured(
        f"{failed} of {runs:,} failed, the others' numbers differ in {different}",
        failed == runs and different == 0,
    )


@row(
    "F18b",
    did="a model whose sums overflow, published and asked for 10 times on a live service",
    expected="an error each for 3 texts, then 422; all others as ever; a new revision answers",
    minutes=1,
)
def quarantined(folder: Path, share: float) -> Measured:
    del share
    model = "flock/overflows"
    with flock(folder / "data", generators=1) as live:
        source = write_tiny_gpt2(folder / "overflows", seed=7)
        tensors = load_file(source / WEIGHTS)
        tensors["transformer.ln_f.bias"] = torch.full_like(tensors["transformer.ln_f.bias"], 3e38)
        save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
        Store(live.service.data, embedded={}).import_folder(source, model)
        asks = make_asks(MODELS, 16)
        with Traffic(live.url, asks, unary=2, streams=2) as traffic:
            traffic.wait_for(8)
            said = [ask_status(live, model) for _ in range(10)]
            traffic.wait_for(len(traffic.outcomes) + 8)
        gone = not residents(live, model)
        publish(live, model, seed=8)
        renewed = ask_status(live, model)
        verdict, counted = traffic.verdict(), live.count("rookery_model_quarantines_total")
        num_other = len(differing(traffic.outcomes, undisturbed(live.url, asks)))
    return Measured(
        f"{', '.join(f'{count} times {what}' for what, count in Counter(said).items())}; a new revision: {renewed}; "
        f"{verdict.lost} of {verdict.requests} others lost, {num_other} differ",
        said == ["500 generation_failed"] * 3 + ["422 model_unusable"] * 7
        and gone
        and renewed == "200"
        and counted == 1
        and verdict.lost == verdict.refused == num_other == 0,
        asdict(verdict),
    )


@row(
    "F19",
    did="the engine's thread of 1 of 2 generators held by ptrace, in 6 streams and 2 requests at a time",
    expected="replaced within 45 s, 0 lost",
    minutes=2,
    needs="root",
)
def engine_stops(folder: Path, share: float) -> Measured:
    del share
    with flock(folder / "data") as live:
        with Traffic(live.url, make_asks(MODELS, 64, num_tokens=(60, 120)), unary=2, streams=6) as traffic:
            traffic.wait_for(16)
            pid = min(live.pids_of(GENERATOR))
            with held(busiest_thread(pid)):
                began = time.monotonic()
                wait_until(lambda: pid not in live.pids_of(GENERATOR), 90)
            live.wait_until_whole()
            replaced_s = time.monotonic() - began
        verdict = traffic.verdict()
    return Measured(
        f"replaced after {replaced_s:.0f} s; {verdict.lost} of {verdict.requests} lost, {verdict.streams_told} told, "
        f"the slowest took {verdict.slowest_s:.0f} s",
        replaced_s <= 45 and verdict.lost == verdict.raw_500 == 0,
        asdict(verdict),
    )


@row(
    "F20",
    did="a disk (FUSE) that stops to answer: weights of 10 models at once, of 2 more after the first MB",
    expected="503 or 504 within 120 s + 5 s, others unaffected, 0 leaked slots; they load when the files are back",
    minutes=5,
    needs="root",
)
def load_hangs(folder: Path, share: float) -> Measured:
    limit_s = max(6.0, 120 * share)
    models = [f"flock/hangs{number}" for number in range(12)]
    with flock(folder / "data", generators=1, ROOKERY_LEASE_TIMEOUT_S=str(limit_s)) as live:
        for number, model in enumerate(models):
            publish(live, model, seed=100 + number)
        files = [(live.service.data / "models" / model / "main" / WEIGHTS).resolve() for model in models]
        readable = {path: 1 << 20 if number >= 10 else 0 for number, path in enumerate(files)}
        with Traffic(live.url, make_asks(MODELS, 32), unary=2, streams=2) as traffic, hanging(readable):
            traffic.wait_for(8)
            first, first_s = ask_all(live, models)
            again, again_s = ask_all(live, models)
        healed, _ = ask_all(live, models)
        wait_until(lambda: not replica(live)["waiting"], 30)
        state, verdict = replica(live), traffic.verdict()
    leaked = state["used_bytes"] - sum(one["bytes"] for one in state["residents"])
    return Measured(
        f"{', '.join(sorted(set(first + again)))} after {first_s:.1f} s at most (limit {limit_s:g} s), asked again "
        f"{again_s:.1f} s; {verdict.lost} of {verdict.requests} others lost; afterwards {healed.count('200')} load, "
        f"{leaked} bytes leaked",
        all(one.startswith(("503", "504")) for one in first + again)
        and max(first_s, again_s) <= limit_s + 5
        and healed == ["200"] * len(models)
        and leaked == 0
        and verdict.lost == verdict.refused == 0,
        asdict(verdict),
    )


@dataclass(frozen=True, slots=True)
class Gone:
    """What came of one deletion and one replacement under load."""

    outcomes: list[Outcome]
    num_after: int  # answers by the deleted model to requests that began after the deletion was confirmed
    gone_s: float  # from then until it was in no replica's memory
    old_s: float  # from the replacement until the old revision of the other model was in none


def delete_and_replace(live: Flock, number: int) -> Gone:
    doomed, other = f"flock/gone{number}", f"flock/new{number}"
    for model in (doomed, other):
        publish(live, model, seed=100 + number)
    asks = make_asks([doomed, other], 16, num_tokens=(20, 60), seed=number)
    with Traffic(live.url, asks, unary=4, streams=4, pause_s=0.01) as traffic:
        traffic.wait_for(16)
        assert httpx.delete(f"{live.url}/v1/models/{doomed}", timeout=60).status_code == 200
        deleted = time.monotonic()
        wait_until(lambda: not residents(live, doomed), 30)
        gone_s = time.monotonic() - deleted
        old = residents(live, other)
        publish(live, other, seed=500 + number)
        replaced = time.monotonic()
        wait_until(lambda: not residents(live, other) & old, 30)
        old_s = time.monotonic() - replaced
        traffic.wait_for(len(traffic.outcomes) + 16)
    late = [one for one in traffic.outcomes if one.ask.model == doomed and one.began_s > deleted]
    return Gone(traffic.outcomes, sum(one.status == 200 for one in late), gone_s, old_s)


# --- Doing ------------------------------------------------------------------------------------------------------


def publish(live: Flock, model: str, *, seed: int) -> None:
    """A model as large as those of the flock; once more: a new revision."""
    folder = live.service.data.parent / f"publish-{seed}"
    write_tiny_gpt2(folder, seed=seed, n_layer=6, n_embd=256, n_head=4, n_positions=512)
    Store(live.service.data, embedded={}).import_folder(folder, model)
    shutil.rmtree(folder)


def together(harness: Harness, first: int, seed: int) -> list[Collected]:
    """Texts by the model in the slot `first` and by models 0 to 2, in the same steps.

    That of the first has one token, as much as a model that gives NaN comes to: the steps are then of one shape.
    """
    slots = [first, *(slot.index for slot in harness.slots[:3])]
    texts = [
        Text(
            slot=slot,
            prompt_ids=[1 + seed % 300, 2, 3],
            params=SamplingParams(max_new_tokens=1 if slot == first else 6, ignore_eos=True),
            vocabulary=harness.vocabulary,
            seed=seed,
            top_logprobs=2,
        )
        for slot in slots
    ]
    found = [harness.collected.setdefault(text, Collected()) for text in texts]
    harness.engine.submit(harness.slots[0], texts)  # in one call, so that they begin together
    harness.wait(found)
    return found


@contextmanager
def without_memory(pids: Sequence[int]) -> Iterator[None]:
    """Their address space may grow by less than a model needs: it is refused, what Ray itself needs is not."""
    processes = [psutil.Process(pid) for pid in pids]
    unlimited = [process.rlimit(psutil.RLIMIT_AS) for process in processes]
    for process, (_, hard) in zip(processes, unlimited, strict=True):
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + _LEFT_BYTES, hard))
    try:
        yield
    finally:
        for process, limits in zip(processes, unlimited, strict=True):
            with suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_AS, limits)


# --- Asking -----------------------------------------------------------------------------------------------------


def ask_status(live: Flock, model: str) -> str:
    """ "200", or the status and the code of the error; "503 lacks Retry-After" where it does."""
    body = {"model": model, "prompt": "I think", "max_tokens": 4}
    reply = httpx.post(f"{live.url}/v1/completions", json=body, timeout=180)
    if reply.status_code == 200:
        return "200"
    if reply.status_code == 503 and "retry-after" not in reply.headers:
        return "503 lacks Retry-After"
    return f"{reply.status_code} {reply.json()['error']['code']}"


def ask_all(live: Flock, models: Sequence[str]) -> tuple[list[str], float]:
    """At once; and how long the slowest took, in seconds."""

    def ask(model: str) -> tuple[str, float]:
        began = time.monotonic()
        return ask_status(live, model), time.monotonic() - began

    with ThreadPoolExecutor(len(models)) as threads:
        found = list(threads.map(ask, models))
    return [status for status, _ in found], max(took_s for _, took_s in found)


def residents(live: Flock, model: str) -> set[tuple[str, str]]:
    """Replica and revision of each place where it is in memory."""
    found = httpx.get(f"{live.url}/v1/residents", timeout=30).json()["data"]
    return {(one["replica"], one["revision"]) for one in found if one["model"] == model}


def replica(live: Flock) -> dict[str, Any]:
    """The only one."""
    (found,) = httpx.get(f"{live.url}/v1/replicas", timeout=30).json()["data"]
    return dict(found)
