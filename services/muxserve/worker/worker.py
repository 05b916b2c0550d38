"""`Worker`: the parts of a worker put together, and their start and end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from muxserve.engine.pool import BlockPool, PoolIntegrityError
from muxserve.worker.device import WorkerDevice, open_device
from muxserve.worker.executors import ExecutorOptions
from muxserve.worker.fence import Fence
from muxserve.worker.lanes import Lanes
from muxserve.worker.models import ModelTable
from muxserve.worker.prefix_cache import PrefixCache
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

    device: what the settings say if None. Raises ArenaError, DeviceError.
    """

    def __init__(
        self, settings: WorkerSettings, incarnation: str, device: WorkerDevice | None = None
    ) -> None:
        self.settings = settings
        self.incarnation = incarnation
        self.device = device or open_device(settings)
        self.arena = self.device.arena
        self.pool = BlockPool(self.arena.blocks)
        options = ExecutorOptions(
            arena=self.arena.descriptor(),
            descriptors=(self.arena.fd,) if self.arena.fd >= 0 else (),
            device=settings.device,
            partition=settings.partition,
            cores=settings.threads,
            timeout=settings.executor_timeout,
            log_level=settings.log_level,
            module=self.device.executor,
        )
        self.lanes = Lanes(options, self.device.executors, self.pool, self._changed)
        self.weights = WeightStore(
            int(settings.weight_budget or 0),
            threads=settings.threads,
            timeout=settings.load_timeout,
            memories=self.device.memories,
        )
        self.models = ModelTable(
            self.pool,
            self.weights,
            self.lanes.executors,
            block_bytes=int(settings.block_bytes),
            slots=settings.slots,
            on_change=self._changed,
        )
        prefixes = PrefixCache(self.pool, enabled=settings.prefix_cache, outputs=settings.prefix_outputs)
        self.sessions = Sessions(
            lambda scheduler, epoch: Session(
                scheduler, epoch, self.lanes, self.models, self.pool, prefixes, settings.longest_wait
            )
        )
        self.fence = Fence()
        self.ready = False
        """Whether it has started: before that it does not know what its weights may take."""

    async def start(self) -> None:
        """Returns when the executors are ready. Raises ExecutorFailed, DeviceError."""
        await self.device.start()
        await self.lanes.start()
        if self.settings.weight_budget is None:
            self.weights.budget = self.device.room()
        log.info(
            "worker ready",
            arena_mib=self.settings.arena // MIB,
            blocks=self.pool.blocks,
            device=self.settings.device,
            compute_units=self.device.units,
            partition=self.device.offer.partition,
            reason=self.device.offer.reason,
            weight_budget_mib=self.weights.budget // MIB,
        )
        self.ready = True

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
        await self.device.stop()

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
