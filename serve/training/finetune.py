"""Fine-tune a GPT-2 on texts: huggingtweets' own procedure, through transformers' Trainer.

The texts of all epochs, each between ``<|endoftext|>`` tokens, are one stream; it is cut into blocks of the
base's context (1,024 for GPT-2) and seen once, a block a step, under a cosine from 1.372e-4 to zero.
Knows folders, texts and numbers: nothing of archives, jobs or the store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from transformers import (
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from serve.engine.device import multiplies_bfloat16
from serve.errors import BadUpload, ModelUnusable, TrainingFailed
from serve.training.evaluate import held_out_loss, preview

logger = logging.getLogger(__name__)

LEARNING_RATE = 1.372e-4  # huggingtweets', found there by a sweep over many accounts
NUM_EPOCHS = 4
BATCH_SIZE = 1
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
# Of the one text that is written half-way. On two cores GPT-2 writes it in 2 s, and trains for 30 s at the least.
_SAMPLE_TOKENS = 40
_CHECKPOINT_MAX_SHARE = 0.05  # of the time goes into checkpoints, at most
_COMPLETE = "COMPLETE"  # written into a checkpoint's folder when all else is there


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


@dataclass(frozen=True, slots=True)
class Progress:
    """After a step; step 0 is before the first. Losses are nats a token, `train_loss` is smoothed.

    `valid_loss`, of the held-out texts, is told before and after training; `samples` half-way and after.
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


def suggested_multiplier(base: Path) -> float:
    """Of the learning rate: what the base's own `training.json` asks for, else 1.

    huggingtweets' rate was found for GPT-2 (124M); a base much smaller needs a larger one.
    """
    try:
        value = json.loads((base / "training.json").read_bytes())["learning_rate_multiplier"]
        return float(value) if 0 < value <= 100 else 1.0
    except (OSError, ValueError, KeyError, TypeError):
        return 1.0


class Stopped(Exception):
    """`should_stop` said so; nothing was written that counts."""


