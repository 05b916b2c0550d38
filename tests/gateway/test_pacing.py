"""When a client is told of tokens: what may wait for later ones, and what may not."""

from __future__ import annotations

import asyncio

import pytest

from muxserve.common.errors import Unavailable
from muxserve.gateway.requests import LiveRequest, RequestTable
from muxserve.v1 import common_pb2, scheduler_pb2

Event = scheduler_pb2.RequestEvent
LENGTH = common_pb2.FINISH_REASON_LENGTH
LONGEST = 0.05


async def busy(
    eager: bool = False, longest: float = LONGEST, others: int = 30
) -> tuple[RequestTable, LiveRequest]:
    """A table with others in flight, and a request of number 1 that has had its first token."""
    table = RequestTable(limit=100, longest_wait=longest)
    for number in range(others):
        table.open(scheduler_pb2.QueuedRequest(request_id=f"other {number}", model="m"))
    live = table.open(scheduler_pb2.QueuedRequest(request_id="r", model="m"), eager=eager)
    table.handle(Event(request_id="r", attempt=1, number=1, started=Event.Started()), "s")
    table.receive(tokens(0), "s")
    async with asyncio.timeout(LONGEST / 10):
        assert (await live.take()).token_ids == [0], "a first token never waits"
    return table, live


def tokens(index: int) -> scheduler_pb2.NewTokens:
    return scheduler_pb2.NewTokens(numbers=[1], indexes=[index], counts=[1], token_ids=[index])


async def took(live: LiveRequest) -> tuple[list[int], float]:
    """The next message, and how long it was waited for."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    batch = await live.take()
    return batch.token_ids, loop.time() - begin


async def test_tokens_of_many_requests_wait_for_later_ones_and_go_out_together() -> None:
    table, live = await busy()
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for index in (1, 2, 3):
        table.receive(tokens(index), "s")
    token_ids, _ = await took(live)
    assert token_ids == [1, 2, 3] and loop.time() - begin >= 0.9 * LONGEST
    table.receive(tokens(4), "s")
    assert (await took(live))[0] == [4], "nor are later ones forgotten"


@pytest.mark.parametrize(
    ("eager", "longest", "others"), [(True, LONGEST, 30), (False, 0.0, 30), (False, LONGEST, 0)]
)
async def test_tokens_do_not_wait(eager: bool, longest: float, others: int) -> None:
    """With stop strings, with the setting 0, or alone."""
    table, live = await busy(eager, longest, others)
    table.receive(tokens(1), "s")
    token_ids, waited = await took(live)
    assert token_ids == [1] and waited < LONGEST / 2


async def test_what_was_told_meanwhile_is_not_told_again() -> None:
    table, live = await busy()
    table.receive(tokens(1), "s")
    table.handle(Event(request_id="r", attempt=1, tokens=Event.Tokens(index=2, token_ids=[2])), "s")
    assert (await took(live))[0] == [1, 2]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2 * LONGEST):
            await live.take()


async def test_what_ends_a_request_takes_along_what_waits() -> None:
    table, live = await busy()
    table.receive(tokens(1), "s")
    last = Event.Tokens(index=2, token_ids=[2], finish_reason=LENGTH)
    table.handle(Event(request_id="r", attempt=1, tokens=last), "s")
    token_ids, waited = await took(live)
    assert token_ids == [1, 2] and waited < LONGEST / 2
    table, live = await busy()
    table.receive(tokens(1), "s")
    live.fail(Unavailable("it is gone", 1.0))
    with pytest.raises(Unavailable):
        await took(live)
