"""The training loop of all methods, its validation and checkpoints, and runs and their folders."""
