import asyncio

import numpy as np
import pytest

from orbithash.search.engine.batching import Batcher
from orbithash.search.protocol.errors import Overloaded

CODE = np.zeros(2, np.uint8)


class Runs:
    """A `run` that records the codes and ks of each batch, and waits until the test opens its gate."""

    def __init__(self):
        self.batches = []
        self.timeouts = []
        self.gates = []
        self.arrived = asyncio.Event()

    async def __call__(self, codes, ks, group, timeout_s):
        gate = asyncio.Event()
        self.batches.append(([int(code[0]) for code in codes], list(ks)))
        self.timeouts.append(timeout_s)
        self.gates.append(gate)
        self.arrived.set()
        await gate.wait()
        return [(int(code[0]), k) for code, k in zip(codes, ks, strict=True)]

    async def next_arrival(self):
        await self.arrived.wait()
        self.arrived.clear()


def submit(batcher, number, k=10, timeout_s=60.0, group=None):
    code = np.array([number, 0], np.uint8)
    return asyncio.create_task(batcher.submit(code, k, group, asyncio.get_running_loop().time() + timeout_s))


async def let_tasks_run():
    # Each submit needs one turn of the event loop to enter the queue; more turns have no effect.
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_lone_query_leaves_at_once_and_those_behind_it_leave_together():
    async def scenario():
        runs = Runs()
        batcher = Batcher(runs, max_in_flight=1, max_waiting=100)
        first = submit(batcher, 1)
        await runs.next_arrival()
        others = [submit(batcher, number) for number in (2, 3, 4)]
        await let_tasks_run()
        assert runs.batches == [([1], [10])]
        runs.gates[0].set()
        await runs.next_arrival()
        assert runs.batches[1] == ([2, 3, 4], [10, 10, 10])
        runs.gates[1].set()
        assert await asyncio.gather(first, *others) == [(1, 10), (2, 10), (3, 10), (4, 10)]

    asyncio.run(scenario())


def test_those_that_arrive_in_one_turn_leave_together():
    async def scenario():
        runs = Runs()
        batcher = Batcher(runs, max_in_flight=1, max_waiting=100)
        tasks = [submit(batcher, number) for number in range(5)]
        await runs.next_arrival()
        assert runs.batches == [([0, 1, 2, 3, 4], [10] * 5)]
        runs.gates[0].set()
        assert len(await asyncio.gather(*tasks)) == 5

    asyncio.run(scenario())


def test_queries_of_other_groups_are_of_other_batches():
    async def scenario():
        runs = Runs()
        batcher = Batcher(runs, max_in_flight=1, max_waiting=100)
        tasks = [submit(batcher, number, group=number % 2) for number in range(6)]
        await runs.next_arrival()
        runs.gates[0].set()
        await runs.next_arrival()
        assert [codes for codes, _ in runs.batches] == [[0, 2, 4], [1, 3, 5]]
        runs.gates[1].set()
        assert len(await asyncio.gather(*tasks)) == 6

    asyncio.run(scenario())


def test_a_batch_holds_similar_k_only_and_oldest_first():
    async def scenario():
        runs = Runs()
        batcher = Batcher(runs, max_in_flight=1, max_waiting=100)
        tasks = [submit(batcher, 0)]
        await runs.next_arrival()
        tasks += [submit(batcher, number, k) for number, k in ((1, 8), (2, 10_000), (3, 15), (4, 16), (5, 9_000))]
        await let_tasks_run()
        for number in range(4):
            runs.gates[number].set()
            if number < 3:
                await runs.next_arrival()
        assert runs.batches[1:] == [([1, 3], [8, 15]), ([2, 5], [10_000, 9_000]), ([4], [16])]
        assert [k for _, k in await asyncio.gather(*tasks)] == [10, 8, 10_000, 15, 16, 9_000]

    asyncio.run(scenario())


@pytest.mark.parametrize(("k", "largest"), [(10, 64), (10_000, 26), (2**18, 1), (2**20, 1)])
def test_a_batch_is_bounded(k, largest):
    async def scenario():
        runs = Runs()
        batcher = Batcher(runs, max_in_flight=1, max_waiting=100)
        tasks = [submit(batcher, 0)]
        await runs.next_arrival()
        tasks += [submit(batcher, number, k) for number in range(70)]
        await let_tasks_run()
        runs.gates[0].set()
        await runs.next_arrival()
        assert len(runs.batches[1][1]) == largest
        for task in tasks:
            task.cancel()
        runs.gates[1].set()

    asyncio.run(scenario())


def test_as_many_fan_outs_as_allowed_are_in_flight():
    async def scenario():
        runs = Runs()
        batcher = Batcher(runs, max_in_flight=2, max_waiting=100)
        tasks = []
        for number in range(4):
            tasks.append(submit(batcher, number))
            await let_tasks_run()
        assert [codes for codes, _ in runs.batches] == [[0], [1]]
        runs.gates[1].set()
        runs.arrived.clear()
        await runs.next_arrival()
        assert runs.batches[2][0] == [2, 3]
        runs.gates[0].set()
        runs.gates[2].set()
        assert len(await asyncio.gather(*tasks)) == 4

    asyncio.run(scenario())


def test_a_batch_has_the_time_of_its_most_patient_query():
    async def scenario():
        runs = Runs()
        batcher = Batcher(runs, max_in_flight=1, max_waiting=100)
        tasks = [submit(batcher, 0)]
        await runs.next_arrival()
        tasks += [submit(batcher, 1, timeout_s=100.0), submit(batcher, 2, timeout_s=1000.0)]
        await let_tasks_run()
        runs.gates[0].set()
        await runs.next_arrival()
        assert 100 < runs.timeouts[1] <= 1000
        runs.gates[1].set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_those_that_gave_up_or_are_too_late_are_not_sent():
    async def scenario():
        runs = Runs()
        batcher = Batcher(runs, max_in_flight=1, max_waiting=100)
        first = submit(batcher, 0)
        await runs.next_arrival()
        gave_up, late, patient = submit(batcher, 1), submit(batcher, 2, timeout_s=-1.0), submit(batcher, 3)
        await let_tasks_run()
        gave_up.cancel()
        await let_tasks_run()
        runs.gates[0].set()
        await runs.next_arrival()
        assert runs.batches[1][0] == [3]
        runs.gates[1].set()
        assert (await first, await patient) == ((0, 10), (3, 10))
        late.cancel()

    asyncio.run(scenario())


def test_an_error_reaches_all_of_its_batch_and_none_after():
    async def scenario():
        outcomes = [RuntimeError("broken"), None]

        async def run(codes, ks, group, timeout_s):
            if error := outcomes.pop(0):
                raise error
            return list(ks)

        batcher = Batcher(run, max_in_flight=1, max_waiting=100)
        with pytest.raises(RuntimeError, match="broken"):
            await submit(batcher, 0)
        assert await submit(batcher, 1, k=3) == 3

    asyncio.run(scenario())


def test_a_full_queue_refuses():
    async def scenario():
        runs = Runs()
        batcher = Batcher(runs, max_in_flight=1, max_waiting=2)
        tasks = [submit(batcher, 0)]
        await runs.next_arrival()
        tasks += [submit(batcher, 1), submit(batcher, 2)]
        await let_tasks_run()
        with pytest.raises(Overloaded, match="2 queries are waiting") as caught:
            await submit(batcher, 3)
        assert caught.value.retry_after_s > 0
        runs.gates[0].set()
        runs.arrived.clear()
        await runs.next_arrival()
        runs.gates[1].set()
        assert len(await asyncio.gather(*tasks)) == 3

    asyncio.run(scenario())
