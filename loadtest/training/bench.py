"""Our fine-tuning against transformers' Trainer with huggingtweets' settings: same texts, base, machine and minutes.

    python -m loadtest.training.bench [--tweets FOLDER] [--handles a,b] [--rounds N] [--threads N]

FOLDER holds one archive a person, called by the handle; without it the archives that come with the project are used.
Each training is a process of its own. In a round the contenders take turns on each person, with a tenth of the texts
held out; the next round has another seed. Trainer computes in float32, as huggingtweets did on a CPU, and again in
bf16, which is all that can be done for it without changing it. The base is the embedded one, and then a random GPT-2 of
the small shape (124M parameters, 1,024 tokens) for some steps.

speedup_vs_trainer_*    tokens a second of the training alone, without import, loading and writing: median of the ratios
process_speedup_*       the same of whole processes, from start to the model's folder
valid_loss_*            nats a token on held-out texts, in float32 by the same code: mean; `..._sd` is their spread over
                        seeds (the standard deviation within a person, in the mean)
limit_tokens_s          what the machine's fastest bf16 matrix product, measured between the turns, would allow if all
                        else cost nothing; limit_share: how much of it is reached
bots_per_hour           whole jobs, one after another, each as the service runs it: archive, queue, process, publication
bots_per_hour_two       of two at a time, one thread each

Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from loadtest.models import write_random_gpt2
from loadtest.training.bots import Person, list_archives, read_person
from serve.database.connection import Database
from serve.engine.device import num_cores
from serve.shape import GPT2Shape
from serve.store.revisions import Store
from serve.store.validate import read_shape
from serve.training.dataset import build_dataset, epoch_texts
from serve.training.evaluate import held_out_loss
from serve.training.finetune import (
    LEARNING_RATE,
    NUM_EPOCHS,
    cut_blocks,
    encode,
    end_of_text_id,
    load_tokenizer,
    suggested_batch_size,
    suggested_multiplier,
)
from serve.training.gpt2 import GPT2, read_base
from serve.training.jobs.options import RunOptions
from serve.training.jobs.store import JobStore
from serve.training.jobs.supervisor import Supervisor
from serve.types import JobRequest, JobStatus, TrainingFile

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "serve" / "store" / "embedded" / "fledgling"
BASE_ID = "rookery/fledgling"
ARCHIVES = ROOT / "deployments" / "archives"
CONTENDERS = {"ours": "loadtest.training.ours", "bf16": "loadtest.peers.trainer", "fp32": "loadtest.peers.trainer"}
NAMES = {"ours": "rookery", "bf16": "Trainer bf16", "fp32": "Trainer float32"}
# OpenMP's threads otherwise spin while they wait, which costs everybody dear where cores are shared.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class Case:
    """What all contenders are to do once."""

    name: str
    base: Path
    epochs: Sequence[Sequence[str]]
    held_out: Sequence[str]
    seed: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One contender's training of one case."""

    case: str
    contender: str
    round: int
    tokens_s: float
    process_s: float
    valid_loss: float | None


# --- One training ---------------------------------------------------------------------------------------------


def take_turn(case: Case, contender: str, number: int, folder: Path, *, skip_steps: int = 0) -> Turn:
    """Trains in a process of its own. `skip_steps`: the first, which are not counted."""
    blocks = _blocks(case)
    np.save(folder / "blocks.npy", blocks)
    is_ours = contender == "ours"
    batch_size = suggested_batch_size(case.base, case.epochs) if is_ours else 1
    out = folder / "out"
    work = {
        "base": str(case.base),
        "out": str(out),
        "seed": case.seed,
        "num_threads": case.num_threads,
        "batch_size": batch_size,
        "learning_rate": LEARNING_RATE * suggested_multiplier(case.base, batch_size),
        **({"epochs": case.epochs} if is_ours else {"blocks": str(folder / "blocks.npy"), "bf16": contender == "bf16"}),
    }
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", CONTENDERS[contender], str(folder / "work.json")],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        check=True,
    )
    process_s = time.perf_counter() - started
    ends: list[float] = json.loads(done.stdout.splitlines()[-1])
    first = ends[skip_steps - 1] if skip_steps else 0.0
    tokens = blocks.size - skip_steps * batch_size * blocks.shape[1]
    loss = judge(out, case) if case.held_out else None
    shutil.rmtree(out)
    return Turn(case.name, contender, number, tokens / (ends[-1] - first), process_s, loss)


def _blocks(case: Case) -> np.ndarray[Any, Any]:
    tokenizer = load_tokenizer(case.base)
    length = read_shape(case.base).n_positions
    blocks: np.ndarray[Any, Any] = cut_blocks(case.epochs, tokenizer, end_of_text_id(tokenizer), length).numpy()
    return blocks


def judge(folder: Path, case: Case) -> float | None:
    """Nats a token, in float32, whoever made the model."""
    shutil.copyfile(case.base / "tokenizer.json", folder / "tokenizer.json")  # which Trainer leaves out
    base, tokenizer = read_base(folder), load_tokenizer(folder)
    return held_out_loss(GPT2(base.shape, base.weights), encode(tokenizer, case.held_out), end_of_text_id(tokenizer))


