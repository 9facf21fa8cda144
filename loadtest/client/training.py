"""Training jobs beside the requests: an archive made on the fly, uploaded, and followed until the bot is there."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from loadtest.client.sender import Clock, Stopped, read_body
from loadtest.client.target import Target
from loadtest.client.wire import Unreadable, code_of, read_object, word_of
from loadtest.results.record import STOPPED, Outcome, Record
from loadtest.traffic.plan import Lengths, Plan
from loadtest.traffic.streams import stream
from loadtest.traffic.texts import POSTS, draw_lengths, draw_places, prompt

FLOW = "training"
_POLL_S = 0.25
_LEAST_WORDS = 4  # of a post: shorter ones are not learnt from
_PATIENCE_S = 600.0  # of a job after it was due
_ENDS: dict[str, Outcome] = {"succeeded": "ok", "failed": "failed", "cancelled": "failed"}


def archive(handle: str, num_posts: int, seed: int) -> bytes:
    """So many different posts, as plain text, a post a line."""
    rng = stream(seed, handle, "posts")
    lengths = draw_lengths(Lengths(), POSTS, num_posts, rng).tolist()
    places = draw_places(num_posts, rng).tolist()
    texts = map(prompt, (max(length, _LEAST_WORDS) for length in lengths), places)
    return "".join(f"{text} {number}\n" for number, text in enumerate(texts)).encode()


class Trainer:
    """Starts the plan's jobs when they are due, and follows each to its end."""

    def __init__(self, session: aiohttp.ClientSession, target: Target, plan: Plan, clock: Clock) -> None:
        self._session, self._target, self._plan, self._clock = session, target, plan, clock

    @property
    def num_jobs(self) -> int:
        """Those that are due before the plan's end."""
        return sum(self._due_s(number) < self._plan.ends_s for number in range(self._plan.training.jobs))

    def _due_s(self, number: int) -> float:
        """The first begins with the measured time."""
        return self._plan.warmup_s + number * self._plan.training.every_s

    async def train(self, number: int) -> Record:
        """Job `number` of the plan.

        Raises: Stopped where it is cancelled once it has begun.
        """
        at_s = self._due_s(number)
        await asyncio.sleep(max(0.0, at_s - self._clock()))
        sent_s = self._clock()
        handle = f"loadtest{number + 1}"
        outcome: Outcome = "failed"
        status, error, job_id = 0, "", ""

        def ended() -> Record:
            return Record(
                number=number,
                flow=FLOW,
                model=handle,
                at_s=at_s,
                sent_s=sent_s,
                ended_s=self._clock(),
                outcome=outcome,
                status=status,
                error=error,
                is_streaming=False,
                request_id=job_id,
                kind="train",
            )

        try:
            async with asyncio.timeout(_PATIENCE_S):
                status, job = await self._upload(handle, number)
                job_id = word_of(job.get("id"))
                if status == 201 and job_id:
                    job = await self._follow(job_id)
                    outcome = _ENDS.get(str(job.get("status")), "failed")
                elif status in (429, 503):
                    outcome = "refused"
                error = code_of(job) if outcome != "ok" else ""
        except TimeoutError:
            outcome = "timeout"
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            error = "unreadable" if isinstance(exc, Unreadable) else type(exc).__name__
        except asyncio.CancelledError:
            outcome, error = "timeout", STOPPED
            raise Stopped(ended()) from None
        return ended()

    async def _upload(self, handle: str, number: int) -> tuple[int, dict[str, Any]]:
        training = self._plan.training
        posts = archive(handle, training.posts, self._plan.seed + number)
        form = aiohttp.FormData()
        form.add_field("archive", posts, filename=f"{handle}.txt", content_type="text/plain")
        form.add_field("handle", handle)
        form.add_field("n_epochs", str(training.epochs))
        async with self._session.post(self._target.at("/v1/bots"), data=form) as response:
            return response.status, read_object(await read_body(response))

    async def _follow(self, job_id: str) -> dict[str, Any]:
        while True:
            async with self._session.get(self._target.at(f"/v1/fine_tuning/jobs/{job_id}")) as response:
                job = read_object(await read_body(response))
                if response.status != 200 or str(job.get("status")) in _ENDS:
                    return job
            await asyncio.sleep(_POLL_S)
