"""Changes model folders at random and looks whether anything but the truth is ever served of them.

    python -m tests.faults.mutate_weights --cases 10000 --seed 0 --json

Each case takes the product's own way from a folder to an engine, in a process of its own: copied, converted behind the
converter's walls, checked, read by the loader; a share also generates a token. What is refused is refused. What is
loaded is compared with what others read from the same folder: safetensors' and PyTorch's own readers, all values; and
transformers, the probability of the token that was generated. Ends with one JSON line.

wrong_loads              loaded, though another reader sees other values, names or shapes, or values that are not
                         finite, or a second conversion gives other bytes
wrong_loads_known_sha256 loaded, though the sha256 of its weights is known, as a Hub tells it, and is another
crashes                  a signal, or an exception that is none of ours; `reader_crashes`: of the throw-away process,
                         which a refusal follows
pickle_ran               payloads in pickles that did their harm
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import load_file

from serve.engine.engine import Engine, EngineConfig
from serve.engine.sequence import Output, Sequence
from serve.errors import GenerationFailed, RookeryError
from serve.loader import EngineLoader, Facts
from serve.shape import canonical_name
from serve.store import convert
from serve.store.model_files import WEIGHT_FILES, copy_model
from serve.store.revisions import Store
from serve.store.validate import WEIGHTS, check_finite, check_folder
from serve.types import SamplingParams
from tests.faults.converter_forks import fork_converter, run_forked
from tests.faults.mutations import Files, mutate, originals

CASE_TIMEOUT_S = 120.0
ENGINE_SHARE = 5  # one in so many of those that load
TOLERANCE = 2e-3  # of a log-probability, float32 in two programs
_MAX_LOGIT = 1e3  # beyond, float32 itself differs by more


def run(cases: int, seed: int, on_progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Runs cases 0 to `cases` - 1 in as many processes as there are cores. The figures, and the `failures`."""
    started = time.monotonic()
    count: Counter[str] = Counter()
    failures = []
    for done, result in enumerate(_results(cases, seed), start=1):
        count[result["outcome"]] += 1
        count.update(key for key in ("known", "pickle_ran", "reader_crash", "in_engine") if result[key])
        if result["outcome"] in ("crash", "wrong") or result["pickle_ran"]:
            failures.append(result)
        on_progress(done)
    return {
        "mutations": count["refused"] + count["loaded"] + count["crash"] + count["wrong"],
        "refused": count["refused"],
        "loaded": count["loaded"],
        "crashes": count["crash"],
        "wrong_loads": count["wrong"],
        "wrong_loads_known_sha256": count["known"],
        "pickle_ran": count["pickle_ran"],
        "reader_crashes": count["reader_crash"],
        "in_engine": count["in_engine"],
        "seconds": round(time.monotonic() - started, 1),
        "failures": failures,
    }


def _results(cases: int, seed: int) -> Iterator[dict[str, Any]]:
    num_workers = max(1, min(os.cpu_count() or 1, cases))
    # One thread each: a process with more cannot be forked safely.
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | alone | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    receiver, sender = os.pipe()  # one for all: lines this short are written whole
    with tempfile.TemporaryDirectory(prefix="rookery-mutations-") as scratch:
        workers = []
        for number in range(num_workers):
            command = [sys.executable, "-m", "tests.faults.mutate_weights", "--cases", str(cases), "--seed", str(seed)]
            command += [
                "--worker",
                str(Path(scratch) / str(number)),
                "--first",
                str(number),
                "--step",
                str(num_workers),
            ]
            workers.append(subprocess.Popen(command, stdout=sender, env=environment))
        os.close(sender)
        try:
            with os.fdopen(receiver, "rb") as lines:
                yield from map(json.loads, lines)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


# --- In a worker ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A changed folder and its unchanged files. What it makes lies beside it, in `scratch`."""

    number: int
    scratch: Path
    original: Files

    @property
    def folder(self) -> Path:
        return self.scratch / "model"

    @property
    def report(self) -> Path:
        return self.scratch / "report.json"

    @property
    def harm(self) -> Path:
        return self.scratch / "harm"


