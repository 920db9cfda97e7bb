"""Benchmarks of parts of training: the metrics of validation, the manifest and the hashes of files."""
