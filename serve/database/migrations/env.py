"""Run by alembic for every command: on the connection that it is given, and never on one of its own."""

from __future__ import annotations

from alembic import context

from serve.database.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
