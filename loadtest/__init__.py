"""Benchmarks and load tests. Speak HTTP only, and import nothing of the service."""
