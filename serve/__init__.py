"""The Rookery service. Knows torch and HTTP, never Ray."""
