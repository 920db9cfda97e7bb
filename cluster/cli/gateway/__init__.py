"""Verbs that run a gateway or talk to one, and how their answers are printed."""
