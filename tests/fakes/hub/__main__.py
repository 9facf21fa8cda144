"""A fake Hub for work by hand."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from tests.fakes.hub.server import fake_hub

ENDS = (signal.SIGINT, signal.SIGTERM)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.hub", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME=FOLDER")
    args = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # before there are threads
    with fake_hub(args.port) as hub:
        for repo in args.repo:
            repo_id, _, folder = repo.partition("=")
            print(repo_id, hub.add(repo_id, Path(folder)))
        print(hub.endpoint, flush=True)
        signal.sigwait(ENDS)
