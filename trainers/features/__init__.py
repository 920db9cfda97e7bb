"""Compute the features of frozen networks and cache them on disk."""
