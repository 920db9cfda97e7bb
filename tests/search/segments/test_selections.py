"""Selections: shared, kept, bounded, and stopped with the last call that waits for them."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from filter_rows import make_rows, segment_of, table_of

from orbithash.encoders.archive.archive import Archive
from orbithash.search.protocol.errors import InvalidQuery, Overloaded
from orbithash.search.segments import bits
from orbithash.search.segments import selections as selections_module
from orbithash.search.segments.columns import Columns
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import ShardHost
from orbithash.search.segments.selections import Selections
from orbithash.search.segments.stop import Stop, Stopped

ROWS = make_rows(5000)
TEXT = "label = 'harbor'"
EXPECTED = [row["label"] == "harbor" for row in ROWS]


class GatedColumns(Columns):
    """Columns that are read only while the gate is open.

    Attributes:
        gate: open when set.
        began: released when a thread wants to read.
        num_reads: number of columns that were asked for.
        failure: raised once instead of reading.
    """

    def __init__(self, columns):
        super().__init__(columns.num_rows, {name: columns.chunks(name) for name in columns.names}, columns.boxes())
        self.gate = threading.Event()
        self.began = threading.Semaphore(0)
        self.num_reads = 0
        self.failure = None

    def chunks(self, name):
        self.num_reads += 1
        self.began.release()
        assert self.gate.wait(60)
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        return super().chunks(name)


@pytest.fixture
def large():
    """A segment that is evaluated by the threads for filters; its gate is closed."""
    segment = segment_of(table_of(ROWS))
    segment.columns = GatedColumns(segment.columns)
    return segment


@pytest.fixture
def small():
    return segment_of(table_of(ROWS[:50]))


@pytest.fixture
def selections():
    each = Selections()
    yield each
    each.close()


@contextmanager
def callers(count):
    with ThreadPoolExecutor(count) as pool:
        yield pool


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def passing(selected, segment):
    return bits.to_mask(selected.passing, segment.num_rows).tolist()


def test_each_segment_is_evaluated_once(selections, large, small):
    large.columns.gate.set()
    assert not selections.is_ready(TEXT, [small, large])
    assert not selections.is_ready(TEXT, [small])
    for _ in range(3):
        first, second = selections.select(TEXT, [large, small], Stop(60))
        assert passing(first, large) == EXPECTED
        assert passing(second, small) == EXPECTED[:50]
        assert first.num_passing == sum(EXPECTED)
        assert large.columns.num_reads == 1
    assert selections.is_ready(TEXT, [small, large])
    assert selections.is_ready(TEXT, [large, segment_of(table_of(ROWS[:20]))])
    # A change brings a segment of its own; the others are not looked at again.
    change = segment_of(table_of(ROWS[60:80]))
    selected = selections.select(TEXT, [large, small, change], Stop(60))
    assert passing(selected[2], change) == EXPECTED[60:80]
    assert large.columns.num_reads == 1
    assert selections.num_evaluations == 3
    assert selections.select(TEXT, [], Stop(60)) == []
    assert selections.num_running == 0


def test_few_rows_are_listed(selections, large):
    large.columns.gate.set()
    ((_, num_many, many),) = selections.select(TEXT, [large], Stop(60))
    ((_, num_few, few),) = selections.select("key LIKE 'scenes/2021/4%'", [large], Stop(60))
    assert num_many * 16 > len(ROWS) >= num_few * 16 > 0
    assert many is None
    pytest.importorskip("orbithash.search.index.code_rows")
    assert few is not None


def test_calls_for_one_filter_share_its_evaluation(selections, large):
    with callers(5) as pool:
        stops = [Stop(60) for _ in range(5)]
        calls = [pool.submit(selections.select, TEXT, [large], stop) for stop in stops]
        until(lambda: selections.num_waiting == 5)
        # Those that leave do not stop what another one waits for.
        for call, stop in list(zip(calls, stops, strict=True))[:4]:
            stop.cancel()
            with pytest.raises(Stopped):
                call.result(60)
        large.columns.gate.set()
        ((selected),) = calls[4].result(60)
    assert passing(selected, large) == EXPECTED
    assert large.columns.num_reads == 1


def test_filters_with_short_deadlines_leave_no_work(selections, large, small):
    with callers(40) as pool:
        calls = [
            pool.submit(selections.select, f"lon > {number}", [large], Stop(0.05 + number / 1000))
            for number in range(40)
        ]
        for call in calls:
            with pytest.raises(Stopped):
                call.result(60)
    # Two threads were evaluating; neither goes on when it can, and no other filter begins.
    assert selections.num_running == 2
    assert selections.num_waiting == 0
    large.columns.gate.set()
    until(lambda: selections.num_running == 0)
    assert large.columns.num_reads == 2
    clocks = [time.pthread_getcpuclockid(thread.ident) for thread in selections._executor._threads]
    # The next filter is not behind others.
    assert passing(*selections.select(TEXT, [large], Stop(60)), large) == EXPECTED
    until(lambda: selections.num_running == 0)
    used = [time.clock_gettime(clock) for clock in clocks]
    for number in range(100):
        selections.select(f"lon > {number}", [small], Stop(60))
    assert sum(map(time.clock_gettime, clocks)) - sum(used) < 0.01


def test_other_queries_do_not_wait(selections, large, small):
    """Selections that are kept, those of small segments and invalid filters need no thread for filters."""
    large.columns.gate.set()
    selections.select(TEXT, [large], Stop(60))
    large.columns.gate.clear()
    with callers(5) as pool:
        calls = [pool.submit(selections.select, f"lon > {number}", [large], Stop(60)) for number in range(5)]
        until(lambda: selections.num_running == 2)
        assert passing(*selections.select(TEXT, [large], Stop(60)), large) == EXPECTED
        assert passing(*selections.select("label = 'beach'", [small], Stop(60)), small)
        with pytest.raises(InvalidQuery, match="no column 'colour'"):
            selections.select("colour = 'red'", [large], Stop(60))
        assert not selections.is_ready("colour = 'red'", [large])
        large.columns.gate.set()
        for call in calls:
            call.result(60)


def test_a_filter_that_was_given_up_is_evaluated_when_it_is_needed_again(selections, large):
    with callers(2) as pool:
        stop = Stop(60)
        first = pool.submit(selections.select, TEXT, [large], stop)
        assert large.columns.began.acquire(timeout=60)
        stop.cancel()
        with pytest.raises(Stopped):
            first.result(60)
        second = pool.submit(selections.select, TEXT, [large], Stop(60))
        assert large.columns.began.acquire(timeout=60)
        large.columns.gate.set()
        assert passing(*second.result(60), large) == EXPECTED


def test_nothing_begins_after_the_deadline(selections, large):
    with pytest.raises(Stopped):
        selections.select(TEXT, [large], Stop(0))
    assert large.columns.num_reads == 0


def test_too_many_filters_are_refused(selections, large, small, monkeypatch):
    monkeypatch.setattr(selections_module, "_MAX_WAITING", 3)
    with callers(8) as pool:
        calls = [pool.submit(selections.select, f"lon > {number}", [large], Stop(60)) for number in range(5)]
        until(lambda: selections.num_waiting == 5)
        with pytest.raises(Overloaded, match="5 filters are being evaluated"):
            selections.select("lon > 5", [large], Stop(60))
        # Small segments are never refused, and a filter that is being evaluated is shared.
        selections.select("lon > 5", [small], Stop(60))
        calls.append(pool.submit(selections.select, "lon > 0", [large], Stop(60)))
        until(lambda: selections.num_waiting == 6)
        large.columns.gate.set()
        for call in calls:
            call.result(60)
    assert selections.select("lon > 5", [large], Stop(60))


def test_the_least_recently_used_selections_are_dropped(large):
    large.columns.gate.set()
    # Of these selections, two have room in 3,000 bytes.
    for max_bytes, num_reads in ((2**20, 4), (3000, 5), (0, 8)):
        selections = Selections(max_bytes)
        large.columns.num_reads = 0
        for number in (0, 1, 0, 2, 0, 3, 0, 1):
            assert selections.select(f"lon > -{number}", [large], Stop(60))[0].num_passing
            assert selections.num_bytes <= max_bytes
        assert large.columns.num_reads == num_reads
        selections.close()


def test_recent_filters_are_evaluated_before_a_segment_replaces_others(selections, large, small):
    texts = [f"lon > -{number}" for number in range(12)]
    for text in [*texts, texts[0]]:
        selections.select(text, [small], Stop(60))
    merged = segment_of(table_of(ROWS))
    selections.warm(merged, [small, large], Stop(60))
    assert [text for text in texts if selections.is_ready(text, [merged])] == [texts[0], *texts[5:]]
    assert passing(*selections.select(texts[0], [merged], Stop(60)), merged) == [
        row["lon"] is not None and row["lon"] > 0 for row in ROWS
    ]
    with pytest.raises(Stopped):
        selections.warm(segment_of(table_of(ROWS)), [small], Stop(0))


def test_filters_in_use_are_ready_after_a_merge(tmp_path):
    rng = np.random.default_rng(0)
    archive = Archive.create(tmp_path / "archive", 8, "m" * 32)
    host = ShardHost(archive.path, 8, Deal(1, 20), 0)
    lon = rng.uniform(-180, 180, 10_000)
    for part in (slice(0, 5000), slice(5000, 10_000)):
        keys = [f"k{number}" for number in range(part.start, part.stop)]
        codes = rng.integers(0, 256, (5000, 1), np.uint8)
        table = Archive.table(codes, 8, keys, keys, lon=lon[part].tolist(), lat=[0.0] * 5000)
        archive.commit(Archive.write_fragments(archive.path, table))
        host.follow(archive.version)
        # In use before there is anything to merge: a merge does not know filters that are first used meanwhile.
        assert host.count(archive.version, "lon > 3", Stop(60)) == (lon[: part.stop] > 3).sum()
    until(lambda: not host._upkeep.work() and host.status().num_segments == 1)
    num_evaluations = host._selections.num_evaluations
    assert host.is_ready(archive.version, "lon > 3")
    assert host.count(archive.version, "lon > 3", Stop(60)) == (lon > 3).sum()
    assert host._selections.num_evaluations == num_evaluations
    host.close()


def test_parsed_filters_are_bounded(selections, small):
    """Whether a filter is parsed shows in whether it is ready for a segment that it has not seen."""
    change = segment_of(table_of(ROWS[:20]))

    def parsed(texts):
        return [text for text in texts if selections.is_ready(text, [change])]

    short = [f"lon > {number}" for number in range(70)]
    for text in short:
        selections.select(text, [small], Stop(60))
    assert parsed(short) == short[-64:]
    long = [f"key IN ('{number}', '{'x' * 400_000}')" for number in range(6)]
    for text in long:
        selections.select(text, [small], Stop(60))
    assert parsed(short) == []
    assert parsed(long) == long[-5:]


def test_a_failure_is_raised_and_not_kept(selections, large):
    large.columns.gate.set()
    large.columns.failure = MemoryError("no room")
    with pytest.raises(MemoryError, match="no room"):
        selections.select(TEXT, [large], Stop(60))
    assert passing(*selections.select(TEXT, [large], Stop(60)), large) == EXPECTED


def test_closing_ends_the_calls_that_wait(selections, large):
    with callers(4) as pool:
        calls = [pool.submit(selections.select, f"lon > {number}", [large], Stop(60)) for number in range(4)]
        until(lambda: selections.num_waiting == 4)
        selections.close()
        large.columns.gate.set()
        for call in calls:
            with pytest.raises(Stopped):
                call.result(60)


def test_waiting_ends_with_the_result_the_deadline_or_a_cancellation():
    done, never = Future(), Future()
    done.set_result(3)
    assert Stop().wait(done) == 3
    assert Stop().remaining_s is None
    with pytest.raises(Stopped):
        Stop(0.01).wait(never)
    stop = Stop(60)
    threading.Timer(0.01, stop.cancel).start()
    with pytest.raises(Stopped):
        stop.wait(never)
    with pytest.raises(Stopped):
        stop.check()
    with pytest.raises(Stopped):
        stop.wait(never)
    Stop().check()
    never.cancel()
    with pytest.raises(Stopped):
        Stop().wait(never)


@pytest.mark.parametrize("seed", range(3))
def test_many_threads_get_the_answers_of_one(seed):
    """Filters, segments, deadlines and evictions at random."""
    rng = np.random.default_rng(seed)
    tables = [table_of(make_rows(5000, number)) for number in range(3)] + [table_of(ROWS[:20])]
    segments = [segment_of(table) for table in tables]
    texts = [f"lon > {number} OR label = 'beach'" for number in range(6)]
    alone = Selections()
    expected = {
        text: [
            passing(one, segment) for one, segment in zip(alone.select(text, segments, Stop()), segments, strict=True)
        ]
        for text in texts
    }
    alone.close()
    selections = Selections(max_bytes=20_000)

    def call(number, timeout_s):
        chosen = [each for each in range(4) if (number >> each) & 1]
        text = texts[number % len(texts)]
        try:
            selected = selections.select(text, [segments[each] for each in chosen], Stop(timeout_s))
        except Stopped:
            return False
        return [passing(one, segments[each]) for one, each in zip(selected, chosen, strict=True)] == [
            expected[text][each] for each in chosen
        ]

    with callers(8) as pool:
        timeouts = [float(rng.choice([0, 0.001, 0.003, 60])) for _ in range(200)]
        answers = list(pool.map(call, rng.integers(0, 1 << 16, 200).tolist(), timeouts))
    assert all(answer for answer, timeout_s in zip(answers, timeouts, strict=True) if timeout_s == 60)
    until(lambda: selections.num_running == 0)
    assert selections.num_waiting == 0
    selections.close()
