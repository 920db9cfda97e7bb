"""Features of frozen networks, and their cache on disk."""
