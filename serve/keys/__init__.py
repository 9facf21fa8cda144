"""The server's keys: made and revoked in the database, known there by a keyed hash alone."""
