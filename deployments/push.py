"""`rookery pull` and `rookery push` as a terminal shows them: bars on stderr, so that stdout is the result alone."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]
from rich.console import Console

from deployments.client import LOOPBACK, Client, Json
from deployments.progress import TransferProgress
from serve.hub.push import Pushed, PushProgress, Visibility, push


def pull_model(client: Client, model_id: str, console: Console) -> Json:
    """The model as the server has it then. `console` shows how far it is."""
    with TransferProgress(console) as progress:
        for line in client.pull(model_id):
            if line["object"] == "model.pull":
                progress.update(line["phase"], line["file"], line["bytes"], line["total_bytes"])
    return line


def push_model(
    client: Client, model_id: str, console: Console, *, to: str | None, private: bool | None, endpoint: str | None
) -> Pushed:
    """What an interrupted push has fetched is in the user's cache folder. Two bars never share the terminal."""
    client.get_model(model_id)  # refuses in the server's own words, and tells a server that is not there
    visibility: Visibility | None = None if private is None else "private" if private else "public"
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings are for who calls it
    disable_progress_bars()
    _spare_loopback_the_proxy()
    with TransferProgress(console) as progress:

        def show(at: PushProgress) -> None:
            if at.phase == "sending" and console.is_terminal and not console.quiet:
                progress.pause()
                enable_progress_bars()
                return
            progress.update(at.phase, at.file, at.num_bytes, at.total_bytes)

        return push(
            model_id,
            source=client.url,
            source_key=client.key,
            cache=_cache(),
            endpoint=endpoint,
            to=to,
            visibility=visibility,
            on_progress=show,
        )


def _spare_loopback_the_proxy() -> None:
    """As our own client does: a proxy for the world outside knows nothing of this machine's own loopback."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *LOOPBACK]))


def _cache() -> Path:
    """Source: the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rookery" / "push"
