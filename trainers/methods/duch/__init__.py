"""DUCH, cross-modal hashing of images and captions without labels: settings, losses, method."""

from orbithash.trainers.methods.duch.config import DuchConfig
from orbithash.trainers.methods.duch.method import Duch

__all__ = ["Duch", "DuchConfig"]
