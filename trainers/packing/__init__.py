"""Packing of a folder of images into one Lance dataset, which training reads by rows (`encoders/sources/packed.py`)."""

from orbithash.trainers.packing.writer import Packed, pack

__all__ = ["Packed", "pack"]
