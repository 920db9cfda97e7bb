"""Search for settings on Ray Tune and report the trials."""
