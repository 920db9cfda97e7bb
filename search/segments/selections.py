"""Selections: the rows of each segment that pass a filter, computed once and kept for later queries.

A segment never changes, so a selection stays right in every version that has the segment: after a change, only the new
small segment is looked at. Filters are evaluated in a few threads of their own, which no other request needs.
"""

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from orbithash.search.index.code_rows import CodeRows, FewRows, few_rows
from orbithash.search.protocol.errors import Overloaded
from orbithash.search.segments import bits
from orbithash.search.segments.bits import Bits
from orbithash.search.segments.filters.conditions import FilterColumns
from orbithash.search.segments.filters.expressions import Filter, parse_filter
from orbithash.search.segments.stop import Stop

__all__ = ["MAX_KEPT_BYTES", "MAX_WARMED", "Selected", "Selections", "lower_priority"]

# Default maximum of the memory of the selections that are kept.
MAX_KEPT_BYTES = 128 * 2**20

# Evaluations that run at the same time, and those that may wait for a thread.
_NUM_THREADS, _MAX_WAITING = 2, 64

# Evaluations give way to searches: the priority of their threads is this much lower (see nice(2)).
_NICE = 5

# Filters that are evaluated before a segment replaces others.
MAX_WARMED = 8

# A segment of at most this many rows is evaluated at once, in the thread of the caller.
_MAX_SMALL = 4096

# Parsed filters that are kept, and the characters of their texts together: the largest has 500,000.
_MAX_PARSED, _MAX_PARSED_CHARACTERS = 64, 2**21

# The numbers and codes of the rows of a selection are listed if at most one row in this many passes.
_FEW = 16


class Selected(NamedTuple):
    """The rows of one segment that pass a filter, whether they still exist in a version or not.

    Attributes:
        passing: the rows.
        num_passing: number of the rows.
        few: numbers and codes of the rows if few pass; else None.
    """

    passing: Bits
    num_passing: int
    few: FewRows | None


