"""The process that runs one claimed job, from its archives to a published model.

    python -m serve.training.jobs.run --job ftjob-... --token 3 --parent 4711  < options.json

Started and watched by `serve.training.jobs.supervisor`, which keeps the lease; SIGTERM makes it give the job back.
It exits 0 when the job's row says how the attempt ended, anything else when the supervisor must.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.database.connection import PATIENCE_S, Database, patiently
from serve.errors import Conflict, DiskFull, RookeryError, StoreUnavailable
from serve.exposition import join_parent
from serve.logs import bind, configure, get_logger, ms
from serve.metrics import Metrics
from serve.settings import Settings
from serve.store.revisions import Revision, Store
from serve.store.validate import read_shape
from serve.training.jobs.options import RunOptions
from serve.training.jobs.publishing import Publisher
from serve.training.jobs.queue import MAX_ATTEMPTS, MAX_CHECKPOINTS, Claim, JobQueue
from serve.training.jobs.store import JobStore
from serve.training.preprocess import Preprocessed, preprocess
from serve.training.processes import tie_to_parent
from serve.types import Visibility

if TYPE_CHECKING:  # torch and transformers take seconds to import: only when there is something to train
    from serve.hub.fetch import Hub
    from serve.training.dataset import Dataset
    from serve.training.finetune import FineTuneResult, FineTuneSpec, Progress, Write

log = get_logger()

NICENESS = 10
SECONDS_BETWEEN_EVENTS = 1.0
# Training keeps weights and two moments in float32, in two checkpoints while it replaces one by the next.
_CHECKPOINT_BYTES = 2 * 3 * 4  # a parameter
# Checkpoints that can be served are written while they have cost less than this share of training, or this long.
_CHECKPOINTS_SHARE = 0.05
_FREE_CHECKPOINTS_S = 2.0
# Libraries hide the error's number: safetensors in its text, torch behind what its writer then stumbles over.
_FULL = re.compile(rf"\(os error ({errno.ENOSPC}|{errno.EDQUOT})\)|iostream error|unexpected pos \d+ vs \d+")


class Stop(Exception):
    """SIGTERM came: the job is to be given back."""


class JobRun:
    """One attempt at one job."""

    def __init__(self, options: RunOptions, job_id: str, fence: int, metrics: Metrics | None = None) -> None:
        self._options = options
        self._metrics = metrics or Metrics(enabled=False)
        self._database = patiently(lambda: Database(options.database_url))
        self._queue = JobQueue(self._database, patience_s=PATIENCE_S)
        self._jobs = patiently(lambda: JobStore(self._database, options.uploads))
        self._store = Store(options.data_dir, embedded=options.embedded, cache=options.cache)
        self._claim: Claim = self._queue.resume(job_id, fence)
        self._publisher = Publisher(self._store, self._queue, self._claim)
        self._phases: dict[str, float] = {}
        self._last_event = 0.0
        self._saved_step = 0
        self._told_tokens = 0
        self._stopping = False
        self._hub: Hub | None = None  # where the base comes from

    def stop(self, *_signal: Any) -> None:
        """Asks it to give the job back at the next opportunity (a training step, bytes of the base)."""
        self._stopping = True
        if self._hub is not None:
            self._hub.close()

    def run(self) -> None:
        """Tells the story of the job, and puts how it ended into its row. Raises: Conflict when the claim is lost."""
        try:
            self._run()
        except Stop:
            status = self._queue.release(self._claim)
            log.info("job_released", status=status)
        except Exception as exc:
            self._settle(exc)
        finally:
            self._database.close()

    def _run(self) -> None:
        # 1. What the attempt before left behind.
        adopted = self._publisher.settle()
        if adopted is not None:
            return self._finish(adopted)
        if self._queue.read_wish(self._claim):  # what waited only for this to be settled
            raise Stop
        if self._claim.attempt > MAX_ATTEMPTS:
            self._queue.abandon(self._claim, "its process died while it published")
            return None

        # 2. What to learn, and from which model.
        with self._phase("preprocess"):
            data = self._preprocess()
        bind(model=data.model_id)
        # Before it is asked who is erased: an erasure that begins now finds the job.
        self._queue.add_result(self._claim, {"handles": data.said})
        self._publisher.begin(data.model_id, data.sources)
        self._tell_data(data)
        # Whoever tidies up after this job finds by the one that there is something, and by the other where.
        self._options.work_of(self._claim.job.id).mkdir(parents=True, exist_ok=True)
        self._queue.add_result(self._claim, {"model_id": data.model_id})
        with self._phase("locate_base"):
            base = self._locate_base()
        with self._phase("import"):
            from serve.training import finetune  # noqa: F401

        # 3. Learn it, in a folder that nobody sees yet.
        stage = self._store.stage()
        try:
            with self._phase("train"):
                result = self._train(data, base, stage)
            with self._phase("publish"):
                revision = self._publisher.publish(stage, data.model_id, visibility=self._visibility(base))
        finally:
            self._store.discard(stage)
        log.info("job_trained", steps=result.num_steps, tokens=result.trained_tokens, loss=round(result.train_loss, 4))
        return self._finish(revision)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._check_stop()
        started = time.monotonic()
        yield
        self._phases[name] = round(time.monotonic() - started, 3)
        log.info("job_phase", phase=name, duration_ms=ms(self._phases[name]))

    def _check_stop(self) -> None:
        if self._stopping:
            raise Stop

    # --- Phases -------------------------------------------------------------------------------------------

    def _preprocess(self) -> Preprocessed:
        job = self._claim.job
        entries = patiently(lambda: [(self._jobs.get_file(entry.file_id), entry.handle) for entry in job.request.files])
        judge_by = job.request.validation_file
        validation = None if judge_by is None else patiently(lambda: self._jobs.get_file(judge_by))
        return preprocess(entries, suffix=job.request.suffix, validation=validation)

    def _tell_data(self, data: Preprocessed) -> None:
        if data.validation is not None and data.validation.set_aside:
            message = f"Of the validation file, {len(data.validation.kept):,} texts are judged by: a sample."
            self._queue.add_event(self._claim, message)
        for own, given in data.renamed:
            message = f"An archive says that it is '{own}'s; its posts are learnt as '{given}'s, as was asked for."
            self._queue.add_event(self._claim, message, level="warn")
        for person in data.people:
            counts = person.cleaned.counts
            few = person.cleaned.status == "warn_few"
            shared = f", {counts['set_aside']:,} are in the validation file" if "set_aside" in counts else ""
            self._queue.add_event(
                self._claim,
                f"'{person.handle}': {counts['downloaded']:,} posts, of which {counts['retweets']:,} are retweets and "
                f"{counts['short']:,} too short{shared}; {counts['kept']:,} are kept."
                + (" That is little: the model will repeat them." if few else ""),
                level="warn" if few else "info",
            )

    def _locate_base(self) -> Revision:
        options, request = self._options, self._claim.job.request
        base_model, viewer = request.base_model, request.viewer
        if not options.hub_enabled:
            return self._store.resolve(base_model, viewer)
        from serve.hub.opening import open_hub

        self._hub = open_hub(options, self._store, self._metrics)
        self._check_stop()  # which came just before there was a Hub to close
        try:
            return self._hub.locate(base_model, viewer=viewer)
        except StoreUnavailable:
            self._check_stop()
            raise

    def _visibility(self, base: Revision) -> Visibility:
        """What has learnt from a private model is private too."""
        return Visibility.PRIVATE if base.is_private else self._claim.job.request.visibility

    def _train(self, data: Preprocessed, base: Revision, stage: Path) -> FineTuneResult:
        """Leaves a whole revision in `stage`, and checkpoints of it published on the way."""
        from serve.training.dataset import build_dataset
        from serve.training.finetune import Stopped, finetune
        from serve.training.kept_dataset import to_lines
        from serve.training.picture.draw import choose_prediction
        from serve.training.presentation import write_presentation
        from serve.training.tracking.provenance import (
            Making,
            card_losses,
            dataset_sha256,
            hyperparameters,
            write_checkpoint_record,
            write_records,
        )

        job = self._claim.job
        validation = None if data.validation is None else data.validation.kept
        dataset = build_dataset(data.kept_by_handle, seed=job.seed, validation=validation)
        spec = self._specify(dataset, base, stage)
        self._check_space(base, len(spec.epochs))

        began, spent_s = time.monotonic(), 0.0

        def publish_checkpoint(progress: Progress, write: Write) -> None:
            nonlocal spent_s
            started = time.monotonic()
            if spent_s <= max(_FREE_CHECKPOINTS_S, _CHECKPOINTS_SHARE * (started - began)):
                with self._forgiving(progress.step):
                    write_and_publish(progress, write)
                spent_s += time.monotonic() - started

        def write_and_publish(progress: Progress, write: Write) -> None:
            folder = self._store.stage()
            try:
                write(folder)
                write_checkpoint_record(folder, job, base, data, progress)
                losses = {} if progress.valid_loss is None else {"held_out": progress.valid_loss}
                write_presentation(folder, data, base_model=base.model_id, created_at=job.created_at, losses=losses)
                self._publisher.publish_checkpoint(
                    folder, data.model_id, progress.step, _metrics(progress), visibility=self._visibility(base)
                )
            finally:
                self._store.discard(folder)

        try:
            result = finetune(
                spec, on_progress=self._report, should_stop=lambda: self._stopping, on_epoch=publish_checkpoint
            )
        except Stopped as exc:
            raise Stop from exc
        learnt = (text for person in data.people for text in person.cleaned.kept)
        making = Making(
            job=job,
            attempt=self._claim.attempt,
            created_at=int(time.time()),
            base_model=base.model_id,
            base_revision=base.revision,
            data=data,
            dataset=dataset,
            spec=spec,
            result=result,
            preprocess_s=self._phases["preprocess"],
            sample=choose_prediction(result.previews, learnt=learnt),
        )
        write_records(stage, making)
        write_presentation(
            stage,
            data,
            base_model=base.model_id,
            created_at=making.created_at,
            losses=card_losses(making),
            sample=making.sample,
            hyperparameters=hyperparameters(making),
        )
        self._store.keep_dataset(stage, dataset_sha256(dataset), to_lines(dataset))
        return result

    @contextlib.contextmanager
    def _forgiving(self, step: int) -> Iterator[None]:
        """Training goes on without a checkpoint that there is no room for."""
        try:
            yield
        except Exception as exc:
            if not isinstance(exc, StoreUnavailable) and not _is_disk_full(exc):
                raise
            log.warning("checkpoint_left_out", step=step, error=type(exc).__name__)
            with contextlib.suppress(StoreUnavailable):
                reason = "the disk is full" if _is_disk_full(exc) else "the disk or the job database cannot be used now"
                message = f"There is no checkpoint of step {step}, for {reason}; training goes on."
                self._queue.add_event(self._claim, message, level="warn")

    def _specify(self, dataset: Dataset, base: Revision, stage: Path) -> FineTuneSpec:
        from serve.training.dataset import epoch_texts
        from serve.training.finetune import (
            LEARNING_RATE,
            NUM_EPOCHS,
            FineTuneSpec,
            count_learnt,
            find_checkpoint,
            suggested_batch_size,
            suggested_multiplier,
        )

        job, wanted = self._claim.job, self._claim.job.request.hyperparameters
        num_epochs = wanted.n_epochs or NUM_EPOCHS
        epochs = [epoch_texts(dataset, job.seed, epoch) for epoch in range(num_epochs)]
        batch_size = wanted.batch_size or suggested_batch_size(base.path, epochs)
        multiplier = wanted.learning_rate_multiplier or suggested_multiplier(base.path, batch_size)
        chosen = {"n_epochs": num_epochs, "batch_size": batch_size, "learning_rate_multiplier": round(multiplier, 6)}
        self._queue.add_result(self._claim, {"hyperparameters": chosen})
        work = self._options.work_of(job.id)
        self._start_anew_if_last(work)
        checkpoint = find_checkpoint(work)
        if checkpoint is not None:
            self._queue.add_event(self._claim, f"Training goes on from {checkpoint.name.replace('-', ' ')}.")
            self._told_tokens = count_learnt(checkpoint)  # which an earlier attempt has told of
        return FineTuneSpec(
            base=base.path,
            epochs=epochs,
            held_out=dataset.held_out,
            out=stage,
            seed=job.seed,
            batch_size=batch_size,
            learning_rate=LEARNING_RATE * multiplier,
            num_threads=self._options.num_threads,
            memory_share=self._options.memory_share,
            work=work / str(self._claim.fence),
            resume_from=checkpoint,
            checkpoint_every_s=self._options.checkpoint_every_s,
        )

    def _start_anew_if_last(self, work: Path) -> None:
        """Without the earlier checkpoints, in case it is they that kill: once, for a pause may come in between."""
        begun = work / "anew"
        if self._claim.attempt < MAX_ATTEMPTS:
            begun.unlink(missing_ok=True)
        elif not begun.exists():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True, exist_ok=True)
            begun.touch()

    def _check_space(self, base: Revision, num_epochs: int) -> None:
        """Raises: DiskFull before hours are spent rather than after."""
        weights = sum(path.stat().st_size for path in base.path.glob("*.safetensors"))
        revisions = 1 + min(num_epochs, MAX_CHECKPOINTS + 1)  # one is published before another is removed
        needed = revisions * weights + _CHECKPOINT_BYTES * read_shape(base.path).num_parameters
        free = shutil.disk_usage(self._options.data_dir).free
        if free < needed:
            raise DiskFull(
                f"The disk has {free / 1e6:,.0f} MB free, and training '{base.model_id}' needs {needed / 1e6:,.0f} MB: "
                "delete a model, then start the job again."
            )

    def _report(self, progress: Progress) -> None:
        self._count_tokens(progress.tokens)
        now = time.monotonic()
        is_one_of_many = 0 < progress.step < progress.total_steps and not progress.samples
        if is_one_of_many and now - self._last_event < SECONDS_BETWEEN_EVENTS:
            return
        self._last_event = now
        with contextlib.suppress(StoreUnavailable):  # a busy database must not hold up training
            self._note_checkpoint()
            self._queue.add_event(
                self._claim,
                _describe(progress),
                metrics=asdict(progress),
                seconds_left=progress.seconds_left,
            )

    def _count_tokens(self, tokens: int) -> None:
        """Those since the last time; fewer than then, where the checkpoint could not be gone on from."""
        self._metrics.training_tokens.inc(max(0, tokens - self._told_tokens))
        self._told_tokens = tokens

    def _note_checkpoint(self) -> None:
        """A job that gets further is no poison, however often its attempts die."""
        from serve.training.finetune import find_checkpoint

        checkpoint = find_checkpoint(self._options.work_of(self._claim.job.id))
        step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
        if step > self._saved_step:
            self._queue.set_progress(self._claim, step)
            self._saved_step = step

    def _finish(self, revision: Revision) -> None:
        from serve.training.tracking.outbox import deliveries_of
        from serve.training.tracking.provenance import job_result, read_provenance, read_runs_of

        job = self._claim.job
        provenance = read_provenance(revision.path)
        runs = read_runs_of(revision.path, revision.revision)
        if runs:  # none of a model that an earlier release published
            self._add_metrics_file(runs[-1].history)
        own = patiently(lambda: self._jobs.list_checkpoints(job.id, limit=MAX_CHECKPOINTS)).items
        going_on = patiently(lambda: self._jobs.forget_earlier_checkpoints(revision.model_id, job.id))
        self._publisher.drop_earlier_checkpoints(revision.model_id, [one.model_id for one in own], going_on)
        self._queue.finish(
            self._claim,
            model_id=revision.model_id,
            trained_tokens=provenance["trained_tokens"],
            result={**job_result(provenance), "revision": revision.revision, "phases_s": self._phases},
            runs=runs,
            deliveries=deliveries_of(job.request.integrations, self._options.trackers),
        )

    def _add_metrics_file(self, history: Mapping[str, Sequence[Any]]) -> None:
        """What OpenAI calls a result file: a line a step."""
        written = self._options.uploads / f"upload-{secrets.token_hex(12)}"
        with written.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(history)
            table.writerows(zip(*history.values(), strict=True))
        self._queue.add_result_file(self._claim, self._options.uploads, written, "step_metrics.csv")

    # --- Ends ---------------------------------------------------------------------------------------------

    def _settle(self, exc: Exception) -> None:
        """An error that a user can understand ends the job, unless there is a model; one that may pass is tried again.

        Others are raised.
        """
        has_published = self._publisher.has_published()
        if _is_disk_full(exc) and not isinstance(exc, DiskFull):
            exc = DiskFull("The disk is full. Start the job again when there is room.")
        may_pass = isinstance(exc, StoreUnavailable) and not isinstance(exc, DiskFull)
        if isinstance(exc, RookeryError) and (may_pass or has_published):  # the next attempt finds what is published
            log.warning("job_attempt_failed", code=exc.code, reason=exc.message)
            self._queue.abandon(self._claim, exc.message.rstrip("."), self._options.retry_delay_s, code=exc.code)
        elif isinstance(exc, RookeryError):
            self._queue.fail(self._claim, code=exc.code, message=exc.message, param=exc.param)
        else:
            raise exc


def _describe(progress: Progress) -> str:
    losses = [("loss", progress.train_loss), ("held-out loss", progress.valid_loss)]
    told = ", ".join(f"{name} {loss:.3f}" for name, loss in losses if loss is not None)
    return f"Step {progress.step} of {progress.total_steps}" + (f": {told}." if told else ".")


def _metrics(progress: Progress) -> dict[str, Any]:
    """As a checkpoint tells it."""
    told = ("step", "train_loss", "valid_loss", "learning_rate", "tokens")
    return {name: getattr(progress, name) for name in told if getattr(progress, name) is not None}


def _is_disk_full(exc: BaseException | None) -> bool:
    while exc is not None:
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if not isinstance(exc, RookeryError) and _FULL.search(str(exc)):
            return True
        exc = exc.__cause__ or exc.__context__
    return False


# --- The process ------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", required=True, help="the job's id")
    parser.add_argument("--token", type=int, required=True, help="the fencing token of its claim")
    parser.add_argument("--parent", type=int, required=True, help="the process without which this one ends")
    arguments = parser.parse_args()
    tie_to_parent(arguments.parent)  # however the supervisor dies: nobody else would keep the lease, or stop this
    os.nice(NICENESS)
    settings = Settings.from_env()
    configure(settings, part="training", job_id=arguments.job)
    stopped_early: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped_early.append(number))
    options = RunOptions.from_json(sys.stdin.read())
    try:
        job_run = JobRun(options, arguments.job, arguments.token, join_parent(enabled=settings.metrics_enabled))
        signal.signal(signal.SIGTERM, job_run.stop)
        if stopped_early:
            job_run.stop()
        job_run.run()
    except Conflict:
        log.warning("job_lost", fence=arguments.token)
    # All that counts is in the job's row. To take torch down in good order would keep the next job waiting for seconds.
    os._exit(0)


if __name__ == "__main__":
    main()
