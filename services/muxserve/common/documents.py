"""Versioned documents in Redis, written with compare-and-set: the placement, and each unit's block quotas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection
from typing import cast

import structlog
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.errors import Unavailable
from muxserve.common.store import redis_errors
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

POLL = 0.1
"""Seconds between looks at the placement's epoch."""

_MODEL = b"model:"

# KEYS: a hash. ARGV: name of the version field, expected version ("0": no document), then field, value, ...
# Versions are compared as text: a Lua number does not hold every uint64.
_COMPARE_AND_SET = """
local current = redis.call('HGET', KEYS[1], ARGV[1]) or '0'
if current ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
return 1
"""

KEPT_REVISIONS = 32
"""Of a unit's quotas, in their history."""

# KEYS: quotas, their history. ARGV: expected revision ("0": none), the new one, its entry in the history, how
# many of these to keep, then field, value, ... of the quotas.
_SET_QUOTAS = """
local current = redis.call('HGET', KEYS[1], 'revision') or '0'
if current ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
local revisions = {}
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
  if not field:find(':') then revisions[#revisions + 1] = field end
end
-- As text, longer numbers after shorter ones: see above.
table.sort(revisions, function(a, b) if #a ~= #b then return #a < #b end return a < b end)
for i = 1, #revisions - tonumber(ARGV[4]) do
  redis.call('HDEL', KEYS[2], revisions[i], revisions[i] .. ':outcome')
end
return 1
"""

# KEYS: history of quotas. ARGV: revision, what became of it. One that is no longer kept does not come back.
_RECORD_OUTCOME = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1] .. ':outcome', ARGV[2])
return 1
"""


class PlacementStore:
    """The placement document."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._compare_and_set = redis.register_script(_COMPARE_AND_SET)

    async def read(self) -> admin_pb2.Placement:
        """The newest placement; epoch 0 where there is none. Raises Unavailable while Redis is away."""
        with redis_errors("reading the placement"):
            document = cast(bytes | None, await self._redis.hget(keys.placement(), "document"))
        return admin_pb2.Placement.FromString(document) if document else admin_pb2.Placement()

    async def compare_and_set(self, expected_epoch: int, placement: admin_pb2.Placement) -> bool:
        """Put `placement` in place of the one with `expected_epoch` (0: of none).

        False: another epoch is in force, nothing was written. `placement.epoch` must be above
        `expected_epoch` (ValueError). Raises Unavailable while Redis is away; the write may have happened
        then.
        """
        if placement.epoch <= expected_epoch:
            raise ValueError(f"epoch {placement.epoch} does not follow {expected_epoch}")
        with redis_errors("writing the placement"):
            done = await self._compare_and_set(
                keys=[keys.placement()],
                args=[
                    "epoch",
                    expected_epoch,
                    *("epoch", placement.epoch),
                    *("document", placement.SerializeToString()),
                ],
            )
        return bool(done)

    async def watch(self) -> AsyncGenerator[admin_pb2.Placement, None]:
        """The current placement at once (epoch 0 where there is none), then every newer one, never ending.

        Versions that come within one poll are seen as the last of them. A Redis that is away is waited for; a
        document that a Redis has lost is not a change: placement writes it again.
        """
        seen: int | None = None
        away = False
        while True:
            try:
                epoch = await self._epoch()
                current = seen is None or (epoch != seen and epoch != 0)
                placement = await self.read() if current else None
            except Unavailable as error:
                if not away:
                    log.warning("cannot watch the placement; trying on", error=str(error))
                away = True
            else:
                if away:
                    log.info("watching the placement again")
                away = False
                if placement is not None:
                    seen = placement.epoch
                    yield placement
            await asyncio.sleep(POLL)

    async def _epoch(self) -> int:
        with redis_errors("reading the placement's epoch"):
            return int(await self._redis.hget(keys.placement(), "epoch") or 0)


class QuotaStore:
    """Block quotas of units: the newest revision, and what became of the latest ones."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._compare_and_set = redis.register_script(_SET_QUOTAS)
        self._record = redis.register_script(_RECORD_OUTCOME)

    async def read(self, unit: str) -> admin_pb2.Quotas:
        """Quotas of `unit`; revision 0 where there are none. Raises Unavailable while Redis is away."""
        with redis_errors("reading quotas"):
            fields = cast(dict[bytes, bytes], await self._redis.hgetall(keys.quotas(unit)))
        blocks = {
            field.removeprefix(_MODEL).decode(): int(value)
            for field, value in fields.items()
            if field.startswith(_MODEL)
        }
        return admin_pb2.Quotas(unit=unit, revision=int(fields.get(b"revision", 0)), blocks=blocks)

    async def compare_and_set(
        self, quotas: admin_pb2.Quotas, expected_revision: int, author: str, now: float
    ) -> bool:
        """Put `quotas` in place of those with `expected_revision` (0: of none), for `author` at Unix time
        `now`.

        False: another revision is in force, nothing was written. `quotas.revision` must be above
        `expected_revision` (ValueError). Raises Unavailable while Redis is away; the write may have happened
        then.
        """
        if quotas.revision <= expected_revision:
            raise ValueError(f"revision {quotas.revision} does not follow {expected_revision}")
        fields = [
            part for model, blocks in quotas.blocks.items() for part in (_MODEL + model.encode(), blocks)
        ]
        asked = admin_pb2.QuotaRevision(
            revision=quotas.revision, author=author, blocks=quotas.blocks, asked_unix_ms=int(now * 1000)
        )
        with redis_errors("writing quotas"):
            done = await self._compare_and_set(
                keys=[keys.quotas(quotas.unit), keys.quota_history(quotas.unit)],
                args=[
                    expected_revision,
                    quotas.revision,
                    asked.SerializeToString(),
                    KEPT_REVISIONS,
                    *("revision", quotas.revision, *fields),
                ],
            )
        return bool(done)

    async def record(self, unit: str, revision: int, above: Collection[str]) -> None:
        """The worker has put `revision` in force; `above`: models that still hold more than it gives them.
        Raises Unavailable."""
        state = admin_pb2.QUOTA_STATE_DEFERRED if above else admin_pb2.QUOTA_STATE_APPLIED
        outcome = admin_pb2.QuotaRevision(revision=revision, state=state, above=sorted(above))
        with redis_errors("recording what became of quotas"):
            await self._record(keys=[keys.quota_history(unit)], args=[revision, outcome.SerializeToString()])

    async def history(self, unit: str) -> list[admin_pb2.QuotaRevision]:
        """The latest revisions, newest first. Raises Unavailable."""
        with redis_errors("reading what became of quotas"):
            fields = cast(dict[bytes, bytes], await self._redis.hgetall(keys.quota_history(unit)))
        asked = {
            int(field): admin_pb2.QuotaRevision.FromString(value)
            for field, value in fields.items()
            if field.isdigit()
        }
        newest = max(asked, default=0)
        for number, revision in asked.items():
            outcome = fields.get(b"%d:outcome" % number, b"")
            revision.MergeFrom(admin_pb2.QuotaRevision.FromString(outcome))
            if revision.state == admin_pb2.QUOTA_STATE_UNSPECIFIED:
                revision.state = admin_pb2.QUOTA_STATE_PENDING
            if number < newest and revision.state != admin_pb2.QUOTA_STATE_APPLIED:
                revision.state = admin_pb2.QUOTA_STATE_STALE
                del revision.above[:]
        return [asked[number] for number in sorted(asked, reverse=True)]
