"""Which release this is."""

VERSION = "0.1.0"  # as pyproject.toml says, which an image need not hold
