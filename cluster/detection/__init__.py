"""Detectors: fitted to rows of a gateway's archive, and run over archives that no gateway serves."""