def finetune(
    spec: FineTuneSpec,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> FineTuneResult:
    """Writes a model folder to `spec.out`, in the base's dtype. The same spec on the same machine: the same bytes.

    Raises: Stopped; BadUpload when there is no text; ModelUnusable for a broken base; TrainingFailed when the
    loss stops being a number.
    """
    _quieten()
    if spec.num_threads is not None:
        torch.set_num_threads(spec.num_threads)
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # 1. The base, in float32 whatever its file holds: bf16 weights would swallow steps this small. From here on its
    #    folder may go.
    _copy_tokenizer(spec)
    tokenizer = load_tokenizer(spec.base)
    end_id = end_of_text_id(tokenizer)
    model, dtype = _load_base(spec.base)
    model.to(device)

    # 2. The stream of tokens, and what is held out from it.
    blocks = cut_blocks(spec.epochs, tokenizer, end_id, model.config.n_positions)
    held_out = encode(tokenizer, spec.held_out)
    loss_before = held_out_loss(model, held_out, end_id)
    if should_stop():
        raise Stopped
    prepared = time.monotonic()

    # 3. One pass.
    def write_sample() -> list[str]:
        return preview(model, tokenizer, num_texts=1, seed=spec.seed, max_tokens=_SAMPLE_TOKENS)

    num_steps = math.ceil(len(blocks) / spec.batch_size)
    if spec.resume_from is None:
        on_progress(Progress(0, num_steps, None, spec.learning_rate, 0, None, None, valid_loss=loss_before))
    reporter = _Reporter(blocks.shape[1] * spec.batch_size, spec, on_progress, should_stop, write_sample)
    _train(model, blocks, spec, reporter, device)
    trained = time.monotonic()

    # 4. Round to what will be published, and judge exactly that.
    model.config.use_cache = True  # Trainer switches it off
    model.to(dtype).to(torch.float32)
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise TrainingFailed("Training made weights that are not numbers; a smaller learning_rate_multiplier may help.")
    loss_after = held_out_loss(model, held_out, end_id)
    previews = preview(model, tokenizer, num_texts=spec.num_previews, seed=spec.seed)
    judged = time.monotonic()
    _write_folder(spec, model.to(dtype), end_id)
    logger.info(
        "finetune_phases prepare_s=%.1f train_s=%.1f judge_s=%.1f write_s=%.1f steps=%d",
        prepared - started,
        trained - prepared,
        judged - trained,
        time.monotonic() - judged,
        len(reporter.history),
    )
    last = reporter.history[-1]
    assert last.train_loss is not None
    on_progress(replace(last, valid_loss=loss_after, valid_loss_before=loss_before, samples=tuple(previews)))
    return FineTuneResult(
        num_steps=last.total_steps,
        trained_tokens=blocks.numel(),
        num_parameters=model.num_parameters(),
        train_loss=last.train_loss,
        loss_before=loss_before,
        loss_after=loss_after,
        previews=tuple(previews),
        duration_s=time.monotonic() - started,
        dtype=str(dtype).removeprefix("torch."),
        block_size=blocks.shape[1],
        device=str(device),
        bf16=multiplies_bfloat16(device),
        num_threads=torch.get_num_threads(),
        history=tuple(reporter.history),
    )


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


def _quieten() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _load_base(folder: Path) -> tuple[Any, torch.dtype]:
    """The model in float32, and the dtype that its file holds."""
    try:
        model, report = GPT2LMHeadModel.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
        raise ModelUnusable("The base model's weights cannot be read.", param="model") from exc
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ModelUnusable("The base model lacks some of GPT-2's weights, or they have other shapes.", param="model")
    dtype = model.dtype
    return model.to(torch.float32), dtype


def _train(model: Any, blocks: Tensor, spec: FineTuneSpec, reporter: _Reporter, device: torch.device) -> None:
    """Modifies `model`. The order of blocks is Trainer's own, drawn from the seed."""
    arguments = TrainingArguments(
        output_dir=str(spec.work or spec.out),
        num_train_epochs=1,
        per_device_train_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        seed=spec.seed,
        data_seed=spec.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide exactly what we look for
        save_strategy="no",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
        bf16=multiplies_bfloat16(device),  # halves the time of a CPU that can, at the same loss
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": block} for block in blocks],
        data_collator=_collate,
        callbacks=[reporter],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if spec.resume_from is None else str(spec.resume_from))
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # from now on it computes in float32 again
    if reporter.stopped:
        raise Stopped


def _collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])  # (B, T)
    return {"input_ids": ids, "labels": ids}  # the model shifts them itself


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Turns Trainer's log into `Progress`, stops it when asked, and says when to write a checkpoint."""

    def __init__(
        self,
        tokens_a_step: int,
        spec: FineTuneSpec,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        write_sample: Callable[[], list[str]],
    ) -> None:
        self.history: list[Progress] = []
        self.stopped = False
        self._tokens_a_step = tokens_a_step
        self._spec = spec
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._write_sample = write_sample
        self._started = self._last_checkpoint = time.monotonic()
        self._first_step = 0
        self._smoothed: float | None = None
        self._save_cost_s = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self._started = self._last_checkpoint = time.monotonic()
        self._first_step = state.global_step
        for entry in state.log_history:  # of the attempt before, when resumed
            self._add(state, entry)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, float], **others: Any
    ) -> None:
        if "loss" not in logs:
            return  # the summary at the end
        if not math.isfinite(logs["loss"]):
            raise TrainingFailed(
                f"The loss stopped being a number at step {state.global_step}; a smaller learning_rate_multiplier "
                "may help.",
                param="learning_rate_multiplier",
            )
        self._add(state, {**logs, "step": state.global_step})
        half_way = state.global_step == max(state.max_steps // 2, 1)
        samples = tuple(self._write_sample()) if half_way else ()
        self._on_progress(replace(self.history[-1], samples=samples))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self._should_stop():
            self.stopped = control.should_training_stop = True
            control.should_save = self._spec.work is not None  # the next attempt goes on from here
        elif self._spec.work is not None and state.global_step < state.max_steps:
            waited = time.monotonic() - self._last_checkpoint
            due = max(self._spec.checkpoint_every_s, self._save_cost_s / _CHECKPOINT_MAX_SHARE)
            if waited >= due:
                control.should_save = True
                self._last_checkpoint = time.monotonic()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        assert self._spec.work is not None
        self._save_cost_s = time.monotonic() - self._last_checkpoint
        self._last_checkpoint = time.monotonic()
        (self._spec.work / f"checkpoint-{state.global_step}" / _COMPLETE).touch()
        if self._spec.resume_from is not None:
            shutil.rmtree(self._spec.resume_from, ignore_errors=True)

    def _add(self, state: TrainerState, entry: Mapping[str, float]) -> None:
        if "loss" not in entry:
            return
        loss = entry["loss"]
        old = self._smoothed
        self._smoothed = loss if old is None else _LOSS_SMOOTHING * old + (1 - _LOSS_SMOOTHING) * loss
        step = int(entry["step"])
        elapsed = max(time.monotonic() - self._started, 1e-9)
        a_step_s = elapsed / max(step - self._first_step, 1)
        self.history.append(
            Progress(
                step=step,
                total_steps=state.max_steps,
                train_loss=round(self._smoothed, 6),
                learning_rate=entry["learning_rate"],
                tokens=step * self._tokens_a_step,
                tokens_per_s=round(self._tokens_a_step / a_step_s, 1),
                seconds_left=round((state.max_steps - step) * a_step_s, 1),
            )
        )


def find_checkpoint(root: Path) -> Path | None:
    """The furthest complete checkpoint below `root`, in a folder of any earlier attempt."""
    found = [path.parent for path in root.glob(f"*/checkpoint-*/{_COMPLETE}")]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


# --- The folder -------------------------------------------------------------------------------------------


def _copy_tokenizer(spec: FineTuneSpec) -> None:
    spec.out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(spec.base / name, spec.out / name)


def _write_folder(spec: FineTuneSpec, model: Any, end_id: int) -> None:
    model.save_pretrained(spec.out)
    write_json(
        spec.out / "generation_config.json",
        {
            "bos_token_id": end_id,
            "do_sample": True,
            "eos_token_id": end_id,
            "max_length": min(160, model.config.n_positions),
            "min_length": 10,
            "temperature": 1.0,
            "top_p": 0.95,
        },
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
