"""`Demand`: which models are asked for, from their queues and schedulers. Nothing is added to the way of a
request."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from muxserve.common import keys
from muxserve.common.errors import ServiceError
from muxserve.common.queue import GROUP, RELEASED
from muxserve.common.registry import Registry
from muxserve.common.store import redis_errors
from muxserve.placement.schedulers import SchedulerCalls

log = structlog.get_logger(__name__)

EVERY, FRESH = 0.2, 1.0
"""Seconds between questions to schedulers, and for which their answers count."""


@dataclass(frozen=True, slots=True)
class Use:
    """Of a model."""

    waiting: int
    """Requests that no scheduler has."""
    in_flight: int
    """All requests. Those that have just ended are among them while schedulers do not answer: they stay in
    the queue until it is sure that their gateways have heard of it."""
    last: float
    """When there were some, in seconds of the clock of `read`; 0: never."""


class Demand:
    """Looks again and again."""

    def __init__(self, redis: Redis, registry: Registry) -> None:
        self._redis: Any = redis
        self._registry = registry
        self._schedulers = SchedulerCalls()
        self._added: dict[str, int] = {}
        self._last: dict[str, float] = {}
        self._held: Counter[str] = Counter()
        """Requests that schedulers have, by model."""
        self._asked_at = self._answered_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def read(self, models: Iterable[str], now: float, *, closely: bool) -> Mapping[str, Use]:
        """The use of each model at `now`. `closely`: schedulers are asked too, beside. Raises Unavailable
        while Redis is away."""
        if closely and self._asking is None and time.monotonic() - self._asked_at >= EVERY:
            self._asked_at = time.monotonic()
            self._asking = asyncio.create_task(self._ask(), name="ask schedulers")
        names = list(models)
        with redis_errors("reading queues"):
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.xinfo_stream(keys.queue(name))
                    pipe.xpending(keys.queue(name), GROUP)
                answers = await pipe.execute(raise_on_error=False)
        return {
            name: self._note(name, stream, pending, now)
            for name, stream, pending in zip(names, answers[::2], answers[1::2], strict=True)
        }

    async def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._schedulers.close()

    def _note(self, name: str, stream: Any, pending: Any, now: float) -> Use:
        if isinstance(stream, ResponseError):  # there is none: nobody has ever asked for it
            return Use(0, 0, self._last.get(name, 0.0))
        if isinstance(stream, Exception):
            raise stream
        entries, added = int(stream["length"]), int(stream["entries-added"])
        waiting = entries
        if not isinstance(pending, Exception):
            released = sum(int(c["pending"]) for c in pending["consumers"] if c["name"] == RELEASED.encode())
            waiting = max(0, entries - int(pending["pending"])) + released
        in_flight = entries
        if time.monotonic() - self._answered_at < FRESH:
            in_flight = min(entries, waiting + self._held[name])
        # One that came and ended between two looks counts as well.
        if in_flight or (name in self._added and added != self._added[name]):
            self._last[name] = now
        self._added[name] = added
        return Use(waiting, in_flight, self._last.get(name, 0.0))

    async def _ask(self) -> None:
        held: Counter[str] = Counter()
        try:
            for entry in await self._registry.list("scheduler"):
                for unit in await self._schedulers.units(entry.address):
                    for model in unit.models:
                        held[model.model] += model.running + model.waiting
        except ServiceError as error:
            log.debug("a scheduler does not answer", error=str(error))
        else:
            self._held, self._answered_at = held, time.monotonic()
        finally:
            self._asking = None
