"""Whether a tenant has room for more files and models."""

from __future__ import annotations

import anyio.to_thread
from fastapi import Request

from serve.api.quota import allowance
from serve.api.service import Service
from serve.types import CheckRoom


async def check_room(service: Service, request: Request, num_bytes: int = 0) -> None:
    """For so many more of the caller's. Raises: QuotaExceeded, StoreUnavailable."""

    def check() -> None:
        if (room := room_of(service, request)) is not None:
            room(service.files.bytes_of(service.access.caller(request).tenant), num_bytes)

    await anyio.to_thread.run_sync(check)


def room_of(service: Service, request: Request) -> CheckRoom | None:
    """Beside the caller's models, for `create_file`; it raises QuotaExceeded. None: without limit.

    Blocks. Raises: StoreUnavailable.
    """
    allowed = allowance(request)
    if not allowed.limits.storage_bytes:
        return None
    in_models = service.catalogue.bytes_of(service.access.caller(request).tenant)
    return lambda in_files, fresh: allowed.check_storage(in_models + in_files, fresh)
