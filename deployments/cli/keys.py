"""`rookery keys`: a new key for a server, and whether a server takes the one that is sent. None is kept."""

from __future__ import annotations

import secrets

import typer

from deployments.cli.app import SERVICE, Exit, command, group
from deployments.cli.options import DEFAULT_URL, AsJson, Url, print_json, remark, tell
from deployments.client import Client

_PREFIX = "rk-"  # by which a key in the wrong place is known for what it is
_KEY_BYTES = 32

keys = group(
    SERVICE,
    "keys",
    """
    export ROOKERY_API_KEY=$(rookery keys new)
    rookery keys check
    """,
    about="Make a key for a server, or check the one that is sent.",
)


@command(
    SERVICE,
    """
    rookery keys new
    export ROOKERY_API_KEY=$(rookery keys new)
    """,
    of=keys,
)
def new(as_json: AsJson = False) -> None:
    """Print a fresh random key. No server is asked, and nothing keeps it."""
    key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    if as_json:
        print_json({"object": "key", "key": key})
    else:
        typer.echo(key)
    remark("The server takes it after: ROOKERY_API_KEYS=KEY rookery up    (several with commas between)")
    remark("The command sends it after: export ROOKERY_API_KEY=KEY    (other clients: as their api_key)")


@command(
    SERVICE,
    """
    rookery keys check
    ROOKERY_API_KEY=rk-... rookery keys check --url https://bots.example.org
    """,
    of=keys,
)
def check(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Ask the server whether it takes the key in ROOKERY_API_KEY; ends with 4 where it does not."""
    with Client(url) as client, Client(url, key="") as stranger:
        client.status()  # another program may take any key
        has_key, is_taken, is_open = bool(client.key), client.takes_key(), stranger.takes_key()
    if as_json:
        print_json({"object": "key.check", "url": url, "sent": has_key, "accepted": is_taken, "needed": not is_open})
    elif is_open:
        tell(f"{url} asks for no key.")
    elif is_taken:
        tell(f"{url} takes the key in ROOKERY_API_KEY.")
    else:
        what = "does not take the key in" if has_key else "needs a key; set"
        typer.echo(f"rookery: {url} {what} ROOKERY_API_KEY.", err=True)
    if not is_taken:
        raise typer.Exit(Exit.KEY)
