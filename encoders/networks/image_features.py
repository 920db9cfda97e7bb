"""Features of prepared images, computed in passes of the backbone.

A kernel may sum in another order for another number of images, so the features of an image change by rounding with the
number of images in the pass. Passes of one fixed size avoid this: a short pass is filled up with black images. Within a
pass, a kernel could still treat the places differently. Before the first pass, one image is therefore computed at all
places; passes have a fixed size only if its features are equal bit for bit.

On a GPU every pass of a model has the same size. On a CPU a filled pass would cost a single query as much as a full
one: there the fixed size is 1 in bfloat16, and in float32 passes have any size, because `Binarizer` computes the few
images near a threshold again, alone.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.networks.devices import exact_float32
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.reading import Normaliser

__all__ = ["ImageFeatures", "gpu_pass"]

# Types of devices on which passes have a fixed size above 1.
FILLED = ("cuda",)

# Images in a pass on a GPU, and their pixels: 64 images of 160 x 160 pixels, 32 of 224 x 224.
_MAX_PASS, _MAX_PIXELS = 64, 64 * 160**2


def gpu_pass(side: int) -> int:
    """Return the number of images of `side` pixels in each pass on a GPU: a power of two, at most 64."""
    size = _MAX_PASS
    while size > 1 and size * side**2 > _MAX_PIXELS:
        size //= 2
    return size


class ImageFeatures:
    """The backbone of a model, for prepared images: features are the mean over the orientations and sizes of the card.

    In float32 without TensorFloat-32, or in bfloat16 if the card says so.
    """

    def __init__(
        self, network: HashNetwork, preprocessing: Preprocessing, precision: str, device: torch.device
    ) -> None:
        """The network is on `device`; `InputError` if the preprocessing has no mean and standard deviation."""
        self._network, self._preprocessing, self._device = network, preprocessing, device
        self._is_half = precision == "bfloat16"
        self.normalise = Normaliser(preprocessing, device)

    @cached_property
    def pass_size(self) -> int | None:
        """Number of images in each pass of the backbone; None if passes have any size.

        With a number, features do not depend on the other images of a call.
        """
        # Where kernels sum in another order, outputs of a linear head on ViT-S differ by 3e-7 of their scale in float32
        # and by 1.9e-3 in bfloat16, and of 64 outputs the nearest is usually within 3e-3 of its threshold: in bfloat16,
        # nearly every image would be computed again, alone.
        otherwise = 1 if self._is_half else None
        if self._device.type not in FILLED:
            return otherwise
        size = gpu_pass(self._preprocessing.crop)
        return size if self._are_places_equal(size) else otherwise

    def __call__(self, images: Pixels) -> Tensor:
        """Return features float32 [N, D] of prepared images [N, crop, crop, C]; without a fixed size, in one pass.

        Call it in `exact_float32`.
        """
        size = self.pass_size
        if size is None or not len(images):
            return self._pass(images)
        features = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            filling = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
            features.append(self._pass(np.concatenate([part, filling]))[: len(part)])
        return torch.cat(features)

    def _are_places_equal(self, size: int) -> bool:
        """Return whether an image has the same features at all places of a pass of `size` images."""
        side, channels = self._preprocessing.crop, self._preprocessing.channels
        noise = np.random.default_rng(0).integers(0, 256, (side, side, channels)).astype(self._preprocessing.dtype)
        with torch.inference_mode(), exact_float32(self._device):
            features = self._pass(np.repeat(noise[None], size, axis=0))
        return bool((features == features[:1]).all())

    def _pass(self, images: Pixels) -> Tensor:
        """Return the features of images, which go through the backbone together."""
        features = []
        for orientation in range(self._preprocessing.orientations):
            turned = np.rot90(images, orientation % 4, axes=(1, 2))
            view = self.normalise(turned if orientation < 4 else turned[:, :, ::-1])
            features.append(self._backbone(view))
            for side in self._preprocessing.smaller:
                resampled = F.interpolate(view, (side, side), mode="bilinear", antialias=True)
                features.append(self._backbone(resampled))
        return torch.stack(features).mean(dim=0)

    def _backbone(self, images: Tensor) -> Tensor:
        # `exact_float32` switches autocast off.
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_half):
            features = self._network.features(images)
        return features.float() if features.dtype == torch.bfloat16 else features
