"""The whole service at a glance, for an operator: what runs, what is in memory, what waits, what there is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from serve.api.service import Service
from serve.errors import RookeryError
from serve.types import JobStatus, ReplicaView
from serve.version import VERSION

T = TypeVar("T")

_READY_S = 0.5  # to say so takes one step; a look at the whole does not wait for a base model to be loaded
_ANSWER_S = 2.0


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What the parts say. None stands for what a part that is away would have to say."""

    version: str
    base_model: str
    is_ready: bool
    replicas: tuple[ReplicaView, ...] | None
    jobs: Mapping[JobStatus, int] | None  # of each status, also those that none is in
    num_models: int | None  # None also where nobody has counted them
    is_hub_enabled: bool

    @property
    def num_resident_models(self) -> int:
        """Models that are in the memory of any replica."""
        return len({resident.model_id for replica in self.replicas or () for resident in replica.residents})

    @property
    def used_bytes(self) -> int:
        return sum(replica.used_bytes for replica in self.replicas or ())

    @property
    def budget_bytes(self) -> int:
        return sum(replica.budget_bytes for replica in self.replicas or ())

    @property
    def num_queued(self) -> int:
        """Sequences that wait for a place in a batch."""
        return sum(replica.num_queued for replica in self.replicas or ())

    @property
    def num_running(self) -> int:
        """Sequences that are being written."""
        return sum(replica.num_running for replica in self.replicas or ())


async def is_ready(service: Service) -> bool:
    """Whether text can be written now; one that says so late counts as not ready."""
    return await service.readiness.is_good(_READY_S)


async def service_status(service: Service) -> ServiceStatus:
    """Asks all parts at once. One that is away takes nothing from what the others say."""
    ready = await is_ready(service)  # before: the text of the check is nobody's, and need not be seen running
    replicas, jobs, num_models = await asyncio.gather(
        unless_away(service.generator.replicas()),
        unless_away(asyncio.to_thread(service.jobs.count_jobs)),
        unless_away(asyncio.to_thread(service.catalogue.count_models)),
    )
    return ServiceStatus(
        version=VERSION,
        base_model=service.default_base,
        is_ready=ready,
        replicas=None if replicas is None else tuple(replicas),
        jobs=None if jobs is None else {status: jobs.get(status, 0) for status in JobStatus},
        num_models=num_models,
        is_hub_enabled=service.puller is not None,
    )


async def unless_away(answer: Awaitable[T]) -> T | None:
    """None where whoever was asked cannot say, or not soon."""
    try:
        return await asyncio.wait_for(answer, _ANSWER_S)
    except (RookeryError, TimeoutError):
        return None
