"""The connection to Redis (or Valkey), and its one mapping to our errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from muxserve.common.errors import Unavailable

TIMEOUT = 2.0
"""Seconds that a command or a connection attempt may take."""

CONNECTIONS = 128
"""Of a process, at most. A command that finds them all in use waits for its turn."""
WAIT = 5.0
"""Seconds that it waits before it fails. They are in use for long when much comes at once, such as all that
clients have sent while the process was stopped."""

RETRY_AFTER = 1.0
"""Seconds after which clients are told to try again while Redis is away."""


def connect(url: str) -> Redis:
    """A client for `url` (redis://host:port/db). Connects on first use; values are bytes.

    Nothing is retried inside: a command whose connection breaks may have run, and only its caller knows
    whether running it twice is harmless. Connections found closed are replaced before use.
    """
    pool = _Pool.from_url(
        url,
        max_connections=CONNECTIONS,
        socket_timeout=TIMEOUT,
        socket_connect_timeout=TIMEOUT,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        # With them on, the client does not notice that a pooled connection was closed until it is used.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        client_name="muxserve",
    )
    pool.connection_class = type("Connection", (_Sender, pool.connection_class), {})
    return Redis.from_pool(pool)


class _Pool(ConnectionPool):
    """Has commands wait for a connection, in order, where redis-py's refuses them.

    Not its `BlockingConnectionPool`: that one takes a lock to give a connection back, and where many wait for
    the lock, a task that is cancelled loses its connection for good.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._room = asyncio.Semaphore(self.max_connections)

    async def get_connection(
        self, command_name: object = None, *keys: object, **options: object
    ) -> AbstractConnection:
        try:
            async with asyncio.timeout(WAIT):
                await self._room.acquire()
        except TimeoutError:
            raise RedisError(f"no connection came free within {WAIT:g} s") from None
        # If it fails, it has released what it took.
        found: AbstractConnection = await super().get_connection()  # type: ignore[no-untyped-call]
        return found

    async def release(self, connection: AbstractConnection) -> None:
        try:
            await super().release(connection)
        finally:
            self._room.release()


class _Sender(AbstractConnection):
    """Sends without `asyncio.wait_for`, which before Python 3.12 loses the cancellation of a task whose
    command has just been sent: loops over Redis would not stop when told to."""

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        limit, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(limit):
                await super().send_packed_command(command, check_health)
        finally:
            self.socket_timeout = limit


@contextmanager
def redis_errors(doing: str) -> Iterator[None]:
    """Turns a lost, slow or refusing Redis into `Unavailable`; `doing` says what was attempted."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(f"Redis is not available ({doing}): {reason}", RETRY_AFTER) from error
