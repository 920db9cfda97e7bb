"""The answer to a state: which rows are shown, in which order, and how complete the answer is."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from orbithash.search.client import AsyncClient
from orbithash.search.detectors import Detector
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.queries import Answer, Column, Coverage, Cursor, Hit
from orbithash.search.protocol.rankings import Linear, Place, RankAnswer, RankCursor, Shuffle, TimeOrder
from orbithash.search.web.page.detector import read_detector
from orbithash.search.web.page.examples import Examples, read_examples
from orbithash.search.web.page.filters import filter_text
from orbithash.search.web.page.state import State

__all__ = ["MAX_SORTED", "Answers", "Order", "Shown"]

# Nearest rows that are put into the order of their times.
MAX_SORTED = 2000
# Rows of one call of an export.
_EXPORT_ROWS = 1000

Order = Literal["distance", "score", "place", "time", "random"]


@dataclass(frozen=True)
class Shown:
    """A part of the answer to a state.

    Attributes:
        hits: rows in the order in which they are shown, without the hidden ones.
        order: the value that decides the order.
        after: the position after which the next part begins, for `Answers.page`; "": there is no next part.
        coverage: the part of the archive that was searched.
        took_ms: time in the search engine, in milliseconds.
        model_id, archive_version: what was searched.
        matching_rows: rows that pass the filter; None without a filter.
        within_rows: rows that the cut-off lets in; None: unknown.
        ties_at_cutoff: rows at the distance of the last hit; 0 if the order is another one.
        is_exact: whether no nearer row can be missing.
        is_bounded: whether only the nearest `MAX_SORTED` rows were put into the order of their times.
    """

    hits: tuple[Hit, ...]
    order: Order
    after: str
    coverage: Coverage
    took_ms: float
    model_id: str
    archive_version: int
    matching_rows: int | None = None
    within_rows: int | None = None
    ties_at_cutoff: int = 0
    is_exact: bool = True
    is_bounded: bool = False


@dataclass
class Answers:
    """The answer to one state, in parts.

    Attributes:
        detector: the detector that decides the order, if there is one.
        examples: set by `prepare`.
        notes: sentences for the user about what is missing; set by `prepare`.
        problem: why the marks have no effect, "" if they have; set by `prepare`.
    """

    client: AsyncClient
    state: State
    description: Description
    detector: Detector | None = None
    examples: Examples = field(default_factory=lambda: Examples({}, {}, ()))
    notes: tuple[str, ...] = ()
    problem: str = ""
    _prepared: bool = False

    async def prepare(self) -> None:
        """Read the marked rows, and fit the detector if the state asks for one."""
        self._prepared = True
        state = self.state
        self.examples = await read_examples(self.client, state, self.description)
        self.notes, self.problem = self.examples.notes, self.examples.problem
        if not state.find and not state.detector:
            return
        if not self.description.vector_dims:
            self.notes += (
                "This archive stores no vectors, so a detector cannot run on it. The tiles shown are those nearest to "
                "the marked ones. Encode the archive with a model that has vector_dims to get detectors.",
            )
        elif state.find and not any(row in self.examples.rows for row in state.good):
            self.problem = "Mark at least one tile as good (+): a detector learns from marked tiles."
        else:
            self.detector = await read_detector(self.client, state, self.description)

    async def page(self, after: str = "", limit: int = 60, include: Sequence[Column] = ()) -> Shown:
        """Return the part of the answer after a position, at most `limit` rows. Raises `SearchError`."""
        if not self._prepared:
            await self.prepare()
        if self.state.sort != "near" and self._is_near_to_something:
            shown = await self._sorted(after, limit, include)
        else:
            shown = await self._part(after, limit, include)
        hidden = set(self.state.hide)
        return replace(shown, hits=tuple(hit for hit in shown.hits if hit.id not in hidden))

    async def pages(self, include: Sequence[Column] = (), limit: int | None = None) -> AsyncIterator[Shown]:
        """Yield all parts of the answer, for exports, at most `limit` rows. Raises `SearchError`."""
        after, num_rows = "", 0
        while True:
            size = _EXPORT_ROWS if limit is None else min(_EXPORT_ROWS, limit - num_rows)
            shown = await self.page(after, size, include)
            yield shown
            num_rows += len(shown.hits)
            after = shown.after
            if not after or (limit is not None and num_rows >= limit):
                return

    @property
    def _is_near_to_something(self) -> bool:
        return bool(self.detector or self.examples.query or self.state.near)

    async def _part(self, after: str, limit: int, include: Sequence[Column]) -> Shown:
        state = self.state
        common: dict[str, Any] = {"k": limit, "filter": filter_text(state), "include": tuple(include)}
        if self.detector is None and self.examples.query:
            position = _position(after)
            search = self.client.search(
                **self.examples.query,
                **common,
                radius=state.radius,
                after=None if position is None else Cursor(*position),
            )
            if state.radius is None or position is not None:
                return _of_search(await search)
            # Beside each other: the tiles take no longer than without the count.
            answer, counts = await asyncio.gather(
                search, self.client.distances(**self.examples.query, filter=common["filter"])
            )
            return replace(_of_search(answer), within_rows=sum(counts.rows[: state.radius + 1]))
        by, order = self._ranking()
        min_score = None
        if isinstance(by, Linear) and not by.least_certain:
            min_score = state.min_score or 0.0
        position = _position(after)
        ranked = await self.client.rank(
            by, **common, min_score=min_score, after=None if position is None else RankCursor(*position)
        )
        return _of_rank(ranked, order)

    def _ranking(self) -> tuple[Linear | Place | Shuffle | TimeOrder, Order]:
        state = self.state
        if self.detector is not None:
            return self.detector.linear(least_certain=state.find == "unsure"), "score"
        if state.near is not None:
            lon, lat = state.near
            return Place(lon=lon, lat=lat), "place"
        if state.sort != "near":
            return TimeOrder(newest_first=state.sort == "newest"), "time"
        return Shuffle(seed=state.seed), "random"

    async def _sorted(self, after: str, limit: int, include: Sequence[Column]) -> Shown:
        """Return a part of the nearest rows in the order of their times; rows without a time are last."""
        nearest = await self._part("", MAX_SORTED, ())
        sign = -1 if self.state.sort == "newest" else 1
        ordered = sorted(nearest.hits, key=lambda hit: (hit.datetime is None, sign * _seconds(hit.datetime), hit.id))
        start = int(after) if after.isdecimal() and len(after) < 10 else 0
        hits = ordered[start : start + limit]
        if include and hits:
            rows = {
                row.id: row for row in (await self.client.get(ids=[hit.id for hit in hits], include=include)).values()
            }
            hits = [
                hit._replace(extra={name: getattr(rows[hit.id], name) for name in include})
                for hit in hits
                if hit.id in rows
            ]
        is_last = start + limit >= len(ordered)
        return replace(
            nearest,
            hits=tuple(hits),
            after="" if is_last else str(start + limit),
            within_rows=nearest.within_rows if nearest.after else len(ordered),
            ties_at_cutoff=0,
            is_bounded=bool(nearest.after),
        )


def _of_search(answer: Answer) -> Shown:
    return Shown(
        tuple(answer.hits),
        "distance",
        "" if answer.next is None else f"{answer.next.distance}.{answer.next.id}",
        answer.coverage,
        answer.took_ms,
        answer.model_id,
        answer.archive_version,
        answer.matching_rows,
        ties_at_cutoff=answer.ties_at_cutoff,
        is_exact=answer.is_exact,
    )


def _of_rank(answer: RankAnswer, order: Order) -> Shown:
    return Shown(
        tuple(answer.hits),
        order,
        "" if answer.next is None else f"{answer.next.key}.{answer.next.id}",
        answer.coverage,
        answer.took_ms,
        answer.model_id,
        answer.archive_version,
        answer.matching_rows,
        within_rows=answer.rows_within,
    )


def _position(after: str) -> tuple[int, int] | None:
    """Return the numbers of a position; None for the beginning, also for an invalid one."""
    try:
        value, row = map(int, after[:60].split("."))
    except ValueError:
        return None
    return (value, row) if -(2**63) <= value < 2**63 and 0 <= row < 2**64 else None


def _seconds(time: datetime | None) -> float:
    return 0.0 if time is None else (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
