"""Messages that do not arrive, or arrive slowly."""

import asyncio

import pytest

from orbithash.search.gateway import limits
from orbithash.search.gateway.limits import SlowMessages
from orbithash.search.protocol.errors import DeadlineExceeded, Overloaded


async def never():
    await asyncio.Event().wait()


async def at_once():
    return b"message"


def test_messages_in_time_are_returned_and_late_ones_are_not():
    async def main():
        slow = SlowMessages(2)
        assert await slow.receive(at_once(), 60.0) == b"message"
        waiting = [asyncio.create_task(slow.receive(never(), 0.001)) for _ in range(5)]
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * 5
        assert str(outcomes[0]) == "no message within 0.001 s"
        assert await slow.receive(at_once(), 60.0) == b"message"

    asyncio.run(main())


def test_the_oldest_slow_messages_may_arrive_and_more_are_refused(monkeypatch):
    monkeypatch.setattr(limits, "_SLOW_S", 0.001)

    async def main():
        slow, arrives = SlowMessages(2), asyncio.Event()
        first = [asyncio.create_task(slow.receive(arrives.wait(), 60.0)) for _ in range(2)]
        await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(Overloaded, match="2 messages arrive slowly"):
                await slow.receive(never(), 60.0)
        # Those that arrive at once are not limited.
        assert await slow.receive(at_once(), 60.0) == b"message"
        arrives.set()
        assert await asyncio.gather(*first) == [True, True]
        # There is room again.
        gone = asyncio.create_task(slow.receive(never(), 60.0))
        with pytest.raises(DeadlineExceeded):
            await slow.receive(never(), 0.05)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(main())