# --- Rounds ---------------------------------------------------------------------------------------------------


def make_case(person: Person, seed: int, num_threads: int) -> Case:
    dataset = build_dataset({person.handle: person.kept}, seed=seed)
    epochs = [epoch_texts(dataset, seed, epoch) for epoch in range(NUM_EPOCHS)]
    return Case(person.handle, BASE, epochs, dataset.held_out, seed, num_threads)


def _read(handle: str, archive: Path, limit: int | None) -> Person:
    person = read_person(handle, archive)
    return replace(person, kept=person.kept[:limit])


def small_shape_case(folder: Path, num_steps: int, num_threads: int) -> Case:
    """A random GPT-2 small and `num_steps` blocks of random bytes, a token each."""
    write_random_gpt2(folder, seed=0)
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz "), (num_steps * 1024) // 128 * 127)
    texts = ["".join(letters[start : start + 127]) for start in range(0, len(letters), 127)]
    return Case("GPT-2 small", folder, [texts], [], 0, num_threads)


def ratios(turns: Sequence[Turn], peer: str, value: Callable[[Turn], float]) -> list[float]:
    """Ours over theirs, one of each round and case."""
    found = {(turn.case, turn.round, turn.contender): value(turn) for turn in turns}
    return [found[case, number, "ours"] / found[case, number, peer]
            for case, number, contender in found if contender == "ours" and (case, number, peer) in found]  # fmt: skip


def mean_loss(turns: Sequence[Turn], contender: str) -> float | None:
    losses = [turn.valid_loss for turn in turns if turn.contender == contender and turn.valid_loss is not None]
    return statistics.fmean(losses) if losses else None


def loss_spread(turns: Sequence[Turn]) -> float | None:
    """Standard deviation over seeds of one contender's loss on one person's texts, of all such the mean."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for turn in turns:
        if turn.valid_loss is not None:
            groups[turn.case, turn.contender].append(turn.valid_loss)
    spreads = [statistics.stdev(losses) for losses in groups.values() if len(losses) > 1]
    return statistics.fmean(spreads) if spreads else None


# --- The limit ------------------------------------------------------------------------------------------------


def flops_a_token(shape: GPT2Shape) -> float:
    """Of forward and backward: 6 for each parameter of a matrix, and the causal half of attention's products."""
    matrices = sum(
        size[0] * size[1]
        for name, size in shape.tensor_shapes().items()
        if len(size) == 2 and name not in ("wte.weight", "wpe.weight")  # lm_head is counted, tied or not
    )
    return 6.0 * matrices + 6.0 * shape.n_layer * shape.n_embd * shape.n_positions


