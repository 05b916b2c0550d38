"""The lease on a unit: at most one scheduler runs it, and its worker can tell who came last."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.errors import Unavailable
from muxserve.common.store import redis_errors

log = structlog.get_logger(__name__)

TTL = 2.0
"""Seconds that a lease outlives its last renewal."""
RENEW = 0.5
"""Seconds between renewals, and between attempts to get a lease."""

# The value is "<epoch> <scheduler id>". Epochs grow even if Redis lost its data: they are at least its clock
# in milliseconds. KEYS: lease, epoch. ARGV: scheduler id, time to live in ms.
_ACQUIRE = """
local held = redis.call('GET', KEYS[1])
if held and string.match(held, '^%d+ (.*)$') ~= ARGV[1] then return false end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local epoch = math.max(tonumber(redis.call('GET', KEYS[2]) or '0') + 1, now)
redis.call('SET', KEYS[2], string.format('%d', epoch))
redis.call('SET', KEYS[1], string.format('%d', epoch) .. ' ' .. ARGV[1], 'PX', ARGV[2])
return epoch
"""
# A lease that ran out while Redis was away is taken up again if nobody had it since. KEYS: lease, epoch.
# ARGV: value, epoch, time to live in ms.
_RENEW = """
local held = redis.call('GET', KEYS[1])
local epoch = redis.call('GET', KEYS[2])
if held and held ~= ARGV[1] then return 0 end
if not held and epoch and epoch ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class LeaseLost(Exception):
    """Another scheduler has the unit now."""


class UnitLease:
    """The lease on `unit` for one scheduler."""

    def __init__(self, redis: Redis, unit: str, scheduler_id: str) -> None:
        self._redis = redis
        self._unit = unit
        self._scheduler = scheduler_id
        self._keys = [keys.unit_lease(unit), keys.unit_epoch(unit)]
        self._acquire = redis.register_script(_ACQUIRE)
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)

    async def acquire(self) -> int:
        """Wait until the lease is ours; returns its epoch, higher than any before. An old lease of this very
        scheduler, from before its restart, is taken over at once."""
        away = False
        while True:
            try:
                with redis_errors("taking a unit's lease"):
                    epoch = await self._acquire(keys=self._keys, args=[self._scheduler, round(TTL * 1000)])
                if epoch is not None:
                    return int(epoch)
                away = False
            except Unavailable as error:
                if not away:
                    log.warning("cannot take the unit's lease; trying on", unit=self._unit, error=str(error))
                away = True
            await asyncio.sleep(RENEW)

    async def keep(self, epoch: int) -> None:
        """Renew it until cancelled. Raises LeaseLost. While Redis is away the lease counts as ours: should
        somebody else get it first, the worker hears the higher epoch."""
        while True:
            await asyncio.sleep(RENEW)
            try:
                with redis_errors("renewing a unit's lease"):
                    held = await self._renew(
                        keys=self._keys, args=[self._value(epoch), epoch, round(TTL * 1000)]
                    )
            except Unavailable:
                continue
            if not held:
                raise LeaseLost(self._unit)

    async def release(self, epoch: int) -> None:
        """Let go of it, if it is still ours. Raises Unavailable."""
        with redis_errors("releasing a unit's lease"):
            await self._release(keys=self._keys[:1], args=[self._value(epoch)])

    def _value(self, epoch: int) -> str:
        return f"{epoch} {self._scheduler}"


async def leased(redis: Redis, units: Iterable[str]) -> set[str]:
    """Which of `units` some scheduler runs. Raises Unavailable."""
    names = list(units)
    if not names:
        return set()
    with redis_errors("reading the units' leases"):
        values = await redis.mget([keys.unit_lease(name) for name in names])
    return {name for name, value in zip(names, values, strict=True) if value is not None}
