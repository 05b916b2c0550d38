"""Acknowledgements on their way to Redis, off the path of tokens."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import structlog

from muxserve.common.errors import Unavailable
from muxserve.common.queue import RequestQueue

log = structlog.get_logger(__name__)

LIMIT = 100_000
"""Acknowledgements kept while Redis is away. One that is lost makes a request that is over turn up again,
and its gateway says that it does not know it."""
BATCH = 500
GATHER = 0.5
"""Seconds for which the first one waits for others, to share a round trip with; and between attempts while
Redis is away."""


class Acknowledger:
    """Removes entries of requests that are over from the queues, in batches, until Redis has heard of
    them."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        self._pending: dict[tuple[str, str], None] = {}
        """(model, entry id), oldest first."""
        self._some = asyncio.Event()

    def pending(self, model: str) -> set[str]:
        """Entries of `model` that Redis may still hold as delivered."""
        return {entry_id for name, entry_id in self._pending if name == model}

    def add(self, model: str, entry_id: str) -> None:
        """Acknowledge soon."""
        if len(self._pending) >= LIMIT:
            del self._pending[next(iter(self._pending))]
        self._pending[model, entry_id] = None
        self._some.set()

    async def run(self) -> None:
        """Work until cancelled."""
        away = False
        while True:
            await self._some.wait()
            await asyncio.sleep(GATHER)
            try:
                await self.flush()
                away = False
            except Unavailable as error:
                if not away:
                    log.warning("acknowledgements wait", pending=len(self._pending), error=str(error))
                away = True

    async def flush(self) -> None:
        """Acknowledge all that is pending. Raises Unavailable."""
        while self._pending:
            by_model: dict[str, list[str]] = defaultdict(list)
            for model, entry_id in list(self._pending)[:BATCH]:
                by_model[model].append(entry_id)
            for model, entries in by_model.items():
                await self._queue.acknowledge(model, entries)
                for entry_id in entries:
                    self._pending.pop((model, entry_id), None)
        self._some.clear()
