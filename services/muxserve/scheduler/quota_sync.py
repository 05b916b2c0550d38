"""`QuotaSync`: a unit's block quotas and those in Redis, which an administrator may change."""

from __future__ import annotations

import asyncio
import time

import structlog

from muxserve.common.documents import QuotaStore
from muxserve.common.errors import Unavailable
from muxserve.scheduler.unit import Unit
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

POLL = 1.0
"""Seconds between looks at what is stored."""


class QuotaSync:
    """Writes quotas when the policy changed them, takes over what somebody else wrote, and records what
    became of either. The unit has revisions of its own, which may run ahead of those that are stored: the
    policy waits for nobody."""

    def __init__(self, unit: Unit, store: QuotaStore) -> None:
        self._unit = unit
        self._store = store
        self._stored = 0
        """Revision in Redis that the unit knows of."""
        self._synced = 0
        """The unit's revision when it was last the same as what is stored."""
        self._recorded: tuple[int, tuple[str, ...]] | None = None

    async def run(self) -> None:
        """Work until cancelled. While Redis is away the unit's own quotas are in force."""
        while True:
            try:
                await self.sync()
            except Unavailable as error:
                log.debug("quotas are not synchronised", unit=self._unit.name, error=str(error))
            await asyncio.sleep(POLL)

    async def sync(self) -> None:
        """Once. Raises Unavailable."""
        unit = self._unit
        stored = await self._store.read(unit.name)
        if stored.revision > self._stored:
            # The worker takes no revision twice, so one that the policy has used meanwhile is skipped.
            unit.set_quotas(stored.blocks, max(stored.revision, unit.quota_revision + 1))
            self._stored, self._synced = stored.revision, unit.quota_revision
            log.info("quotas taken over", unit=unit.name, quotas=dict(unit.quotas), revision=stored.revision)
        elif stored.revision < self._stored:
            self._stored, self._synced = stored.revision, 0  # a Redis that has lost them gets them again
        if unit.quota_revision > self._synced:
            await self._write()
        await self._record()

    async def _write(self) -> None:
        """Store what the policy decided."""
        revision, blocks = self._unit.quota_revision, self._unit.quotas
        mine = admin_pb2.Quotas(unit=self._unit.name, revision=self._stored + 1, blocks=blocks)
        if await self._store.compare_and_set(mine, self._stored, "policy", time.time()):
            self._stored, self._synced = mine.revision, revision

    async def _record(self) -> None:
        """Record what became of the revision that is stored, once the worker says so."""
        told = self._unit.quotas_in_force
        if told is None or told.revision != self._synced:
            return
        outcome = (self._stored, tuple(told.above))
        if outcome != self._recorded:
            await self._store.record(self._unit.name, *outcome)
            self._recorded = outcome
