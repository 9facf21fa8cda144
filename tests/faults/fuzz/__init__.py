"""Bad requests by the hundred thousand, as raw bytes over real sockets, and what is wrong with the answers.

`python -m tests.faults.fuzz --cases 100000 --seed 1` starts a service as a user does and ends with one JSON line.
"""
