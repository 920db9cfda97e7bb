"""Benchmarks of the service and its shards: rates beside other services, changes, load over minutes."""
