"""The scripted peer, and both clients behind one blocking face so that one suite runs over both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from muxserve.client import (
    AdminClient,
    AsyncAdminClient,
    AsyncClient,
    AsyncCompletionStream,
    Chunk,
    Client,
)
from tests.client.peer import Peer, Server


class BlockingStream:
    """An AsyncCompletionStream, read from blocking code."""

    def __init__(self, stream: AsyncCompletionStream, runner: asyncio.Runner) -> None:
        self._stream = stream
        self._runner = runner

    def __iter__(self) -> BlockingStream:
        return self

    def __next__(self) -> Chunk:
        async def step() -> Chunk | None:
            return await anext(self._stream, None)

        chunk = self._runner.run(step())
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        self._runner.run(self._stream.close())

    def __enter__(self) -> BlockingStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Blocking:
    """An asyncio client, called from blocking code."""

    def __init__(self, client: AsyncClient | AsyncAdminClient, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: object, **kwargs: object) -> Any:
            async def run() -> Any:
                result = method(*args, **kwargs)
                return await result if inspect.isawaitable(result) else result

            result = self._runner.run(run())
            if inspect.isasyncgen(result):
                return iter(self._runner.run(_read(result)))
            return (
                BlockingStream(result, self._runner) if isinstance(result, AsyncCompletionStream) else result
            )

        return call


async def _read(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


@pytest.fixture
def server() -> Iterator[Server]:
    """A running peer."""
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def peer(server: Server) -> Peer:
    """What the server does, and what it saw."""
    return server.peer


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes clients of either kind: `connect(address, options=..., admin=False)`."""
    opened: list[Any] = []
    with asyncio.Runner() as runner:

        def make(address: str, *, admin: bool = False, **kwargs: Any) -> Any:
            if request.param == "sync":
                opened.append((AdminClient if admin else Client)(address, **kwargs))
            else:
                opened.append(
                    Blocking((AsyncAdminClient if admin else AsyncClient)(address, **kwargs), runner)
                )
            return opened[-1]

        yield make
        for client in opened:
            client.close()


@pytest.fixture
def client(connect: Callable[..., Any], server: Server) -> Any:
    """A client of the peer, sync and async in turn."""
    return connect(server.address, timeout=10.0)
