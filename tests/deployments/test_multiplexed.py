"""Ray's own way of serving many models: what needs no cluster of it."""

from __future__ import annotations

import asyncio

import torch

from deployments.multiplexed import Rows


async def test_rows_of_a_batch_come_step_by_step_without_the_prompts() -> None:
    rows = Rows()

    def write() -> None:
        rows.put(torch.tensor([[1, 2], [3, 4]]))
        rows.put(torch.tensor([5, 6]))
        rows.put(torch.tensor([7, 8]))
        rows.end()

    await asyncio.to_thread(write)
    assert [step async for step in rows] == [[5, 6], [7, 8]]
