"""Benchmarks of parts of training: the metrics of validation."""
