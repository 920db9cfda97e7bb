"""A query and its answer, as the engine, the gateway and the client all see them. Free of numpy and of protobuf."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from orbithash.search.protocol.errors import InvalidQuery

__all__ = [
    "INCLUDABLE",
    "MAX_EXAMPLES",
    "MAX_FILTER_CHARS",
    "MAX_IMAGE_BYTES",
    "MAX_K",
    "MAX_KEY_CHARS",
    "MAX_SHARDS",
    "MAX_TEXT_CHARS",
    "Answer",
    "Coverage",
    "Cursor",
    "Example",
    "Hit",
    "Query",
    "check_num_shards",
]

MAX_K = 10_000
MAX_IMAGE_BYTES = 10 * 2**20
MAX_KEY_CHARS = 4096
MAX_TEXT_CHARS = 2000
MAX_FILTER_CHARS = 4096
MAX_EXAMPLES = 64
MAX_SHARDS = 1024

# What of a row an answer holds only where it is asked for.
INCLUDABLE = ("uri", "caption", "thumbnail", "footprint", "code")


def check_num_shards(count: int) -> None:
    """Raises `InvalidQuery` for a number of shards that cannot be asked for; 0 is as many as now."""
    if not 0 <= count <= MAX_SHARDS:
        raise InvalidQuery(("shards", f"from 1 to {MAX_SHARDS}, or 0 for as many as now; got {count}"))


class Cursor(NamedTuple):
    """A place in the order of an answer: what comes after it is the next page."""

    distance: int
    id: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """Something that has a code, exactly one of `image`, `text`, `code` and `key`.

    Attributes:
        image: an encoded image file, at most `MAX_IMAGE_BYTES`.
        text: a sentence, for a model with a text side.
        code: a packed code of the archive's width.
        key: the key of a row of the archive, whose code it is.
    """

    image: bytes | None = None
    text: str | None = None
    code: bytes | None = None
    key: str | None = None

    def problems(self, where: str) -> list[tuple[str, str]]:
        """What can be seen to be wrong without the archive: (field, problem); `where` is the field of the whole."""
        problems: list[tuple[str, str]] = []
        given = [name for name in ("image", "text", "code", "key") if getattr(self, name) is not None]
        if len(given) != 1:
            told = " and ".join(given) or "none"
            problems.append((where, f"give exactly one of image, text, code and key, got {told}"))
        if self.image is not None and not 0 < len(self.image) <= MAX_IMAGE_BYTES:
            problems.append(("image", f"an image file has 1 to {MAX_IMAGE_BYTES:,} bytes, got {len(self.image):,}"))
        if self.text is not None and not 0 < len(self.text) <= MAX_TEXT_CHARS:
            problems.append(("text", f"a sentence has 1 to {MAX_TEXT_CHARS:,} characters, got {len(self.text):,}"))
        if self.key is not None and not 0 < len(self.key) <= MAX_KEY_CHARS:
            problems.append(("key", f"a key has 1 to {MAX_KEY_CHARS:,} characters, got {len(self.key):,}"))
        return problems


@dataclass(frozen=True, kw_only=True)
class Query(Example):
    """What to look for, how many hits to return, and which rows and columns count.

    It is one example, or several: rows near the `positives` and not near the `negatives`. Then each bit of the code
    that is searched for is what the share of positives says less the share of negatives; where that is even, it is the
    first positive's. Without negatives no code has a smaller sum of distances to the positives. Examples that are rows
    of the archive are hits like any other; a filter leaves them out.

    Attributes:
        positives: examples of what is wanted, at most `MAX_EXAMPLES` together with the negatives.
        negatives: examples of what is not.
        k: number of hits, 1 to `MAX_K`.
        radius: the largest distance of a hit, inclusive; None: any.
        filter: rows that count, as an expression in CQL2 text (see `filters`); "": all.
        after: the last hit of the page before; None: the first page.
        include: columns of `INCLUDABLE` that the hits hold.
        min_coverage: an answer that covers less of the archive than this share is an error.
    """

    positives: tuple[Example, ...] = ()
    negatives: tuple[Example, ...] = ()
    k: int = 10
    radius: int | None = None
    filter: str = ""
    after: Cursor | None = None
    include: tuple[str, ...] = ()
    min_coverage: float = 0.0

    def check(self) -> None:
        """Raises `InvalidQuery` with all that can be seen to be wrong without the archive."""
        examples = (*self.positives, *self.negatives)
        alone = [name for name in ("image", "text", "code", "key") if getattr(self, name) is not None]
        if not examples:
            problems = self.problems("query")
        else:
            problems = [problem for example in examples for problem in example.problems("examples")]
            if alone:
                problems.append(("query", f"give examples or one {alone[0]}, not both"))
            if not self.positives:
                problems.append(("positives", "at least one example of what is wanted is needed"))
            if len(examples) > MAX_EXAMPLES:
                problems.append(("examples", f"at most {MAX_EXAMPLES} examples are allowed, got {len(examples)}"))
        if not _is_whole(self.k) or not 1 <= self.k <= MAX_K:
            problems.append(("k", f"k is a whole number from 1 to {MAX_K:,}, got {self.k!r}"))
        if self.radius is not None and (not _is_whole(self.radius) or self.radius < 0):
            problems.append(("radius", f"a radius is a whole number of bits from 0, got {self.radius!r}"))
        if self.after is not None and not (0 <= self.after.distance < 2**31 and 0 <= self.after.id < 2**64):
            problems.append(("after", f"a cursor is the distance and the id of a hit, got {tuple(self.after)}"))
        if len(self.filter) > MAX_FILTER_CHARS:
            problems.append(("filter", f"at most {MAX_FILTER_CHARS:,} characters, got {len(self.filter):,}"))
        if unknown := [name for name in self.include if name not in INCLUDABLE]:
            problems.append(("include", f"no column {unknown[0]!r}; there are {', '.join(INCLUDABLE)}"))
        if len(set(self.include)) < len(self.include):
            problems.append(("include", f"each column once, got {len(self.include)} of which some are equal"))
        if not 0 <= self.min_coverage <= 1:
            problems.append(("min_coverage", f"a share from 0 to 1, got {self.min_coverage!r}"))
        if problems:
            raise InvalidQuery(*dict.fromkeys(problems))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Hit(NamedTuple):
    """One row of the archive: `rank` counts from 1, `distance` is in bits, `lon` and `lat` in degrees WGS 84.

    `extra` holds the columns that the query includes.
    """

    rank: int
    distance: int
    id: int
    key: str
    label: str | None
    lon: float | None
    lat: float | None
    datetime: datetime | None
    # Nobody writes into it.
    extra: dict[str, Any] = {}  # noqa: RUF012


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


class Answer(NamedTuple):
    """The hits by (distance, id), exact within `coverage`.

    `ties_at_cutoff` is the number of searched rows at the distance of the last hit, the hits included and those of
    earlier pages not. `next` is the cursor of the next page, None where there is none. `matching_rows` is the number of
    rows that pass the filter, None without one. `is_exact` is false for an index that compares a query with some of the
    codes only (`ivf`, `hnsw`): rows nearer than the hits may then be missing.
    """

    hits: tuple[Hit, ...]
    ties_at_cutoff: int
    coverage: Coverage
    took_ms: float
    model_id: str
    archive_version: int
    next: Cursor | None = None
    matching_rows: int | None = None
    is_exact: bool = True
