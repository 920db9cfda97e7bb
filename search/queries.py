"""A query and its answer, as the engine, the gateway and the client all see them. Free of numpy and of protobuf."""

from dataclasses import dataclass
from datetime import datetime

from orbithash.search.errors import InvalidQuery

__all__ = ["MAX_IMAGE_BYTES", "MAX_K", "MAX_KEY_CHARS", "Answer", "Coverage", "Hit", "Query"]

MAX_K = 10_000
MAX_IMAGE_BYTES = 10 * 2**20
MAX_KEY_CHARS = 4096


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to look for, exactly one of `image`, `code` and `key`, and how many hits to return.

    Attributes:
        image: an encoded image file, at most `MAX_IMAGE_BYTES`.
        code: a packed code of the archive's width.
        key: the key of a row of the archive, whose code is the query.
        k: number of hits, 1 to `MAX_K`.
    """

    image: bytes | None = None
    code: bytes | None = None
    key: str | None = None
    k: int = 10

    def check(self) -> None:
        """Raises `InvalidQuery` with all that can be seen to be wrong without the archive."""
        problems: list[tuple[str, str]] = []
        given = [name for name in ("image", "code", "key") if getattr(self, name) is not None]
        if len(given) != 1:
            problems.append(("query", f"give exactly one of image, code and key, got {' and '.join(given) or 'none'}"))
        if self.image is not None and not 0 < len(self.image) <= MAX_IMAGE_BYTES:
            problems.append(("image", f"an image file has 1 to {MAX_IMAGE_BYTES:,} bytes, got {len(self.image):,}"))
        if self.key is not None and not 0 < len(self.key) <= MAX_KEY_CHARS:
            problems.append(("key", f"a key has 1 to {MAX_KEY_CHARS:,} characters, got {len(self.key):,}"))
        if not isinstance(self.k, int) or isinstance(self.k, bool) or not 1 <= self.k <= MAX_K:
            problems.append(("k", f"k is a whole number from 1 to {MAX_K:,}, got {self.k!r}"))
        if problems:
            raise InvalidQuery(*problems)


@dataclass(frozen=True)
class Hit:
    """One row of the archive: `rank` counts from 1, `distance` is in bits, `lon` and `lat` in degrees WGS 84."""

    rank: int
    distance: int
    id: int
    key: str
    label: str | None
    lon: float | None
    lat: float | None
    datetime: datetime | None


@dataclass(frozen=True)
class Coverage:
    """Which part of the archive an answer speaks for."""

    searched_rows: int
    total_rows: int
    answered_shards: int
    total_shards: int

    @property
    def fraction(self) -> float:
        """Part of the rows that was searched; 1 where there are none. Below 1 the answer is partial."""
        return self.searched_rows / self.total_rows if self.total_rows else 1.0


@dataclass(frozen=True)
class Answer:
    """The hits by (distance, id), exact within `coverage`.

    `ties_at_cutoff` is the number of searched rows at the distance of the last hit, the hits included.
    """

    hits: tuple[Hit, ...]
    ties_at_cutoff: int
    coverage: Coverage
    took_ms: float
    model_id: str
    archive_version: int
