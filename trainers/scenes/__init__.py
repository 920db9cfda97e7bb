"""Procedurally drawn, georeferenced land-use scenes."""

from orbithash.trainers.scenes.write import write_scenes

__all__ = ["write_scenes"]
