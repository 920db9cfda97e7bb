"""Retrieval metrics from codes and labels: relevance, average precision under ties, gains, code statistics."""
