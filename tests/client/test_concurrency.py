"""Threads and tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from muxserve.client import AsyncClient, Cancelled, Client
from muxserve.v1 import inference_pb2
from tests.client.peer import Server, answer


@pytest.fixture
def waiting(server: Server) -> Iterator[threading.Event]:
    """Calls of the peer send one piece and then wait; set when one does."""
    started, done = threading.Event(), threading.Event()

    def script(*_: object) -> Iterator[inference_pb2.GenerateResponse]:
        yield next(iter(answer(["one"])))
        started.set()
        done.wait(30)

    server.peer.script = script
    yield started
    done.set()


def test_threads_may_share_a_client(server: Server) -> None:
    with Client(server.address, timeout=10) as client, ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: client.generate("a", "Hi").text, range(20)))
    assert texts == ["Hello world"] * 20


async def test_tasks_may_share_a_client(server: Server) -> None:
    async with AsyncClient(server.address, timeout=10) as client:
        answers = await asyncio.gather(*(client.generate("a", "Hi") for _ in range(20)))
    assert [answer.text for answer in answers] == ["Hello world"] * 20


def test_another_thread_may_close_a_stream(server: Server, waiting: threading.Event) -> None:
    with Client(server.address, timeout=10) as client:
        stream = client.stream("a", "Hi")
        next(stream)

        def close() -> None:
            waiting.wait(10)
            stream.close()

        threading.Thread(target=close).start()
        with pytest.raises(Cancelled):
            next(stream)
    assert server.peer.ended.wait(5)


async def test_another_task_may_close_a_stream(server: Server, waiting: threading.Event) -> None:
    async with AsyncClient(server.address, timeout=10) as client:
        stream = client.stream("a", "Hi")
        await anext(stream)

        async def close() -> None:
            await asyncio.to_thread(waiting.wait, 10)
            await stream.close()

        closing = asyncio.create_task(close())
        with pytest.raises(Cancelled):
            await anext(stream)
        await closing
    assert await asyncio.to_thread(server.peer.ended.wait, 5)


async def test_cancelling_the_task_cancels_the_call(server: Server, waiting: threading.Event) -> None:
    async with AsyncClient(server.address, timeout=10) as client:
        task: asyncio.Task[Any] = asyncio.create_task(client.generate("a", "Hi"))
        await asyncio.to_thread(waiting.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.peer.ended.wait, 5)


async def test_a_timeout_around_a_call_is_the_callers_own(server: Server, waiting: threading.Event) -> None:
    async with AsyncClient(server.address, timeout=10) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await client.generate("a", "Hi")
    assert await asyncio.to_thread(server.peer.ended.wait, 5)


async def test_a_stream_that_nobody_reads_ends_with_its_client(server: Server) -> None:
    async with AsyncClient(server.address) as client:
        stream = client.stream("a", "Hi")
    with pytest.raises(Cancelled):
        await anext(stream)


def test_a_stream_may_outlive_its_event_loop(server: Server) -> None:
    async def abandon() -> object:
        client = AsyncClient(server.address)
        stream = client.stream("a", "Hi")
        await anext(stream)
        await client.close()
        return stream

    stream = asyncio.run(abandon())
    del stream
