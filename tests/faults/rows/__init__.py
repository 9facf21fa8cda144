"""The rows of the table of faults, a module an area."""
