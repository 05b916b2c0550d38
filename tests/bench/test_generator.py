"""The generator: open loop, honest about time, and never held up by what it measures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from muxserve.bench.generator import Generator, Limits
from muxserve.bench.outcomes import Outcome, Status
from muxserve.bench.targets import Failed, Refused, Reply
from muxserve.bench.workload import Request


class Scripted:
    """A target in this process: answers with two tokens after `seconds`, or raises; nobody before `together`
    requests were open at once."""

    name = "scripted"

    def __init__(self, seconds: float = 0.0, error: Exception | None = None, together: int = 1) -> None:
        self._seconds = seconds
        self._error = error
        self._together = together
        self.open = 0
        self.all_open = asyncio.Event()

    async def contexts(self) -> dict[str, int]:
        return {"a": 64}

    async def send(
        self, request: Request, timeout: float | None, reply: Reply, arrived: Callable[[], None]
    ) -> None:
        self.open += 1
        if self.open == self._together:
            self.all_open.set()
        try:
            async with asyncio.timeout(10):
                await self.all_open.wait()
            await asyncio.sleep(self._seconds)
            if self._error is not None:
                raise self._error
            for _ in range(2):
                reply.tokens += 1
                arrived()
        finally:
            self.open -= 1

    async def close(self) -> None:
        pass


def requests(count: int, gap: float) -> list[Request]:
    return [Request(number * gap, "a", (1, 2, 3), 2) for number in range(count)]


async def test_arrivals_wait_for_no_answer() -> None:
    target = Scripted(together=20)
    run = await Generator(requests(20, 0.005), {"a": target}).run()
    assert target.all_open.is_set()
    assert [one.status for one in run.outcomes] == [Status.OK] * 20
    assert all(one.end >= run.outcomes[-1].sent for one in run.outcomes)
    assert not run.stopped
    assert sum(run.tokens) == 40


@pytest.mark.parametrize(
    ("error", "status", "after"),
    [(Refused("full", 1.5), Status.REFUSED, 1.5), (Failed("broken"), Status.FAILED, None)],
)
async def test_refusals_and_failures_are_told_apart(
    error: Exception, status: Status, after: float | None
) -> None:
    run = await Generator(requests(2, 0), {"a": Scripted(error=error)}).run()
    assert [(one.status, one.retry_after, one.first) for one in run.outcomes] == [(status, after, None)] * 2


async def test_what_does_not_end_in_time_is_unfinished() -> None:
    target = Scripted(seconds=60)
    run = await Generator(requests(3, 0.01), {"a": target}, limits=Limits(drain=0.05)).run()
    assert [one.status for one in run.outcomes] == [Status.UNFINISHED] * 3
    assert target.open == 0 and run.seconds < 5


async def test_a_watcher_ends_the_run() -> None:
    seen: list[Outcome] = []

    def watch(outcome: Outcome) -> bool:
        seen.append(outcome)
        return len(seen) == 3

    run = await Generator(requests(1000, 0.02), {"a": Scripted()}, watch=watch).run()
    assert run.stopped and 3 <= len(run.outcomes) < 500


async def test_too_many_open_requests_fail_rather_than_wait() -> None:
    generator = Generator(requests(5, 0), {"a": Scripted(seconds=0.2)}, limits=Limits(open_requests=3))
    run = await generator.run()
    assert [one.status for one in run.outcomes].count(Status.FAILED) == 2
    assert generator.progress.ended == generator.progress.sent == 5


async def test_a_cancelled_run_leaves_nothing_open() -> None:
    target = Scripted(seconds=60, together=3)
    task = asyncio.create_task(Generator(requests(3, 0), {"a": target}).run())
    await target.all_open.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert target.open == 0
