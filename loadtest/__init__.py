"""Benchmarks and load tests. They speak HTTP and import nothing of the service, but for `engine_*`, which drive it."""
