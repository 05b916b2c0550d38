"""`QuotaSync`: a unit's block quotas and those in Redis, which an administrator may change."""

from __future__ import annotations

import asyncio

import structlog

from muxserve.common.documents import QuotaStore
from muxserve.common.errors import Unavailable
from muxserve.scheduler.unit import Unit
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

POLL = 1.0
"""Seconds between looks at what is stored."""


class QuotaSync:
    """Writes quotas when the policy changed them, and takes over what somebody else wrote."""

    def __init__(self, unit: Unit, store: QuotaStore) -> None:
        self._unit = unit
        self._store = store
        self._stored = 0
        """Revision in Redis that the unit knows of."""

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
            # The worker takes no revision twice, so one that both sides have used is skipped.
            revision = max(stored.revision, unit.quota_revision + 1)
            unit.set_quotas(stored.blocks, revision)
            log.info("quotas taken over", unit=unit.name, quotas=dict(unit.quotas), revision=revision)
        self._stored = stored.revision
        if unit.quota_revision > self._stored:
            mine = admin_pb2.Quotas(unit=unit.name, revision=unit.quota_revision, blocks=unit.quotas)
            if await self._store.compare_and_set(mine, self._stored):
                self._stored = mine.revision