def work(scratch: Path, seed: int, numbers: range) -> None:
    """Prints a line for each case."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    convert.run_apart = _note_signals
    folders = originals()
    for number in numbers:
        rng = random.Random(f"{seed}:{number}")
        kind = rng.choice(list(folders))
        case = Case(number, scratch / str(number), folders[kind])
        case.folder.mkdir(parents=True)
        changed, what = mutate(case.original, rng, case.harm)
        for name, content in changed.items():
            (case.folder / name).write_bytes(content)
        result = _attempt(case) | {"case": number, "what": f"{kind}: {what}", "pickle_ran": case.harm.exists()}
        result["why"] = result["why"][-1000:]
        os.write(1, json.dumps(result).encode() + b"\n")
        shutil.rmtree(case.scratch, ignore_errors=True)


def _attempt(case: Case) -> dict[str, Any]:
    status = run_forked(lambda: _report(case), CASE_TIMEOUT_S)
    result: dict[str, Any] = {"outcome": "crash", "why": f"status {status}", "in_engine": False, "known": False}
    if status == 0:
        result |= json.loads(case.report.read_bytes())
    return result | {"reader_crash": (case.scratch / "signal").exists()}


def _note_signals(arguments: list[str], report: IO[bytes], timeout_s: float) -> int:
    status = fork_converter(arguments, report, timeout_s)
    if status < 0:
        Path(arguments[0]).parent.with_name("signal").touch()
    return status


def _report(case: Case) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    staged = case.scratch / "staged"
    staged.mkdir()
    try:
        result = _outcome(case, staged)
    except BaseException:
        result = {"outcome": "crash", "why": traceback.format_exc()}
    case.report.write_text(json.dumps(result))
    return 0


def _outcome(case: Case, staged: Path) -> dict[str, Any]:
    try:
        copy_model(case.folder, staged)
        check_folder(staged)
        check_finite(staged)
        (staged / WEIGHTS).chmod(0o444)  # as published; it is then mapped
        engine = ModelReader(staged) if case.number % ENGINE_SHARE == 0 else None
        facts = engine.facts() if engine else ModelReader.facts_of(staged)
        read = facts.weights.read()
        generated = engine.generate(facts) if engine else None
    except RookeryError as exc:
        return {"outcome": "refused", "why": exc.message}
    wrong = _is_wrong(case, staged, read) or (_differs(case.folder, *generated) if generated else None)
    known = _has_known_sha256(case)
    return {"outcome": "wrong" if wrong else "loaded", "why": wrong or "", "in_engine": bool(generated)} | {
        "known": known and _weights_changed(case)
    }


class ModelReader:
    """The product's loader, and an engine behind it."""

    def __init__(self, folder: Path) -> None:
        self._outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._engine = Engine(EngineConfig(budget_bytes=64 << 20), on_outputs=self._take)
        self._loader = EngineLoader(cast(Store, _OneFolder(folder)), self._engine)

    @staticmethod
    def facts_of(folder: Path) -> Facts:
        """Without an engine."""
        return EngineLoader(cast(Store, _OneFolder(folder)), cast(Engine, None)).facts("model")

    def facts(self) -> Facts:
        return self._loader.facts("model")

    def generate(self, facts: Facts) -> tuple[list[int], int, float]:
        """The most probable token after a prompt, and its log-probability."""
        slot = self._loader.load(self._loader.prepare("model"))
        prompt = [token % facts.shape.vocab_size for token in (5, 80, 300, 7)]
        params = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)
        sequence = Sequence(slot=slot.index, prompt_ids=prompt, params=params, vocabulary=facts.vocabulary)
        self._engine.submit(slot, [sequence])
        output = self._outputs.get(timeout=60)
        self._engine.close()
        if output.token is None or output.token.logprob is None:
            raise GenerationFailed(str(output.error or "no token"))
        return prompt, output.token.id, output.token.logprob

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._outputs.put(output)


@dataclass(frozen=True, slots=True)
class _OneFolder:
    """A store with one model."""

    path: Path

    def resolve(self, key: str) -> _OneFolder:
        return self


# --- What others read of the same files ----------------------------------------------------------------------


