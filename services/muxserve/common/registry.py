"""Who is alive: each process keeps an entry with a time to live in Redis."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import cast

import structlog
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.errors import Unavailable
from muxserve.common.store import TIMEOUT, redis_errors
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

HEARTBEAT = 1.0
"""Seconds between announcements."""

TTL = 3.0
"""Seconds that an entry outlives its last announcement."""

GRACE = HEARTBEAT + TIMEOUT
"""Seconds after Redis was away in which a missing entry says nothing: its owner may not be back yet."""

# KEYS: entry, index. ARGV: incarnation, id. A successor under the same id keeps its entry.
_WITHDRAW = """
local entry = redis.call('GET', KEYS[1])
if entry and not string.find(entry, ARGV[1], 1, true) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[2])
return 1
"""


def entry_of_this_process(kind: str, service_id: str, address: str) -> admin_pb2.ServiceEntry:
    """An entry for this process, with a new incarnation. `address` is what others connect to."""
    return admin_pb2.ServiceEntry(
        kind=kind, id=service_id, address=address, incarnation=uuid.uuid4().hex, pid=os.getpid()
    )


class Registry:
    """The registry in Redis. Every method but `keep` raises Unavailable while Redis is away."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._withdraw = redis.register_script(_WITHDRAW)
        self._away_at = -GRACE
        self._known: dict[str, Sequence[admin_pb2.ServiceEntry]] = {}

    async def announce(self, entry: admin_pb2.ServiceEntry) -> None:
        """Write `entry` once; it lives for TTL seconds."""
        with redis_errors("announcing a service"):
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.sadd(keys.services(entry.kind), entry.id)
                pipe.set(keys.service(entry.kind, entry.id), entry.SerializeToString(), px=round(TTL * 1000))
                await pipe.execute()

    async def withdraw(self, entry: admin_pb2.ServiceEntry) -> None:
        """Delete `entry`, unless another incarnation has taken its place."""
        with redis_errors("withdrawing a service"):
            await self._withdraw(
                keys=[keys.service(entry.kind, entry.id), keys.services(entry.kind)],
                args=[entry.incarnation, entry.id],
            )

    @asynccontextmanager
    async def keep(self, entry: admin_pb2.ServiceEntry) -> AsyncIterator[None]:
        """Keep `entry` alive inside the block; withdrawn at its end. A Redis that is away is waited for."""
        heartbeat = asyncio.create_task(self._beat(entry), name="registry-heartbeat")
        try:
            yield
        finally:
            heartbeat.cancel()
            with suppress(asyncio.CancelledError):
                await heartbeat
            with suppress(Unavailable):
                await self.withdraw(entry)

    async def list(self, kind: str) -> list[admin_pb2.ServiceEntry]:
        """Entries of `kind` that are alive, by id.

        Entries die while Redis is away, since nobody can renew them. So for GRACE seconds after a call that
        found it away, those that were known before count as alive.
        """
        try:
            alive = {entry.id: entry for entry in await self._read(kind)}
        except Unavailable:
            self._away_at = time.monotonic()
            raise
        if time.monotonic() - self._away_at < GRACE:
            alive = {entry.id: entry for entry in self.known(kind)} | alive
        found = sorted(alive.values(), key=lambda entry: entry.id)
        self._known[kind] = found
        return found

    def known(self, kind: str) -> Sequence[admin_pb2.ServiceEntry]:
        """What `list` last returned, for those who can do with something older while Redis is away."""
        return self._known.get(kind, [])

    async def _read(self, kind: str) -> Sequence[admin_pb2.ServiceEntry]:
        with redis_errors("listing services"):
            ids = sorted(cast(set[bytes], await self._redis.smembers(keys.services(kind))))
            if not ids:
                return []
            entries = [keys.service(kind, each.decode()) for each in ids]
            values = cast(list[bytes | None], await self._redis.mget(entries))
            gone = [each for each, value in zip(ids, values, strict=True) if value is None]
            if gone:
                # One that comes back at this moment is put back by its next announcement.
                await self._redis.srem(keys.services(kind), *gone)
        return [admin_pb2.ServiceEntry.FromString(value) for value in values if value is not None]

    async def _beat(self, entry: admin_pb2.ServiceEntry) -> None:
        away = False
        while True:
            try:
                await self.announce(entry)
            except Unavailable as error:
                if not away:
                    log.warning("cannot announce this service; trying on", error=str(error))
                away = True
            else:
                if away:
                    log.info("announced again")
                away = False
            await asyncio.sleep(HEARTBEAT)
