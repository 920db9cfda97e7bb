"""Detectors: linear functions of stored vectors that tell the rows of one kind from all others.

A detector is fitted to marked rows (numpy and scikit-learn), kept as a small JSON file, and run by a `Linear` ranking
or over an archive. Reading and checking a detector needs neither library.
"""

from orbithash.search.detectors.detector import Detector

__all__ = ["Detector"]
