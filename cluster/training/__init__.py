"""Train on Ray Train: workers, checkpoints, experiment trackers, the run folder."""
