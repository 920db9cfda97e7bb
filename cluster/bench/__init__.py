"""Measure speed, always beside a baseline in the same run."""
