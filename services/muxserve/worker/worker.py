"""`Worker`: the parts of a worker put together, and their start and end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from muxserve.engine.arena import SharedArena
from muxserve.engine.memory import available_memory
from muxserve.engine.pool import BlockPool, PoolIntegrityError
from muxserve.worker.executors import ExecutorOptions
from muxserve.worker.lanes import Lanes
from muxserve.worker.models import ModelTable
from muxserve.worker.session import Session, Sessions, StateChanged
from muxserve.worker.settings import WorkerSettings
from muxserve.worker.shapes import MIB
from muxserve.worker.weights import WeightStore

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PoolReport:
    """The pool's books at one moment."""

    block_bytes: int
    pool: BlockPool
    integrity_error: str
    """Empty: the books balance."""


class Worker:
    """One mesh: arena, pool, executors, models, sessions. Made inside a running event loop.

    Raises ArenaError if the arena cannot be had.
    """

    def __init__(self, settings: WorkerSettings, incarnation: str) -> None:
        self.settings = settings
        self.incarnation = incarnation
        self.arena = SharedArena.create(int(settings.arena), int(settings.block_bytes))
        self.pool = BlockPool(self.arena.blocks)
        options = ExecutorOptions(
            arena=self.arena.descriptor(),
            arena_fd=self.arena.fd,
            cores=settings.compute_units,
            timeout=settings.executor_timeout,
            log_level=settings.log_level,
        )
        self.lanes = Lanes(options, self.pool, self._changed)
        self.weights = WeightStore(
            int(settings.weight_budget or 0),
            threads=settings.compute_units,
            timeout=settings.load_timeout,
            cache=settings.kept_weights,
        )
        self.models = ModelTable(
            self.pool,
            self.weights,
            self.lanes.executors,
            block_bytes=int(settings.block_bytes),
            slots=settings.slots,
            on_change=self._changed,
        )
        self.sessions = Sessions(
            lambda scheduler, epoch: Session(
                scheduler, epoch, self.lanes, self.models, self.pool, settings.longest_wait
            )
        )

    async def start(self) -> None:
        """Returns when both executors are ready. Raises ExecutorFailed."""
        await self.lanes.start()
        if self.settings.weight_budget is None:
            # Now that the executors' own memory is taken; the arena's is not yet.
            self.weights.budget = max(0, int(0.9 * (available_memory() - self.settings.arena)))
        log.info(
            "worker ready",
            arena_mib=self.settings.arena // MIB,
            blocks=self.pool.blocks,
            cores=self.settings.compute_units,
            weight_budget_mib=self.weights.budget // MIB,
        )

    async def broken(self) -> None:
        """Returns never; raises when the worker cannot go on, because of a bug."""
        await asyncio.gather(*(executor.broken for executor in self.lanes.executors))

    async def stop(self) -> None:
        """End everything, in the order in which it hangs together. Returns within about three seconds."""
        if (session := self.sessions.current) is not None:
            closing = asyncio.ensure_future(session.close())
            await asyncio.wait((closing,), timeout=0.5)  # a prefill that runs on is ended with its executor
        await self.lanes.stop()
        await self.models.stop()
        self.arena.close()

    def pool_report(self) -> PoolReport:
        """The pool's books, checked now."""
        try:
            self.pool.check_integrity()
            error = ""
        except PoolIntegrityError as found:
            log.exception("the pool's books do not balance")
            error = str(found)
        return PoolReport(int(self.settings.block_bytes), self.pool, error)

    def _changed(self) -> None:
        if (session := self.sessions.current) is not None:
            session.send(StateChanged())
