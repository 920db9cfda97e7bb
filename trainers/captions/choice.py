"""The choice of one caption per image, the same in validation, in evaluation and for every other reader."""

import numpy as np

__all__ = ["drawn_caption"]


def drawn_caption(image_id: str, num_captions: int, seed: int) -> int:
    """Return the index of the caption that stands for an image, 0 for an image without captions.

    The manifest's `seed` and the id of the image draw it: adding or removing other images changes nothing.
    """
    if num_captions == 0:
        return 0
    return int(np.random.default_rng([seed, *image_id.encode()]).integers(num_captions))
