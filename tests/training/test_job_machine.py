"""Any order of what owners, workers and clocks may do to jobs: each ends once, and only who holds it changes it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from sqlalchemy import update

from serve.database.tables import JobRow
from serve.errors import Conflict
from serve.training.jobs.queue import MAX_ATTEMPTS, Claim, Publication
from serve.types import JobRequest, JobStatus, TrainingFile
from tests.training.making import BASE, Training

_PUBLICATION = Publication(Path("stage"), "huggingtweets/ada", "0123")


class JobMachine(RuleBasedStateMachine):
    """`holders` is what the table should think; claims that are not in it belong to zombies."""

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.training = Training(Path(self.folder.name))
        self.file_id = self.training.upload().id
        self.holders: dict[str, int] = {}  # job -> fence
        self.ended: dict[str, JobStatus] = {}
        self.ids: list[str] = []

    def teardown(self) -> None:
        self.training.close()
        self.folder.cleanup()

    # --- Owners -------------------------------------------------------------------------------------------

    @rule(target=jobs, owner=st.sampled_from("ab"), priority=st.sampled_from((-1, 0, 1)))
    def create(self, owner: str, priority: int) -> str:
        entry = (TrainingFile(self.file_id, "ada"),)
        job = self.training.jobs.create_job(JobRequest(BASE, entry, owner=owner, priority=priority))  # type: ignore[arg-type]
        self.ids.append(job.id)
        return job.id

    @rule(job_id=jobs, action=st.sampled_from(("pause_job", "resume_job", "cancel_job")))
    def decide(self, job_id: str, action: str) -> None:
        before = self.training.jobs.get_job(job_id).status
        try:
            after = getattr(self.training.jobs, action)(job_id).status
        except Conflict:
            assert before.is_final or action == "resume_job"
        else:
            assert not before.is_final
            assert after == before or before is not JobStatus.RUNNING, "who works on it is asked first"

    # --- Workers and clocks -------------------------------------------------------------------------------

    @rule(target=claims)
    def claim(self) -> Claim | None:
        waiting = self._with_status(JobStatus.QUEUED)
        claim = self.training.queue.claim("worker", 30)
        if claim is None:
            return None
        before = self.holders.get(claim.job.id, 0)
        assert claim.fence > before and claim.attempt <= MAX_ATTEMPTS + 1
        if not before:
            assert claim.job.id in waiting, "only who waits, or whose worker is silent, is given away"
        self.holders[claim.job.id] = claim.fence
        return claim

    @rule()
    def all_leases_end(self) -> None:
        with self.training.database.write() as session:
            session.execute(update(JobRow).values(lease_until_ms=0))

    @rule(claim=claims, action=st.sampled_from(("heartbeat", "progress", "announce", "settle")))
    def work(self, claim: Claim | None, action: str) -> None:
        queue = self.training.queue
        if claim is None:
            return
        self._as_holder(
            claim,
            {
                "heartbeat": lambda: queue.heartbeat(claim, 30),
                "progress": lambda: queue.set_progress(claim, claim.fence),
                "announce": lambda: queue.set_publication(claim, _PUBLICATION),
                "settle": lambda: queue.set_publication(claim, None),
            }[action],
            keeps=True,
        )

    @rule(claim=consumes(claims), action=st.sampled_from(("release", "abandon", "fail", "finish")))
    def end(self, claim: Claim | None, action: str) -> None:
        queue = self.training.queue
        if claim is None:
            return
        self._as_holder(
            claim,
            {
                "release": lambda: queue.release(claim),
                "abandon": lambda: queue.abandon(claim, "it died"),
                "fail": lambda: queue.fail(claim, code="x", message="It failed."),
                "finish": lambda: queue.finish(claim, model_id="m", trained_tokens=1, result={}),
            }[action],
            keeps=False,
        )

    def _as_holder(self, claim: Claim, action: object, *, keeps: bool) -> None:
        holds = self.holders.get(claim.job.id) == claim.fence
        try:
            action()  # type: ignore[operator]
        except Conflict:
            assert not holds, "who holds a job may work on it"
        else:
            assert holds, "a zombie has changed a job"
            if not keeps:
                del self.holders[claim.job.id]

    # --- Always -------------------------------------------------------------------------------------------

    @invariant()
    def each_ends_once_and_stays_ended(self) -> None:
        for job_id in getattr(self, "ids", ()):
            status = self.training.jobs.get_job(job_id).status
            assert self.ended.get(job_id, status) == status, "it had ended otherwise"
            if status.is_final and job_id not in self.ended:
                self.ended[job_id] = status
            if status is not JobStatus.RUNNING:
                self.holders.pop(job_id, None)

    @invariant()
    def nobody_else_runs_what_somebody_holds(self) -> None:
        if hasattr(self, "holders"):
            assert self._with_status(JobStatus.RUNNING) == set(self.holders)

    def _with_status(self, status: JobStatus) -> set[str]:
        return {job.id for job in self.training.jobs.list_jobs(limit=1000).items if job.status is status}


TestJobMachine = JobMachine.TestCase
TestJobMachine.settings = settings(
    max_examples=10,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
