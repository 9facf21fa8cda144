"""`python -m deployments.cli`: the command where it is not on the PATH."""

from __future__ import annotations

from deployments.cli import main

if __name__ == "__main__":
    main()