def product_flops_s(num_threads: int, duration_s: float = 0.5) -> float:
    """The best rate of a 1,024 x 768 by 768 x 3,072 product in bf16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    left, right = torch.randn(1024, 768).bfloat16(), torch.randn(768, 3072).bfloat16()
    best, ends = float("inf"), time.perf_counter() + duration_s
    while (started := time.perf_counter()) < ends:
        left @ right
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(threads)
    return 2.0 * 1024 * 768 * 3072 / best


# --- Whole jobs -----------------------------------------------------------------------------------------------


def bots_per_hour(archives: Sequence[tuple[str, Path]], at_once: int, num_threads: int) -> float:
    """Jobs from the archive to the published model, by as many supervisors as train at once."""
    with tempfile.TemporaryDirectory() as root:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the supervisors' children
        options = RunOptions(
            database_url=f"sqlite:///{root}/rookery.db",
            data_dir=Path(root),
            embedded={BASE_ID: BASE},
            num_threads=num_threads,
        )
        database = Database(options.database_url)
        store = Store(options.data_dir, embedded=options.embedded)
        jobs = JobStore(database, options.uploads, check_base=store.resolve)
        ids = [_create_job(jobs, handle, archive, Path(root)) for handle, archive in archives]
        started = time.perf_counter()
        asyncio.run(_work_off(options, at_once))
        elapsed = time.perf_counter() - started
        found = [jobs.get_job(job_id).status for job_id in ids]
        database.close()
    assert set(found) == {JobStatus.SUCCEEDED}, f"not all of the benchmark's jobs succeeded: {found}"
    return 3600 * len(ids) / elapsed


def _create_job(jobs: JobStore, handle: str, archive: Path, root: Path) -> str:
    upload = root / archive.name
    shutil.copyfile(archive, upload)
    file = jobs.create_file(upload, archive.name, "fine-tune")
    return jobs.create_job(JobRequest(base_model=BASE_ID, files=(TrainingFile(file.id, handle),), seed=0)).id


async def _work_off(options: RunOptions, at_once: int) -> None:
    supervisors = [Supervisor(options, worker=f"bench-{i}") for i in range(at_once)]

    async def work(supervisor: Supervisor) -> None:
        while await supervisor.run_one():
            pass
        supervisor.close()

    await asyncio.gather(*map(work, supervisors))


# --- The run --------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, out: Console) -> dict[str, float | None]:
    archives = list_archives(args.tweets or ARCHIVES)
    handles = args.handles.split(",") if args.handles else _choose(archives)
    turns: list[Turn] = []
    small: list[Turn] = []
    products: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for number in range(args.rounds):
            for handle in handles:
                case = make_case(_read(handle, archives[handle], args.limit), number, args.threads)
                for contender in _in_turn(number):
                    products.append(product_flops_s(args.threads))
                    turns.append(take_turn(case, contender, number, folder))
                    out.print(_describe(turns[-1]))
        if args.steps:
            case = small_shape_case(folder / "small", args.steps, args.threads)
            for number in range(args.rounds):
                for contender in _in_turn(number):
                    small.append(take_turn(case, contender, number, folder, skip_steps=1))
                    out.print(_describe(small[-1]))
    out.print(table(turns + small))
    ours = statistics.median(turn.tokens_s for turn in turns if turn.contender == "ours")
    limit = max(products) / flops_a_token(read_shape(BASE))
    queue = [(handle, archives[handle]) for handle in handles] * args.jobs
    return {
        "speedup_vs_trainer_cpu": statistics.median(ratios(turns, "fp32", lambda turn: turn.tokens_s)),
        "speedup_vs_trainer_bf16": statistics.median(ratios(turns, "bf16", lambda turn: turn.tokens_s)),
        "process_speedup_cpu": statistics.median(ratios(turns, "fp32", lambda turn: 1 / turn.process_s)),
        "process_speedup_bf16": statistics.median(ratios(turns, "bf16", lambda turn: 1 / turn.process_s)),
        "valid_loss_ours": mean_loss(turns, "ours"),
        "valid_loss_trainer": mean_loss(turns, "fp32"),
        "valid_loss_trainer_bf16": mean_loss(turns, "bf16"),
        "valid_loss_sd": loss_spread(turns),
        "tokens_s": ours,
        "limit_tokens_s": limit,
        "limit_share": ours / limit,
        "gpt2_small_speedup": statistics.median(ratios(small, "fp32", lambda turn: turn.tokens_s)) if small else None,
        "gpt2_small_speedup_bf16": statistics.median(ratios(small, "bf16", lambda turn: turn.tokens_s))
        if small
        else None,
        "bots_per_hour": bots_per_hour(queue, 1, args.threads) if queue else None,
        "bots_per_hour_two": bots_per_hour(queue, 2, 1) if queue else None,
    }


def _choose(archives: Mapping[str, Path]) -> list[str]:
    """Three, evenly placed by the size of their archives."""
    ranked = sorted(archives, key=lambda handle: (archives[handle].stat().st_size, handle))
    return [ranked[round(i * (len(ranked) - 1) / 4)] for i in (1, 2, 3)] if len(ranked) > 3 else ranked


def _in_turn(number: int) -> list[str]:
    """Another one begins each round."""
    names = list(CONTENDERS)
    return names[number % 3 :] + names[: number % 3]


def _describe(turn: Turn) -> str:
    loss = "" if turn.valid_loss is None else f", held-out loss {turn.valid_loss:.4f}"
    who = f"round {turn.round} {turn.case} {NAMES[turn.contender]}"
    return f"{who}: {turn.tokens_s:,.0f} tokens/s, {turn.process_s:.1f} s{loss}"


def table(turns: Sequence[Turn]) -> Table:
    found = Table("texts of", "contender", "tokens/s (least to most)", "process, s", "held-out loss")
    groups: dict[tuple[str, str], list[Turn]] = defaultdict(list)
    for turn in turns:
        groups[turn.case, turn.contender].append(turn)
    for (case, contender), some in groups.items():
        rates, losses = [turn.tokens_s for turn in some], [t.valid_loss for t in some if t.valid_loss is not None]
        found.add_row(
            case,
            NAMES[contender],
            f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
            f"{statistics.median(turn.process_s for turn in some):.1f}",
            f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})" if losses else "",
        )
    return found


def environment() -> dict[str, str]:
    """Machine, versions and command."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "machine": f"{cpu}, {num_cores()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
        "command": "python -m loadtest.training.bench " + " ".join(sys.argv[1:]),
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tweets", type=Path, help="a folder of archives, called by their handles")
    parser.add_argument("--handles", help="whose, separated by commas; three where nothing is said")
    parser.add_argument("--limit", type=int, help="only so many texts of each, the archive's first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of GPT-2 small, the first not counted; 0: none")
    parser.add_argument("--jobs", type=int, default=2, help="whole jobs for each handle; 0: none")
    parser.add_argument("--threads", type=int, default=num_cores())
    return parser.parse_args(arguments)


def main() -> None:
    args, out = parse_arguments(), Console(width=130)
    for name, text in environment().items():
        out.print(f"{name}: {text}", soft_wrap=True)
    values = measure(args, out)
    print(json.dumps({key: None if value is None else float(f"{value:.5g}") for key, value in values.items()}))  # noqa: T201


if __name__ == "__main__":
    main()
