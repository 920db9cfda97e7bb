"""Measurements of networks alone, on a GPU or a CPU, without Ray."""
