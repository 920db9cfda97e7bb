"""Queries and answers, as the engine, the gateway and the client see them. Needs neither numpy nor protobuf."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

from orbithash.encoders.keys import key_problem
from orbithash.encoders.ranges import is_integer
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.forms import (
    CODE,
    IMAGE,
    MAX_IMAGE_BYTES,
    VECTOR,
    CodeField,
    ImageField,
    VectorField,
    vector_problem,
)

__all__ = [
    "INCLUDABLE",
    "LARGE_COLUMNS",
    "MAX_BATCH_HITS",
    "MAX_EXAMPLES",
    "MAX_FILTER_CHARS",
    "MAX_IMAGE_BYTES",
    "MAX_K",
    "MAX_LARGE_ROWS",
    "MAX_QUERIES",
    "MAX_SENTENCE_CHARS",
    "MAX_SHARDS",
    "MAX_SHORTLIST",
    "MAX_WEIGHT",
    "OVERSAMPLING",
    "Answer",
    "Column",
    "Content",
    "Coverage",
    "Cursor",
    "Example",
    "Hit",
    "Query",
    "Rescore",
    "check_filter",
    "check_include",
    "check_num_shards",
    "check_rescoring",
    "filter_problems",
    "has_large",
    "include_problems",
    "shortlist_size",
]

MAX_K = 10_000
# Queries of one batch, and hits of all its queries together.
MAX_QUERIES, MAX_BATCH_HITS = 256, 100_000
MAX_SENTENCE_CHARS = 2000
# A polygon of 10,000 vertices with coordinates of full precision has 400,000 characters.
MAX_FILTER_CHARS = 500_000
MAX_EXAMPLES = 64
# Of an example.
MAX_WEIGHT = 1000
MAX_SHARDS = 1024

# How the shortlist of a query is ranked again: by the cosine of stored vectors, or by the asymmetric distance between
# the outputs of the query's head and the codes; "": not at all.
Rescore = Literal["", "vector", "asymmetric"]
# Default size of a shortlist in multiples of k, and maximum number of its rows.
OVERSAMPLING, MAX_SHORTLIST = 4.0, 50_000

# Columns that hits and rows hold only on request.
Column = Literal["uri", "caption", "thumbnail", "footprint", "code", "vector"]
INCLUDABLE: tuple[Column, ...] = get_args(Column)
# Columns of up to some 100 KiB a row, and the maximum number of rows of one response that may hold them.
LARGE_COLUMNS = ("thumbnail", "footprint", "vector")
MAX_LARGE_ROWS = 1000


def check_num_shards(count: int) -> None:
    """Check a number of shards; 0 means the current number. Raises `InvalidQuery`."""
    if not 0 <= count <= MAX_SHARDS:
        raise InvalidQuery(("shards", f"from 1 to {MAX_SHARDS:,}, or 0 for the current number; got {count}"))


def check_filter(text: str) -> None:
    """Check the length of a filter. Raises `InvalidQuery`."""
    if problems := filter_problems(text):
        raise InvalidQuery(*problems)


def check_include(include: Sequence[str]) -> None:
    """Check names of columns to include. Raises `InvalidQuery`."""
    if problems := include_problems(include):
        raise InvalidQuery(*problems)


def check_rescoring(k: int, rescore: str, oversampling: float) -> None:
    """Check how to rescore. Raises `InvalidQuery`."""
    if problems := _rescore_problems(k, rescore, oversampling):
        raise InvalidQuery(*problems)


def shortlist_size(k: int, oversampling: float) -> int:
    """Return the number of rows of a shortlist, without those that tie with the last."""
    # Rounded first: 10 x 1.1 is above 11 in binary fractions.
    return math.ceil(round(k * oversampling, 6))


def has_large(include: Sequence[str]) -> bool:
    """Return whether `include` has a column of which one response holds at most `MAX_LARGE_ROWS`."""
    return any(name in LARGE_COLUMNS for name in include)


def filter_problems(text: str) -> list[tuple[str, str]]:
    """Return what is wrong with a filter, without parsing it."""
    if not isinstance(text, str):
        return [("filter", f"a filter is a string of CQL2 text, got {type(text).__name__}")]
    if len(text) > MAX_FILTER_CHARS:
        return [("filter", f"at most {MAX_FILTER_CHARS:,} characters, got {len(text):,}")]
    return []


def coverage_problems(min_coverage: float) -> list[tuple[str, str]]:
    """Return what is wrong with the smallest fraction of the archive that an answer may cover."""
    if isinstance(min_coverage, Real) and not isinstance(min_coverage, bool) and 0 <= min_coverage <= 1:
        return []
    return [("min_coverage", f"a fraction from 0 to 1, got {min_coverage!r}")]


def include_problems(include: Sequence[str]) -> list[tuple[str, str]]:
    """Return what is wrong with names of columns to include."""
    if isinstance(include, str):
        return [("include", f"a sequence of column names such as ('uri',), got the string {include[:80]!r}")]
    problems = []
    if unknown := [name for name in include if name not in INCLUDABLE]:
        problems.append(("include", f"unknown column {str(unknown[0])[:80]!r}; allowed: {', '.join(INCLUDABLE)}"))
    if len(set(include)) < len(include):
        problems.append(("include", f"a column is named twice among {len(include)}; name each column once"))
    return problems


def _rescore_problems(k: int, rescore: str, oversampling: float) -> list[tuple[str, str]]:
    if rescore not in get_args(Rescore):
        return [("rescore", f"{rescore!r}; allowed: vector and asymmetric, or empty for none")]
    if isinstance(oversampling, bool) or not isinstance(oversampling, int | float) or not oversampling >= 1:
        return [("oversampling", f"a number of at least 1, got {oversampling!r}")]
    if rescore and is_integer(k, 1, MAX_K) and not k * oversampling <= MAX_SHORTLIST:
        return [("oversampling", f"k x oversampling is at most {MAX_SHORTLIST:,}, got {k:,} x {oversampling:g}")]
    return []


class Cursor(NamedTuple):
    """A position in the order (distance, id) of an answer; the next page begins after it."""

    distance: int
    id: int


@dataclass(frozen=True, kw_only=True)
class Content:
    """What has a code: exactly one of `image`, `text`, `vector`, `code` and `key`.

    Attributes:
        image: an encoded image file of at most `MAX_IMAGE_BYTES`; may be given as bytes, as a path or as a PIL image.
        text: a sentence, for a model with a text encoder.
        vector: the input of the model's head of images, as the bytes of float32; may be given as a float array or as a
            list of numbers.
        code: a packed code of the archive's number of bits; may be given as bytes or as a uint8 array.
        key: the key of a row of the archive, whose code is used.
    """

    image: ImageField = IMAGE
    text: str | None = None
    vector: VectorField = VECTOR
    code: CodeField = CODE
    key: str | None = None

    def problems(self, field: str) -> list[tuple[str, str]]:
        """Return (field, problem) for everything that can be checked without the archive.

        `field` names the whole.
        """
        problems: list[tuple[str, str]] = []
        given = self.given()
        if len(given) != 1:
            got = " and ".join(given) or "none"
            problems.append((field, f"give exactly one of image, text, vector, code and key, got {got}"))
        if self.image is not None and not 0 < len(self.image) <= MAX_IMAGE_BYTES:
            problems.append(("image", f"an image file has 1 to {MAX_IMAGE_BYTES:,} bytes, got {len(self.image):,}"))
        if self.text is not None and not isinstance(self.text, str):
            problems.append(("text", f"a sentence is a string, got {type(self.text).__name__}"))
        elif self.text is not None and not 0 < len(self.text) <= MAX_SENTENCE_CHARS:
            problems.append(("text", f"a sentence has 1 to {MAX_SENTENCE_CHARS:,} characters, got {len(self.text):,}"))
        if self.vector is not None and (problem := vector_problem(self.vector)):
            problems.append(("vector", problem))
        if self.key is not None and not isinstance(self.key, str):
            problems.append(("key", f"a key is a string, got {type(self.key).__name__}"))
        elif self.key is not None and (problem := key_problem(self.key)):
            problems.append(("key", problem))
        return problems

    def given(self) -> list[str]:
        """Return the names of the fields among image, text, vector, code and key that are set."""
        return [name for name in ("image", "text", "vector", "code", "key") if getattr(self, name) is not None]


@dataclass(frozen=True, kw_only=True)
class Example(Content):
    """One of several contents of a query.

    Attributes:
        weight: the weight of its vote, above 0 and at most `MAX_WEIGHT`.
    """

    weight: float = 1.0

    def problems(self, field: str) -> list[tuple[str, str]]:
        """Return (field, problem), see `Content.problems`."""
        problems = super().problems(field)
        if not _is_weight(self.weight):
            problems.append(
                ("weight", f"a weight is a number above 0 and at most {MAX_WEIGHT:,}, got {self.weight!r:.80}")
            )
        return problems


def _is_weight(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= MAX_WEIGHT


@dataclass(frozen=True, kw_only=True)
class Query(Content):
    """What to search for, the number of hits, the rows to consider and the columns to return.

    A query is either one content or several examples: rows near the `positives` and not near the `negatives`. Each bit
    of the query's code is then decided by a vote. Images, sentences and vectors vote with the model's output for the
    bit, in proportion to the sum of the magnitudes of their outputs; codes and keys vote equally for all of their bits.
    A vote counts times the weight of the example: positives vote for their bit, negatives against it, divided by the
    number of examples of the group; the first positive breaks ties. Codes and keys of equal weight so decide by
    majority, and without negatives no code has a smaller sum of distances to them. Examples that are rows of the
    archive can be hits; a filter can exclude them.

    Attributes:
        positives: positive examples, at most `MAX_EXAMPLES` together with the negatives.
        negatives: negative examples.
        k: maximum number of hits, 1 to `MAX_K`; at most `MAX_LARGE_ROWS` with thumbnails, footprints or vectors.
        radius: the largest distance of a hit in bits, inclusive; None: no limit.
        filter: an expression in CQL2 text that rows have to pass (see docs/operate/search.md); "": all rows.
        after: return hits after this position, `Answer.next` of the page before; None: the first page.
        include: columns of `INCLUDABLE` that the hits hold.
        min_coverage: an answer that covers a smaller fraction of the archive is an error.
        rescore: rank a shortlist of the nearest rows again. `vector`: by the cosine of stored vectors; `asymmetric`: by
            the sum of the query's outputs over the bits that differ. "": order by distance.
        oversampling: rows of the shortlist for each hit, at least 1; `MAX_SHORTLIST` limits their product with k.
    """

    positives: tuple[Example, ...] = ()
    negatives: tuple[Example, ...] = ()
    k: int = 10
    radius: int | None = None
    filter: str = ""
    after: Cursor | None = None
    include: tuple[Column, ...] = ()
    min_coverage: float = 0.0
    rescore: Rescore = ""
    oversampling: float = OVERSAMPLING

    @property
    def shortlist_size(self) -> int:
        """Number of rows to find by distance: k, or more to rescore them. Rows that tie with the last are added."""
        return shortlist_size(self.k, self.oversampling) if self.rescore else self.k

    def check(self) -> None:
        """Raise `InvalidQuery` with everything that can be checked without the archive."""
        examples = (*self.positives, *self.negatives)
        if not examples:
            problems = self.problems("query")
        else:
            problems = [problem for example in examples for problem in example.problems("examples")]
            if given := self.given():
                problems.append(("query", f"give examples or one {given[0]}, not both"))
            if not self.positives:
                problems.append(("positives", "at least one positive example is required"))
            if len(examples) > MAX_EXAMPLES:
                problems.append(("examples", f"at most {MAX_EXAMPLES} examples are allowed, got {len(examples)}"))
        if not is_integer(self.k, 1, MAX_K):
            problems.append(("k", f"k is a whole number from 1 to {MAX_K:,}, got {self.k!r}"))
        elif self.k > MAX_LARGE_ROWS and has_large(self.include):
            problems.append(
                ("k", f"at most {MAX_LARGE_ROWS:,} hits with {' or '.join(LARGE_COLUMNS)}, got k {self.k:,}; use pages")
            )
        if self.radius is not None and not is_integer(self.radius, 0, 2**32 - 1):
            problems.append(("radius", f"a radius is a whole number of bits from 0, got {self.radius!r}"))
        if self.after is not None and not _is_cursor(self.after):
            problems.append(("after", f"a cursor is the distance and the id of a hit, got {self.after!r}"))
        problems += filter_problems(self.filter)
        problems += include_problems(self.include)
        problems += coverage_problems(self.min_coverage)
        problems += _rescore_problems(self.k, self.rescore, self.oversampling)
        if self.rescore and self.after is not None:
            problems.append(("after", "a rescored answer has no pages; ask for more hits with a larger k"))
        if problems:
            raise InvalidQuery(*problems)


def _is_cursor(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and is_integer(value[0], 0, 2**31 - 1)
        and is_integer(value[1], 0, 2**64 - 1)
    )


class Hit(NamedTuple):
    """One row of an answer: `rank` counts from 1, `distance` is in bits, `lon` and `lat` in degrees WGS 84.

    `extra` holds the columns that the query includes. `score` is that of a rescored answer: the cosine of the stored
    vectors (None: the row has none), or the asymmetric distance, which is smaller for nearer rows.
    """

    rank: int
    distance: int
    id: int
    key: str
    label: str | None
    lon: float | None
    lat: float | None
    datetime: datetime | None
    # Never modified.
    extra: dict[str, Any] = {}  # noqa: RUF012
    score: float | None = None


@dataclass(frozen=True)
class Coverage:
    """The part of the archive that was searched."""

    searched_rows: int
    total_rows: int
    answered_shards: int
    total_shards: int

    @property
    def fraction(self) -> float:
        """The fraction of rows that was searched; 1 for an archive without rows. Below 1 the answer is partial."""
        return self.searched_rows / self.total_rows if self.total_rows else 1.0


class Answer(NamedTuple):
    """The hits of a query, ordered by (distance, id) or rescored, and how complete they are.

    Attributes:
        hits: at most k hits; a tuple, or a sequence that is equal to it.
        ties_at_cutoff: number of searched rows at the distance of the last hit, hits of this page included, hits of
            earlier pages not. In a rescored answer: at the distance of the last row of the shortlist.
        coverage: the part of the archive that was searched.
        took_ms: time in the search engine, in milliseconds.
        model_id: content hash of the model that made the archive's codes.
        archive_version: version of the archive that was searched.
        next: position after which the next page begins; None if there is no next page.
        matching_rows: number of rows that pass the filter; None without a filter.
        is_exact: whether the hits are exactly the nearest rows of the searched part; False for an approximate index.
        shortlist_radius: distance of the last row of the shortlist; None without rescoring or rows.
        is_shortlist_bounded: whether the shortlist lacks rows that tie with its last, because there were too many.
    """

    hits: Sequence[Hit]
    ties_at_cutoff: int
    coverage: Coverage
    took_ms: float
    model_id: str
    archive_version: int
    next: Cursor | None = None
    matching_rows: int | None = None
    is_exact: bool = True
    shortlist_radius: int | None = None
    is_shortlist_bounded: bool = False