class FilteredSegment(Protocol):
    """What is asked of a segment."""

    @property
    def name(self) -> str:
        """Hash of the content."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    @property
    def columns(self) -> FilterColumns:
        """Columns of the rows."""

    @property
    def code_rows(self) -> CodeRows:
        """Codes of the rows."""


_Key = tuple[str, str]
"""Text of the filter and name of the segment."""


@dataclass
class _Evaluation:
    """A filter that is being evaluated over a segment.

    Attributes:
        stop: ends the evaluation.
        num_waiting: number of calls that wait for the result.
        future: the result.
    """

    stop: Stop = field(default_factory=Stop)
    num_waiting: int = 0
    future: Future[Selected] = field(default_factory=Future)


class Selections:
    """The selections of the segments of one process, by filter and segment. Thread-safe."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        """Keep the most recently used selections, at most `max_bytes` of them together."""
        self._max_bytes = max_bytes
        self._executor = ThreadPoolExecutor(_NUM_THREADS, "filter", initializer=lower_priority)
        self._lock = threading.Lock()
        self._filters: OrderedDict[str, Filter] = OrderedDict()
        self._kept: OrderedDict[_Key, Selected] = OrderedDict()
        self._num_bytes = 0
        self._pending: dict[_Key, _Evaluation] = {}
        self._num_running = 0
        self._num_evaluations = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the selections that are kept, in bytes."""
        return self._num_bytes

    @property
    def num_evaluations(self) -> int:
        """Number of evaluations of a filter over a segment that were completed."""
        return self._num_evaluations

    @property
    def num_running(self) -> int:
        """Number of evaluations that a thread works on, also those that are about to stop."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """Number of waiting calls, counted once for each evaluation that they wait for."""
        with self._lock:
            return sum(evaluation.num_waiting for evaluation in self._pending.values())

    def is_ready(self, text: str, segments: Sequence[FilteredSegment]) -> bool:
        """Return whether `select` has no work to do but on small segments. Takes microseconds, and parses nothing."""
        with self._lock:
            is_parsed = text in self._filters
            return all(
                (text, segment.name) in self._kept or (is_parsed and segment.num_rows <= _MAX_SMALL)
                for segment in segments
            )

    def select(self, text: str, segments: Sequence[FilteredSegment], stop: Stop) -> list[Selected]:
        """Return the rows of each segment that pass a filter. Blocks while the filter is evaluated.

        Concurrent calls share evaluations. An evaluation stops when no call waits for it any more.

        Raises:
            InvalidQuery: the filter is invalid.
            Overloaded: too many evaluations are waiting.
            Stopped: `stop` was set first.
        """
        stop.check()
        if (every := self._find(text, segments)) is not None:
            return every
        filter_ = self._parse(text)
        selected, small, evaluations = self._begin(filter_, segments)
        try:
            for segment in small:
                selected[segment.name] = self._evaluate((filter_.text, segment.name), filter_, segment, stop)
            for name, evaluation in evaluations.items():
                selected[name] = stop.wait(evaluation.future)
        finally:
            self._leave(filter_, evaluations)
        return [selected[segment.name] for segment in segments]

    def warm(self, segment: FilteredSegment, replaced: Sequence[FilteredSegment], stop: Stop) -> None:
        """Evaluate, in this thread, recently used filters over a segment that is about to replace others.

        Those are at most `MAX_WARMED` of the filters whose selections of `replaced` segments are kept.
        """
        names = {each.name for each in replaced}
        with self._lock:
            texts = dict.fromkeys(text for text, name in reversed(self._kept) if name in names)
        # The most recently used one last, so that it is kept the longest.
        for text in reversed(list(texts)[:MAX_WARMED]):
            self._evaluate((text, segment.name), self._parse(text), segment, stop)

    def close(self) -> None:
        """Stop all evaluations; calls that wait for them raise `Stopped`."""
        with self._lock:
            for evaluation in self._pending.values():
                evaluation.stop.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _parse(self, text: str) -> Filter:
        with self._lock:
            if (filter_ := self._filters.get(text)) is not None:
                self._filters.move_to_end(text)
                return filter_
        filter_ = parse_filter(text)
        with self._lock:
            # All keys of one filter share its text.
            filter_ = self._filters.setdefault(text, filter_)
            while len(self._filters) > _MAX_PARSED or sum(map(len, self._filters)) > _MAX_PARSED_CHARACTERS:
                self._filters.popitem(last=False)
        return filter_

    def _find(self, text: str, segments: Sequence[FilteredSegment]) -> list[Selected] | None:
        """Return the selections of all segments if all are kept, else None."""
        keys = [(text, segment.name) for segment in segments]
        with self._lock:
            if not all(key in self._kept for key in keys):
                return None
            for key in keys:
                self._kept.move_to_end(key)
            return [self._kept[key] for key in keys]

    def _begin(
        self, filter_: Filter, segments: Sequence[FilteredSegment]
    ) -> tuple[dict[str, Selected], list[FilteredSegment], dict[str, _Evaluation]]:
        """Return, of the segments by name: selections that are kept, small segments without one, evaluations of others.

        The caller waits for the evaluations, which have begun now or before, until it calls `_leave`.
        """
        kept: dict[str, Selected] = {}
        small: list[FilteredSegment] = []
        large: list[tuple[_Key, FilteredSegment]] = []
        with self._lock:
            for segment in segments:
                key = (filter_.text, segment.name)
                if key in self._kept:
                    self._kept.move_to_end(key)
                    kept[segment.name] = self._kept[key]
                elif segment.num_rows <= _MAX_SMALL:
                    small.append(segment)
                else:
                    large.append((key, segment))
            is_new = any(key not in self._pending for key, _ in large)
            if is_new and len(self._pending) >= _NUM_THREADS + _MAX_WAITING:
                raise Overloaded(
                    f"{len(self._pending)} filters are being evaluated already; try again later", retry_after_s=1.0
                )
            return kept, small, {segment.name: self._join(key, filter_, segment) for key, segment in large}

    def _join(self, key: _Key, filter_: Filter, segment: FilteredSegment) -> _Evaluation:
        """Return the evaluation of a filter over a segment; begin it if there is none. The caller holds the lock."""
        if (evaluation := self._pending.get(key)) is None:
            evaluation = _Evaluation()
            evaluation.future = self._executor.submit(self._run, key, filter_, segment, evaluation)
            self._pending[key] = evaluation
        evaluation.num_waiting += 1
        return evaluation

    def _leave(self, filter_: Filter, evaluations: dict[str, _Evaluation]) -> None:
        """Stop waiting for evaluations; the last call that waits for one ends it."""
        with self._lock:
            for name, evaluation in evaluations.items():
                evaluation.num_waiting -= 1
                if not evaluation.num_waiting:
                    evaluation.stop.cancel()
                    # Takes it out of the queue if it has not begun.
                    evaluation.future.cancel()
                    self._forget((filter_.text, name), evaluation)

    def _run(self, key: _Key, filter_: Filter, segment: FilteredSegment, evaluation: _Evaluation) -> Selected:
        with self._lock:
            self._num_running += 1
        try:
            return self._evaluate(key, filter_, segment, evaluation.stop)
        finally:
            with self._lock:
                self._num_running -= 1
                self._forget(key, evaluation)

    def _forget(self, key: _Key, evaluation: _Evaluation) -> None:
        """Take an evaluation out of the pending ones. A later one of the same key stays."""
        if self._pending.get(key) is evaluation:
            del self._pending[key]

    def _evaluate(self, key: _Key, filter_: Filter, segment: FilteredSegment, stop: Stop) -> Selected:
        """Evaluate a filter over a segment, and keep the selection."""
        passing = filter_.passing(segment.columns, segment.num_rows, stop)
        num_passing = bits.count(passing)
        few = few_rows(segment.code_rows, passing) if num_passing * _FEW <= segment.num_rows else None
        selected = Selected(passing, num_passing, few)
        self._keep(key, selected)
        return selected

    def _keep(self, key: _Key, selected: Selected) -> None:
        num_bytes = _num_bytes(key, selected)
        with self._lock:
            self._num_evaluations += 1
            if key in self._kept or num_bytes > self._max_bytes:
                return
            self._kept[key] = selected
            self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= _num_bytes(*self._kept.popitem(last=False))


def _num_bytes(key: _Key, selected: Selected) -> int:
    few = sum(array.nbytes for array in selected.few) if selected.few is not None else 0
    # The text is counted for each segment, although they share it, and some objects of Python.
    return selected.passing.nbytes + few + sys.getsizeof(key[0]) + 512


def lower_priority() -> None:
    """Let the calling thread give way to threads that answer searches."""
    # Elsewhere, threads have no priorities of their own.
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
