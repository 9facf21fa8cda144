"""All state that is not a file: SQLite by default, PostgreSQL by URL."""
