"""Whether a tenant has room for more files and models."""

from __future__ import annotations

import anyio.to_thread
from fastapi import Request

from serve.api.quota import allowance
from serve.api.service import Service


async def check_room(service: Service, request: Request, num_bytes: int = 0) -> None:
    """For so many more of the caller's. Raises: QuotaExceeded, StoreUnavailable."""
    allowed, tenant = allowance(request), service.access.caller(request).tenant
    if allowed.limits.storage_bytes:
        used = await anyio.to_thread.run_sync(
            lambda: service.files.bytes_of(tenant) + service.catalogue.bytes_of(tenant)
        )
        allowed.check_storage(used, num_bytes)
