"""Fine-tune a GPT-2 on texts: huggingtweets' own procedure, as fast as the machine multiplies.

The texts of all epochs, each between ``<|endoftext|>`` tokens, are one stream; it is cut into blocks of the
base's context (1,024 for GPT-2) and seen once, a block a step, under a cosine from 1.372e-4 to zero.
Knows folders, texts and numbers: nothing of archives, jobs or the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor

from serve.engine.device import multiplies_bfloat16
from serve.errors import BadUpload, ModelUnusable, TrainingFailed
from serve.logs import get_logger, ms
from serve.store.disk import write_json
from serve.store.validate import read_shape
from serve.training.checkpoint import Checkpoint, CheckpointWriter, read_checkpoint, read_progress
from serve.training.checkpoint import find_checkpoint as find_checkpoint
from serve.training.evaluate import PREVIEW_MIN_TOKENS, PREVIEW_TOKENS, held_out_loss, preview
from serve.training.gpt2 import GPT2, Base, Dropout, Weights, read_base, write_weights
from serve.training.learner import Learner

log = get_logger()

LEARNING_RATE = 1.372e-4  # huggingtweets', found there by a sweep over many accounts
NUM_EPOCHS = 4
BATCH_SIZE = 1
# A block of GPT-2. Four blocks of 256 at twice the rate of one learn as well, in two thirds of the time: held-out loss
# 2.841, 2.846, 3.826, 3.168 with 132 to 474 steps, against 2.840, 2.851, 3.831, 3.172; but 3.72 against 3.71 with 61,
# 3.96 against 3.91 with 33.
TOKENS_A_STEP = 1024
_MIN_STEPS = 96
_CHARS_A_TOKEN = 4
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_LOSS_SMOOTHING = 0.9
# Of the one text that is written on the way. On two cores GPT-2 writes it in 2 s, and trains for 30 s at the least.
_SAMPLE_TOKENS = 40
_REPORT_EVERY_S = 0.25  # of a device: to read a loss is to wait for it, which a CPU's step does anyway
_VERSION = 1  # of what a checkpoint holds


@dataclass(frozen=True, slots=True)
class FineTuneSpec:
    """What to learn from what. `epochs`: the texts of each pass, in the order in which they are read."""

    base: Path
    epochs: Sequence[Sequence[str]]
    held_out: Sequence[str]
    out: Path
    seed: int
    batch_size: int = BATCH_SIZE
    learning_rate: float = LEARNING_RATE
    num_previews: int = 5
    num_threads: int | None = None  # None: torch's own choice
    work: Path | None = None  # for checkpoints; None: none are written
    resume_from: Path | None = None
    checkpoint_every_s: float = 45.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the products; auto: bf16 where it is the faster
    memory_share: float | None = None  # of a CUDA device, at most; None: what it needs


@dataclass(frozen=True, slots=True)
class Progress:
    """After a step; step 0 is before the first. Losses are nats a token, `train_loss` is smoothed.

    `valid_loss`, of the held-out texts, is told before and after training and at the end of each epoch (as many steps
    as are its share of all); `samples` at the same times but the first, or half-way where there is one epoch alone.
    """

    step: int
    total_steps: int
    train_loss: float | None
    learning_rate: float
    tokens: int
    tokens_per_s: float | None
    seconds_left: float | None
    valid_loss: float | None = None
    valid_loss_before: float | None = None
    samples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FineTuneResult:
    """Losses are mean nats a token; those before and after are of `held_out`, None where it was empty."""

    num_steps: int
    trained_tokens: int
    num_parameters: int
    train_loss: float
    loss_before: float | None
    loss_after: float | None
    previews: tuple[str, ...]
    duration_s: float
    dtype: str
    block_size: int  # tokens a row
    device: str
    bf16: bool  # whether training multiplied in bfloat16
    num_threads: int
    history: tuple[Progress, ...] = field(repr=False)


def suggested_multiplier(base: Path, batch_size: int = 1) -> float:
    """Of the learning rate: what the base's own `training.json` asks for, else 1; times the root of the batch size.

    huggingtweets' rate was found for GPT-2 (124M); a base much smaller needs a larger one.
    """
    try:
        value = json.loads((base / "training.json").read_bytes())["learning_rate_multiplier"]
        multiplier = float(value) if 0 < value <= 100 else 1.0
    except (OSError, ValueError, KeyError, TypeError):
        multiplier = 1.0
    return multiplier * math.sqrt(batch_size)


def suggested_batch_size(base: Path, epochs: Sequence[Sequence[str]]) -> int:
    """Blocks that make as many tokens a step as huggingtweets' one of GPT-2; one where there is little to learn from.

    Raises: ModelUnusable.
    """
    tokens = sum(len(text) // _CHARS_A_TOKEN + 1 for texts in epochs for text in texts)
    return max(1, TOKENS_A_STEP // read_shape(base).n_positions) if tokens >= _MIN_STEPS * TOKENS_A_STEP else 1


class Stopped(Exception):
    """`should_stop` said so; nothing was written that counts."""


Write = Callable[[Path], None]  # writes a servable model folder, like `FineTuneSpec.out`


def finetune(
    spec: FineTuneSpec,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[Progress, Write], None] = lambda progress, write: None,
) -> FineTuneResult:
    """Writes a model folder to `spec.out`, in the base's dtype. The same spec on the same machine: the same bytes.

    `on_epoch` is called at the end of each epoch but the last, and may have the model as it is then written.
    Raises: Stopped; BadUpload when there is no text; ModelUnusable for a broken base; TrainingFailed when the
    loss stops being a number.
    """
    device = _choose_device(spec)
    started = time.monotonic()

    # 1. The base. From here on its folder may go.
    _copy_tokenizer(spec.base, spec.out)
    tokenizer = load_tokenizer(spec.base)
    end_id = end_of_text_id(tokenizer)
    base = read_base(spec.base)
    dtype = _choose_dtype(spec, device)
    dropout = Dropout.from_config(base.config)
    learner = Learner(base.shape, base.weights, device, dtype, dropout, spec.seed)

    # 2. The stream of tokens, and what is held out from it.
    blocks = cut_blocks(spec.epochs, tokenizer, end_id, base.shape.n_positions)
    held_out = encode(tokenizer, spec.held_out)
    prepared = time.monotonic()

    # 3. One pass.
    def write(folder: Path) -> None:
        _copy_tokenizer(spec.out, folder)
        _write_folder(folder, base, learner.weights, end_id)

    judge = _Judge(base, learner, tokenizer, held_out, end_id, spec.seed)
    run = _Run(spec, blocks.to(device), learner, judge)
    run.train(on_progress, should_stop, lambda progress: on_epoch(progress, write))
    trained = time.monotonic()

    # 4. Judge exactly what will be published, and write it.
    if not bool(learner.weights.flat.isfinite().all()):
        raise TrainingFailed("Training made weights that are not numbers; a smaller learning_rate_multiplier may help.")
    loss_after = judge.loss()
    previews = judge.sample(spec.num_previews)
    judged = time.monotonic()
    _write_folder(spec.out, base, learner.weights, end_id)
    log.info(
        "finetune_phases",
        prepare_ms=ms(prepared - started),
        train_ms=ms(trained - prepared),
        judge_ms=ms(judged - trained),
        write_ms=ms(time.monotonic() - judged),
        steps=len(run.history),
    )
    last = run.history[-1]
    assert last.train_loss is not None
    on_progress(replace(last, valid_loss=loss_after, valid_loss_before=run.loss_before, samples=previews))
    return FineTuneResult(
        num_steps=last.total_steps,
        trained_tokens=blocks.numel(),
        num_parameters=base.shape.num_parameters,
        train_loss=last.train_loss,
        loss_before=run.loss_before,
        loss_after=loss_after,
        previews=previews,
        duration_s=time.monotonic() - started,
        dtype=str(base.dtype).removeprefix("torch."),
        block_size=blocks.shape[1],
        device=str(device),
        bf16=dtype == torch.bfloat16,
        num_threads=torch.get_num_threads(),
        history=tuple(run.history),
    )


def _choose_device(spec: FineTuneSpec) -> torch.device:
    if spec.num_threads is not None:
        torch.set_num_threads(spec.num_threads)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if spec.memory_share is not None:
        torch.cuda.set_per_process_memory_fraction(spec.memory_share)
    return torch.device("cuda")


def _choose_dtype(spec: FineTuneSpec, device: torch.device) -> torch.dtype:
    if spec.dtype == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32


# --- Text to tokens ---------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, which takes `<|endoftext|>` inside a text for letters. Raises: ModelUnusable."""
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            pair = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
            pair.add_special_tokens([END_OF_TEXT])
            tokenizer = Tokenizer.from_str(pair.to_str())
    except Exception as exc:  # the library raises plain Exception
        raise ModelUnusable("The base model's tokenizer cannot be read.", param="model") from exc
    tokenizer.encode_special_tokens = True  # somebody's tweet may say it; only we may mean it
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Raises: ModelUnusable when there is no such token."""
    token_id: int | None = tokenizer.token_to_id(END_OF_TEXT)
    if token_id is None:
        raise ModelUnusable(f"The base model's tokenizer has no {END_OF_TEXT} token.", param="model")
    return token_id


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def cut_blocks(epochs: Sequence[Sequence[str]], tokenizer: Tokenizer, end_id: int, block: int) -> Tensor:
    """The stream as ``(N, block)`` ids; what is left over at its end is dropped, unless it is all there is.

    Raises: BadUpload without a single text.
    """
    ids_of = dict.fromkeys(text for texts in epochs for text in texts)
    if not ids_of:
        raise BadUpload("There is no text to learn from.", param="training_file")
    encoded = dict(zip(ids_of, encode(tokenizer, list(ids_of)), strict=True))
    stream = [end_id]
    for texts in epochs:
        for text in texts:
            stream += encoded[text]
            stream.append(end_id)
    block = min(block, len(stream))
    num_blocks = len(stream) // block
    return torch.tensor(stream[: num_blocks * block]).view(num_blocks, block)


# --- Training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Judge:
    """Loss and texts of the model as it would be published now, with weights rounded to the base's dtype."""

    base: Base
    learner: Learner
    tokenizer: Tokenizer
    held_out: Sequence[Sequence[int]]
    end_id: int
    seed: int

    def loss(self) -> float | None:
        return held_out_loss(self._published(), self.held_out, self.end_id)

    def sample(self, num_texts: int, max_tokens: int = PREVIEW_TOKENS) -> tuple[str, ...]:
        texts = preview(self._published(), self.tokenizer, num_texts=num_texts, seed=self.seed, max_tokens=max_tokens)
        return tuple(texts)

    def _published(self) -> GPT2:
        model, weights = self.learner.model, self.learner.weights
        if self.base.dtype in (model.dtype, torch.float32):
            return model  # its copy of the weights has been rounded in just that way
        return GPT2(self.base.shape, weights.like(weights.flat.to(self.base.dtype).to(model.dtype)))


