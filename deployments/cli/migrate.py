"""`rookery migrate`: the database is there, and has this release's schema. Runs before what needs it starts."""

from __future__ import annotations

from typing import Annotated

import typer

from deployments.cli.app import SERVICE, command
from deployments.cli.options import AsJson, Data, print_json, remark, settings_of, tell
from serve.errors import StoreUnavailable


@command(
    SERVICE,
    """
    rookery migrate
    rookery migrate --wait 300
    ROOKERY_DATABASE_URL=postgresql+psycopg://rookery@db/rookery rookery migrate --json
    """,
)
def migrate(
    wait: Annotated[float, typer.Option("--wait", min=0, help="How many seconds to wait for the database.")] = 0,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Bring the database to the schema of this release, as a start does too; ends with 5 when it does not answer.

    Several may run at once: one of them changes the tables, the others wait for it. A schema newer than this release is
    refused, with 1, and left as it is.
    """
    from serve.database.connection import SCHEMA, Database, patiently

    url = settings_of(data).sql_url
    kind = url.partition(":")[0].partition("+")[0]
    is_told = False

    def found() -> str | None:
        nonlocal is_told
        try:
            database = Database(url)
        except StoreUnavailable:
            if wait and not is_told:
                is_told = True
                remark(f"Waiting up to {wait:g} s for the database ({kind}) ...")
            raise
        database.close()
        return database.found_schema

    before = patiently(found, wait)
    if as_json:
        return print_json({"object": "migration", "database": kind, "from": before, "to": SCHEMA})
    if before == SCHEMA:
        return tell(f"The database ({kind}) has schema {SCHEMA} already.")
    tell(f"The database ({kind}) has schema {SCHEMA} now; before it had {before or 'none'}.")
