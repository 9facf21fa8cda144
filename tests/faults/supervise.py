"""One supervisor as a process, with short leases, or so many times longer ones. Options come by stdin; SIGTERM ends it.

python -m tests.faults.supervise [TIMES] < options.json
"""

from __future__ import annotations

import asyncio
import signal
import sys

from serve.training.jobs.options import RunOptions
from serve.training.jobs.supervisor import Supervisor

LEASE_S, BEAT_S, POLL_S = 3.0, 0.5, 0.1


async def supervise(options: RunOptions, times: float) -> None:
    supervisor = Supervisor(options, lease_s=times * LEASE_S, beat_s=times * BEAT_S, poll_s=POLL_S)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    running = asyncio.create_task(supervisor.run_forever())
    await asyncio.wait({running, asyncio.create_task(stopping.wait())}, return_when=asyncio.FIRST_COMPLETED)
    await supervisor.stop()
    await running
    supervisor.close()


if __name__ == "__main__":
    asyncio.run(supervise(RunOptions.from_json(sys.stdin.read()), float((*sys.argv[1:], "1")[0])))