class _Run:
    """The pass over all blocks, in an order drawn from the seed; resumed where a checkpoint left it."""

    def __init__(self, spec: FineTuneSpec, blocks: Tensor, learner: Learner, judge: _Judge) -> None:
        self.history: list[Progress] = []
        self.loss_before: float | None = None
        self._spec, self._blocks, self._learner, self._judge = spec, blocks, learner, judge
        self._num_steps = math.ceil(len(blocks) / spec.batch_size)
        self._order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(spec.seed))
        self._smoothed: float | None = None
        self._step = self._first_step = 0
        self._started = self._reported = time.monotonic()
        self._losses: list[Tensor] = []  # of the steps since the last report
        self._fingerprint = _fingerprint(spec, blocks, learner)
        self._writer = (
            None if spec.work is None else CheckpointWriter(spec.work, spec.checkpoint_every_s, spec.resume_from)
        )

    def train(
        self,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        on_epoch: Callable[[Progress], None],
    ) -> None:
        """Raises: Stopped; TrainingFailed."""
        num_epochs = len(self._spec.epochs)
        epoch_ends = {math.ceil(self._num_steps * k / num_epochs) for k in range(1, num_epochs)}
        sampled_after = epoch_ends or {max(self._num_steps // 2, 1)}
        if not self._resume():
            self.loss_before = self._judge.loss()
            on_progress(Progress(0, self._num_steps, None, self._spec.learning_rate, 0, None, None, self.loss_before))
        self._started = self._reported = time.monotonic()
        while self._step < self._num_steps:
            # 1. Between two steps: perhaps the place to stop, perhaps to write down how far it is.
            stopping = should_stop()
            if self._writer is not None and self._step > self._first_step and (stopping or self._writer.is_due):
                for progress in self._read_losses():
                    on_progress(progress)
                self._write_checkpoint(self._writer)
            if stopping:
                if self._writer is not None:
                    self._writer.wait()
                raise Stopped
            # 2. The step.
            self._take_step()
            # 3. What is to be told of it.
            is_epoch_end = self._step in epoch_ends and self._step < self._num_steps
            if self._step not in (*sampled_after, self._num_steps) and not self._is_due:
                continue
            *before, last = self._read_losses()
            valid_loss = self._judge.loss() if is_epoch_end else None
            samples = self._judge.sample(1, _SAMPLE_TOKENS) if self._step in sampled_after else ()
            self.history[-1] = last = replace(last, valid_loss=valid_loss)
            for progress in (*before, replace(last, samples=samples)):
                on_progress(progress)
            if is_epoch_end:
                on_epoch(last)
        if self._writer is not None:
            self._writer.wait()

    @property
    def _is_due(self) -> bool:
        return self._blocks.device.type == "cpu" or time.monotonic() - self._reported >= _REPORT_EVERY_S

    def _take_step(self) -> None:
        size = self._spec.batch_size
        rows = self._order[self._step * size : (self._step + 1) * size]
        self._losses.append(self._learner.step(self._blocks[rows], self._learning_rate(self._step)))
        self._step += 1

    def _learning_rate(self, step: int) -> float:
        return self._spec.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self._num_steps))

    def _read_losses(self) -> list[Progress]:
        """What there is to tell of the steps since the last time; added to `history`. Raises: TrainingFailed."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()
        self._reported = time.monotonic()
        a_step_s = max(self._reported - self._started, 1e-9) / max(self._step - self._first_step, 1)
        tokens_a_step = self._blocks.shape[1] * self._spec.batch_size
        for step, loss in enumerate(losses, self._step - len(losses) + 1):
            if not math.isfinite(loss):
                raise TrainingFailed(
                    f"The loss stopped being a number at step {step}; a smaller learning_rate_multiplier may help.",
                    param="learning_rate_multiplier",
                )
            old = self._smoothed
            self._smoothed = loss if old is None else _LOSS_SMOOTHING * old + (1 - _LOSS_SMOOTHING) * loss
            progress = Progress(
                step=step,
                total_steps=self._num_steps,
                train_loss=round(self._smoothed, 6),
                learning_rate=self._learning_rate(step),
                tokens=min(step * tokens_a_step, self._blocks.numel()),
                tokens_per_s=round(tokens_a_step / a_step_s, 1),
                seconds_left=round((self._num_steps - step) * a_step_s, 1),
            )
            self.history.append(progress)
        return self.history[len(self.history) - len(losses) :]

    # --- Checkpoints ------------------------------------------------------------------------------------------

    def _write_checkpoint(self, writer: CheckpointWriter) -> None:
        progress = {
            "fingerprint": self._fingerprint,
            "loss_before": self.loss_before,
            "smoothed": self._smoothed,
            "history": [asdict(progress) for progress in self.history],
        }
        writer.write(self._step, Checkpoint(self._learner.state(), progress))

    def _resume(self) -> bool:
        """Whether there was something to go on from."""
        if self._spec.resume_from is None:
            return False
        found = read_checkpoint(self._spec.resume_from, self._fingerprint)
        if found is None:
            return False
        self._learner.load_state(found.state)
        self.loss_before, self._smoothed = found.progress["loss_before"], found.progress["smoothed"]
        self.history = [Progress(**{**row, "samples": tuple(row["samples"])}) for row in found.progress["history"]]
        self._step = self._first_step = self.history[-1].step
        return True


def count_learnt(checkpoint: Path) -> int:
    """The tokens of all steps before it; 0 where it is damaged."""
    history = read_progress(checkpoint).get("history")
    return int(history[-1]["tokens"]) if history else 0


def _fingerprint(spec: FineTuneSpec, blocks: Tensor, learner: Learner) -> str:
    """Of all that a checkpoint must agree with to be gone on from."""
    digest = hashlib.sha256(json.dumps([_VERSION, spec.seed, spec.batch_size, spec.learning_rate]).encode())
    digest.update(f"{learner.model.dtype} {learner.weights.flat.numel()} {tuple(blocks.shape)}".encode())
    digest.update(blocks.cpu().numpy().tobytes())
    return digest.hexdigest()


# --- The folder -------------------------------------------------------------------------------------------


def _copy_tokenizer(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(source / name, out / name)


def _write_folder(folder: Path, base: Base, weights: Weights, end_id: int) -> None:
    write_weights(folder, base, weights)
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": end_id,
            "do_sample": True,
            "eos_token_id": end_id,
            "max_length": min(PREVIEW_TOKENS, base.shape.n_positions),
            "min_length": PREVIEW_MIN_TOKENS,
            "temperature": 1.0,
            "top_p": 0.95,
        },
    )
