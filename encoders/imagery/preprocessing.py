"""Preprocessing: from a rendered image of any size to the square input of the network.

Does not import torch, because the processes that decode images run it, and there are many of them.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.imagery.images import Rendering

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "resample"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# For bands other than RGB, for which pretrained weights define no statistics.
OTHER_MEAN, OTHER_STD = 0.5, 0.25

MAX_SIDE_PX = 1024

ORIENTATIONS = (1, 4, 8)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; stored in the model folder, and exact when loaded from it.

    The centre square of the image, `crop / resize` of its shorter side, is resampled to `crop` x `crop` pixels
    (bilinear, antialiased). The result is that of resizing the shorter side to `resize` and cropping `crop`, in one
    step whose memory does not depend on the aspect ratio.

    Attributes:
        rendering: bands and stretch.
        resize: pixels of the shorter side before cropping.
        crop: pixels of the side of the network's input.
        mean: mean of each band of the rendered image, in 0 to 1; empty: ImageNet's for three bands, else 0.5 each.
        std: standard deviation likewise; empty: ImageNet's for three bands, else 0.25 each.
        orientations: number of orientations of the square over which the network's features are averaged: 1 as it is,
            4 with quarter turns, 8 with mirror images, too. Images from above have no upright direction, so that the
            mean loses no information about the scene. The time to encode is proportional to it.
    """

    rendering: Rendering
    resize: int
    crop: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    orientations: int = 1

    def __post_init__(self) -> None:
        if not self.mean and not self.std:
            mean: tuple[float, ...] = IMAGENET_MEAN
            std: tuple[float, ...] = IMAGENET_STD
            if self.channels != 3:
                mean, std = (OTHER_MEAN,) * self.channels, (OTHER_STD,) * self.channels
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)
        problems = []
        if not 16 <= self.crop <= self.resize <= MAX_SIDE_PX:
            problems.append(
                f"resize {self.resize} and crop {self.crop}; 16 <= crop <= resize <= {MAX_SIDE_PX} pixels is required"
            )
        if not len(self.mean) == len(self.std) == self.channels or not all(s > 0 for s in self.std):
            problems.append(
                f"mean {self.mean} and std {self.std}; {self.channels} numbers each are required, the std above 0"
            )
        if self.orientations not in ORIENTATIONS:
            problems.append(f"orientations {self.orientations}; {', '.join(map(str, ORIENTATIONS))} are allowed")
        if problems:
            raise listed(problems, "preprocessing")

    @property
    def channels(self) -> int:
        """Number of bands of the network's input."""
        return self.rendering.channels

    def prepare(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resample uint8 [H, W, C] to uint8 [crop, crop, C]."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != self.channels or not image.size:
            raise InputError(
                f"an image is uint8 [H, W, {self.channels}] and not empty, got {image.dtype} {list(image.shape)}"
            )
        height, width = image.shape[:2]
        side = min(height, width) * self.crop / self.resize
        left, top = (width - side) / 2, (height - side) / 2
        return resample(image, self.crop, (left, top, left + side, top + side))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "rendering": self.rendering.to_json(),
            "resize": self.resize,
            "crop": self.crop,
            "mean": list(self.mean),
            "std": list(self.std),
            "orientations": self.orientations,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocessing":
        """Return the preprocessing that `to_json` wrote; `KeyError`, `TypeError` or `InputError` for anything else."""
        return cls(
            rendering=Rendering.from_json(fields["rendering"]),
            resize=int(fields["resize"]),
            crop=int(fields["crop"]),
            mean=tuple(float(v) for v in fields["mean"]),
            std=tuple(float(v) for v in fields["std"]),
            orientations=int(fields["orientations"]),
        )


def resample(image: npt.NDArray[np.uint8], side: int, box: tuple[float, float, float, float]) -> npt.NDArray[np.uint8]:
    """Return the part in `box` (left, top, right, bottom) of uint8 [H, W, C] as uint8 [side, side, C], antialiased."""
    if image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box=box))
    # Pillow resamples at most four bands together, and treats the fourth as alpha.
    bands = [Image.fromarray(image[..., band]) for band in range(image.shape[2])]
    return np.stack([np.asarray(band.resize((side, side), Image.Resampling.BILINEAR, box=box)) for band in bands], 2)
