"""The command `rookery`: starts the service, talks to a running one, and looks at archives without any."""

from __future__ import annotations

# Each of these adds its verbs to `app`, in the order in which `--help` lists them.
from deployments.cli import service, migrate, making, generate, play, using, erase, disable, bench, hub, keys  # isort: skip  # noqa: F401
from deployments.cli.app import app, main

__all__ = ["app", "main"]
