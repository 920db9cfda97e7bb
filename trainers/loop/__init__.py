"""Trains: the one training loop for all methods, its validation, its checkpoints, and what a run consists of."""
