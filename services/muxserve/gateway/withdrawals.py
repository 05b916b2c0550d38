"""Takes requests back out of the queue that nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import structlog

from muxserve.common.errors import ServiceError, Unavailable
from muxserve.common.queue import RequestQueue

log = structlog.get_logger(__name__)

LIMIT = 10_000
"""Entries kept while Redis is away. What is lost is found by a scheduler, which then asks and is told."""
RETRY = 0.5
"""Seconds between attempts while Redis is away."""


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """An entry to be removed."""

    model: str
    admission: asyncio.Task[str]
    """Ends with the entry's id, or fails if there is no entry."""


class Withdrawals:
    """Works in the background, in order."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        self._todo: deque[Withdrawal] = deque(maxlen=LIMIT)
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, withdrawal: Withdrawal) -> None:
        """Remove this entry soon."""
        self._todo.append(withdrawal)
        self._idle.clear()
        self._news.set()

    async def flush(self, timeout: float) -> None:
        """Wait until all is removed, for at most `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            log.warning("entries are left in the queue", count=len(self._todo))

    async def run(self) -> None:
        """Never returns."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._todo:
                if await self._remove(self._todo[0]):
                    self._todo.popleft()
                else:
                    await asyncio.sleep(RETRY)
            self._idle.set()

    async def _remove(self, withdrawal: Withdrawal) -> bool:
        """False: Redis is away."""
        try:
            entry_id = await withdrawal.admission
        except ServiceError:
            return True
        try:
            await self._queue.withdraw(withdrawal.model, entry_id)
        except Unavailable:
            return False
        return True
