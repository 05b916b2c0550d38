"""`Session`: one scheduler's Jobs stream. `Sessions`: which of several schedulers is heard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import structlog

from muxserve.common.errors import Aborted
from muxserve.engine.pool import BlockPool
from muxserve.worker.lanes import Lanes
from muxserve.worker.models import ModelTable
from muxserve.worker.orders import DecodeOrder, Ended, Nearing, Opening, PrefillOrder, QuotasInForce, Tokens
from muxserve.worker.pacing import Pacer, Progress
from muxserve.worker.prefix_cache import PrefixCache
from muxserve.worker.sequences import SequenceBook

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StateChanged:
    """Models or executors have changed: the scheduler is to be told how the worker stands."""


Event = Progress | Nearing | Ended | StateChanged | QuotasInForce


class Session:
    """One stream's sequences and jobs, and the events that wait to be sent.

    Events are as many as the steps of the jobs that were accepted, so a scheduler that reads slowly fills no
    memory: it gets no new tokens for jobs that it does not send.
    """

    def __init__(
        self,
        scheduler: str,
        epoch: int,
        lanes: Lanes,
        models: ModelTable,
        pool: BlockPool,
        prefixes: PrefixCache,
        longest_wait: float = 0.0,
    ) -> None:
        """`longest_wait`: of a token for those of later steps, in seconds."""
        self.scheduler = scheduler
        self.epoch = epoch
        self.book = SequenceBook(models, pool, prefixes)
        self._lanes = lanes
        self._models = models
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._pacer = Pacer(longest_wait, self._events.put_nowait)
        self._pool = pool
        self._quota_revision = 0
        self._above: tuple[str, ...] = ()
        """Models that have been above their quotas ever since these came."""
        self._closing: asyncio.Task[None] | None = None
        self.replaced = False

    def send(self, event: Nearing | Tokens | Ended | StateChanged) -> None:
        """Queue an event for the stream."""
        if self._closing is not None:
            return
        match event:
            case Tokens():
                self._pacer.tokens(event)
            case Ended():
                self._pacer.ended(event)
                self._come_down()
            case Nearing() | StateChanged():
                self._events.put_nowait(event)

    async def next_event(self) -> Event | None:
        """The next event; None: the stream is to end. Raises Aborted if a newer stream has replaced it."""
        event = await self._events.get()
        if event is None and self.replaced:
            raise Aborted("a newer stream has replaced this one")
        return event

    def open(self, opening: Opening) -> None:
        """Declare a sequence."""
        if self._closing is None:
            self.book.open(opening)

    def prefill(self, order: PrefillOrder) -> None:
        """Run prompt chunks."""
        if self._closing is None:
            self._lanes.prefill.submit(self, order)

    def decode(self, order: DecodeOrder) -> None:
        """Run decode steps."""
        if self._closing is None:
            self._pacer.ordered(order)
            self._lanes.decode.submit(self, order)

    def end_lease(self, job: int) -> None:
        """End a decode job after the step that runs."""
        self._lanes.decode.end_lease(self, job)

    def close_sequences(self, numbers: Iterable[int]) -> None:
        """Give back their slots and blocks."""
        self.book.close(numbers)
        self._come_down()

    def set_quotas(self, revision: int, blocks: Mapping[str, int]) -> None:
        """Set block quotas, unless newer ones were set before, and tell which are in force."""
        if revision > self._quota_revision:
            self._quota_revision = revision
            self._models.set_quotas(blocks)
            self._above = tuple(self._pool.borrowers())
        self._events.put_nowait(QuotasInForce(self._quota_revision, self._above))

    def _come_down(self) -> None:
        """Blocks were given back: tell when the last model that was above its quota is no longer."""
        if self._above:
            borrowers = self._pool.borrowers()
            self._above = tuple(model for model in self._above if model in borrowers)
            if not self._above:
                self._events.put_nowait(QuotasInForce(self._quota_revision, ()))

    def finish(self) -> None:
        """Nothing more will come from the scheduler: end the stream."""
        self._events.put_nowait(None)

    async def close(self) -> None:
        """Drop its jobs and free its sequences; returns when nothing of it is left. Goes on if the caller is
        cancelled; may be called again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"close-{self.scheduler}")
            self.finish()
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        left = len(self.book)
        self._pacer.flush()  # its timer must not outlive the session
        self.book.close_all()
        await self._lanes.drop(self)
        log.info("jobs stream closed", scheduler=self.scheduler, epoch=self.epoch, sequences_freed=left)


class Sessions:
    """At most one session; the highest epoch wins, and of equal ones the newest."""

    def __init__(self, make: Callable[[str, int], Session]) -> None:
        self._make = make
        self._current: Session | None = None
        self._epoch = 0
        self._turn = asyncio.Lock()

    @property
    def current(self) -> Session | None:
        """The session whose stream is open."""
        return self._current

    async def open(self, scheduler: str, epoch: int) -> Session:
        """A new session, once all that the last one held is free. Raises Aborted after a higher epoch."""
        self._fence(epoch)
        async with self._turn:
            self._fence(epoch)
            if (before := self._current) is not None:
                before.replaced = True
                await before.close()
            session = self._current = self._make(scheduler, epoch)
            log.info("jobs stream opened", scheduler=scheduler, epoch=epoch)
            return session

    async def close(self, session: Session) -> None:
        """End a session; returns when all that it held is free."""
        await session.close()
        if self._current is session:
            self._current = None

    def _fence(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise Aborted(f"epoch {epoch} is older than {self._epoch}, which was here before")
        self._epoch = epoch