def _is_wrong(case: Case, staged: Path, read: Mapping[str, torch.Tensor]) -> str | None:
    expected = _read_by_others(case.folder)
    published = {name: tensor for name, tensor in load_file(staged / WEIGHTS).items() if canonical_name(name)}
    if extra := [name for name in expected if name not in published and name != "lm_head.weight"]:
        return f"lacks {extra}"
    for name, tensor in published.items():
        if name not in expected or not _same(tensor, expected[name]):
            return f"{name} differs"
        if not _same(tensor, read[canonical_name(name) or ""]):
            return f"{name} is loaded otherwise"
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    if "lm_head.weight" in expected and "lm_head.weight" not in published:
        embedding = next(tensor for name, tensor in expected.items() if canonical_name(name) == "wte.weight")
        if not _same(expected["lm_head.weight"], embedding):
            return "lacks its output layer"
    return _misshapen(staged, read) or _converts_otherwise(case, staged)


def _read_by_others(folder: Path) -> dict[str, torch.Tensor]:
    """By safetensors' and PyTorch's own readers, buffers left out."""
    source = next(folder / name for name in WEIGHT_FILES if (folder / name).is_file())
    files = [source]
    if source.suffix == ".json":
        files = [folder / name for name in sorted(set(json.loads(source.read_bytes())["weight_map"].values()))]
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    state = {name: tensor for name, tensor in state.items() if canonical_name(name)}
    return {name: tensor.float() if tensor.dtype == torch.float64 else tensor for name, tensor in state.items()}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit, so that -0.0 is not 0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in (one, other)))


def _misshapen(staged: Path, read: Mapping[str, torch.Tensor]) -> str | None:
    config = json.loads((staged / "config.json").read_bytes())
    width, layers = config.get("n_embd", 768), {name.split(".")[1] for name in read if name.startswith("h.")}
    shapes = {"wte.weight": (config.get("vocab_size", 50257), width), "h.0.attn.c_attn.weight": (width, 3 * width)}
    shapes["wpe.weight"] = (config.get("n_positions", 1024), width)
    if len(layers) != config.get("n_layer", 12) or any(tuple(read[name].shape) != shapes[name] for name in shapes):
        return "has other shapes than config.json says"
    return None


def _converts_otherwise(case: Case, staged: Path) -> str | None:
    again = case.scratch / "again"
    again.mkdir()
    copy_model(case.folder, again)
    digests = {hashlib.sha256((folder / WEIGHTS).read_bytes()).digest() for folder in (staged, again)}
    return "becomes another file when it is converted again" if len(digests) > 1 else None


@torch.inference_mode()
def _differs(folder: Path, prompt: list[int], token: int, logprob: float) -> str | None:
    """Whether transformers gives the token another probability; None where it reads nothing, or nothing sensible."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    except Exception:
        return None
    if not logits.isfinite().all() or logits.abs().max() > _MAX_LOGIT:
        return None
    theirs = float(logits.log_softmax(-1)[token])
    return f"transformers says {theirs}, not {logprob}" if abs(theirs - logprob) > TOLERANCE else None


def _has_known_sha256(case: Case) -> bool:
    """Whether each file is what a Hub that has the original would say it is."""
    return all(
        hashlib.sha256((case.folder / name).read_bytes()).digest() == hashlib.sha256(content).digest()
        for name, content in case.original.items()
    )


def _weights_changed(case: Case) -> bool:
    return any((case.folder / name).read_bytes() != content for name, content in case.original.items())


# --- Command -------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    for name in ("--worker", "--first", "--step"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker), args.seed, range(int(args.first), args.cases, int(args.step)))
        return 0
    figures = run(args.cases, args.seed, lambda done: None if args.json else _show(done, args.cases))
    failures = figures.pop("failures")
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    print(json.dumps(figures))
    complete = figures["mutations"] == args.cases
    return 0 if complete and not any(figures[key] for key in ("crashes", "wrong_loads", "pickle_ran")) else 1


def _show(done: int, cases: int) -> None:
    if done % 100 == 0 or done == cases:
        print(f"\r{done} of {cases}", end="\n" if done == cases else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
