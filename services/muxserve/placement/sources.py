"""`SourceWatch`: how many sequences a migration's source has left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from muxserve.common.errors import ServiceError
from muxserve.placement.document import Plan
from muxserve.placement.migration import DRAINING_SOURCE, HANDING_OVER
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

LOOK = 0.1
"""Seconds between looks at the worker."""


class SourceWatch:
    """Asks the worker again and again while it hands over, and calls `wake` with every answer."""

    def __init__(self, calls: WorkerCalls, wake: Callable[[], None]) -> None:
        self._calls = calls
        self._wake = wake
        self._task: asyncio.Task[None] | None = None
        self._migration = ""
        self._open: int | None = None

    def open_sequences(self, plan: Plan) -> int | None:
        """Of the model of the migration under way on its source. None: not known."""
        known = plan.migration is not None and plan.migration.id == self._migration
        return self._open if known else None

    def follow(self, plan: Plan, workers: Mapping[str, admin_pb2.ServiceEntry]) -> None:
        """Look at what `plan`, which is published, needs to know."""
        migration = plan.migration
        wanted = migration is not None and migration.phase in (HANDING_OVER, DRAINING_SOURCE)
        entry = workers.get(migration.source_worker) if migration is not None else None
        if migration is None or not wanted or entry is None:
            self._stop()
        elif self._migration != migration.id:
            self._stop()
            self._migration = migration.id
            look = self._look(entry.address, migration.model)
            self._task = asyncio.create_task(look, name=f"look at {entry.id}")

    async def close(self) -> None:
        """Stop looking."""
        self._stop()

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._migration, self._open = "", None

    async def _look(self, address: str, model: str) -> None:
        while True:
            try:
                info = await self._calls.info(address)
            except ServiceError as error:
                log.debug("the source does not answer", error=str(error))
                self._open = None
            else:
                self._open = sum(each.open_sequences for each in info.models if each.model == model)
            self._wake()
            await asyncio.sleep(LOOK)
