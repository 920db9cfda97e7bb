"""From a rendered image of any size to the square the network sees.

Free of torch: the decoding stages of a job, which are many and small, run it too.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.images import Rendering

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_SIDE_PX = 1024


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; written into the model folder and reproduced from it exactly.

    The centre square of the image, `crop / resize` of its shorter side, is resampled to `crop` x `crop` pixels
    (bilinear, antialiased): what resizing the shorter side to `resize` and cropping `crop` gives, in one step whose
    memory does not depend on how long and thin the image is. `mean` and `std` are of RGB in 0-1.
    """

    rendering: Rendering
    resize: int
    crop: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        problems = []
        if not 16 <= self.crop <= self.resize <= MAX_SIDE_PX:
            problems.append(
                f"resize {self.resize} and crop {self.crop}: 16 <= crop <= resize <= {MAX_SIDE_PX} pixels are allowed"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            problems.append(f"mean {self.mean} and std {self.std}: three numbers each are needed, the std above 0")
        if problems:
            raise listed(problems, "preprocessing")

    def prepare(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resamples uint8 [H, W, 3] to uint8 [crop, crop, 3]."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"an image is uint8 [H, W, 3] with pixels in it, got {image.dtype} {list(image.shape)}")
        height, width = image.shape[:2]
        side = min(height, width) * self.crop / self.resize
        left, top = (width - side) / 2, (height - side) / 2
        square = Image.fromarray(image).resize(
            (self.crop, self.crop), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )
        return np.asarray(square)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            "rendering": self.rendering.to_json(),
            "resize": self.resize,
            "crop": self.crop,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`; `KeyError`, `TypeError` or `InputError` for anything else."""
        return cls(
            rendering=Rendering.from_json(fields["rendering"]),
            resize=int(fields["resize"]),
            crop=int(fields["crop"]),
            mean=tuple(float(v) for v in fields["mean"]),  # type: ignore[arg-type] # the length is checked above
            std=tuple(float(v) for v in fields["std"]),  # type: ignore[arg-type]
        )
