"""Interfaces between the engine and the parts that it is built from: archives and query encoders.

Those of shards are in `orbithash.search.shards.interface`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Encoded, Kind
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.index.answers import Ids

__all__ = ["ArchiveReader", "Covered", "Picture", "QueryEncoder"]


class Picture(NamedTuple):
    """A JPEG file, and the number of pixels of its sides."""

    image: bytes
    width: int
    height: int


class Covered(NamedTuple):
    """What a model computes for an image with one part covered.

    Attributes:
        outputs: int8 [1 + cells^2, K]: of the image as it is, then with each cell covered, row by row.
        box: the part of the image that the network sees and that the cells divide: left, top, right and bottom as
            fractions of its width and height.
    """

    outputs: npt.NDArray[np.int8]
    box: tuple[float, float, float, float]


class ArchiveReader(Protocol):
    """One version of an archive, which does not change (`orbithash.encoders.archive.archive.Archive`)."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def vector(self) -> VectorSpec | None:
        """The stored vectors in the column `vector`; None: there is none."""

    @property
    def model_id(self) -> str:
        """Content hash of the model that computed the codes."""

    @property
    def version(self) -> int:
        """Number of the version."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    def find(self, keys: Sequence[str]) -> dict[str, int]:
        """Return the ids of the rows with these keys; keys without a row are omitted."""

    def exist(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return whether a row has each of these ids, bool [N]."""

    def take(self, ids: Ids, columns: list[str]) -> Any:
        """Return a `pyarrow.Table` of the rows with these ids, in the order of `ids`."""


class QueryEncoder(Protocol):
    """The model that computed the codes of an archive."""

    has_text: bool
    # Dimensions of a vector that the model takes.
    num_features: int
    # Name of the published embedding that the model takes instead of images, which may be empty; None: it takes images.
    embedding: str | None
    # Whether images of rows may be read, beside their thumbnails.
    has_views: bool

    async def encode(self, kind: Kind, items: list[Any], with_outputs: bool = False) -> Encoded:
        """Return the codes of at least one item and, with `with_outputs`, the outputs of the head.

        Items of one call, and of calls at the same time, share passes of the network.

        Args:
            kind: what the items are.
            items: `image`: encoded image files; `text`: sentences; `vector`: float32 [num_features] each.
            with_outputs: return outputs too.

        Raises:
            InputError: a file is not an image that the model accepts, or the model has no text side. The message is
                shown to the user, so an implementation must not wrap it in another exception.
        """

    async def encode_rows(self, images: list[bytes]) -> tuple[Encoded, list[bytes]]:
        """Return what `encode` returns for image files, without outputs, and the thumbnail of each image as JPEG."""

    async def view(self, source: bytes | str, max_side: int) -> Picture | None:
        """Return a picture of an image for people, with sides of at most `max_side` pixels.

        Args:
            source: a thumbnail, or the uri of a row.
            max_side: pixels.

        Returns None for a uri that may not be read. Raises `ImageError` for an image that cannot be read.
        """

    async def cover(self, source: bytes | str, cells: int) -> Covered | None:
        """Return the outputs for an image as it is, and with each of `cells` x `cells` parts of it covered.

        `source` and errors are those of `view`.
        """
