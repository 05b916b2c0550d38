"""The connection to Redis (or Valkey), and its one mapping to our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from muxserve.common.errors import Unavailable

TIMEOUT = 2.0
"""Seconds that a command or a connection attempt may take."""

RETRY_AFTER = 1.0
"""Seconds after which clients are told to try again while Redis is away."""


def connect(url: str) -> Redis:
    """A client for `url` (redis://host:port/db). Connects on first use; values are bytes.

    Nothing is retried inside: a command whose connection breaks may have run, and only its caller knows
    whether running it twice is harmless. Connections found closed are replaced before use.
    """
    return Redis.from_url(
        url,
        socket_timeout=TIMEOUT,
        socket_connect_timeout=TIMEOUT,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        # With them on, the client does not notice that a pooled connection was closed until it is used.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        client_name="muxserve",
    )


@contextmanager
def redis_errors(doing: str) -> Iterator[None]:
    """Turns a lost, slow or refusing Redis into `Unavailable`; `doing` says what was attempted."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(f"Redis is not available ({doing}): {reason}", RETRY_AFTER) from error
