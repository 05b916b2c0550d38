"""`ExecutorProcess`: one executor, supervised: started, restarted, told of models, given jobs."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
import structlog

from muxserve.engine.link import Link, LinkClosed
from muxserve.engine.messages import (
    AddModel,
    AttachArena,
    DecodeJob,
    EndLease,
    JobDone,
    ModelAdded,
    ModelRemoved,
    NearsEnd,
    PrefillJob,
    Ready,
    RemoveModel,
    Report,
    Shares,
    Shutdown,
    Step,
    UseShares,
)
from muxserve.worker.child import Child

log = structlog.get_logger(__name__)

Kind = Literal["prefill", "decode", "both"]
"""Of the jobs that an executor takes."""

JobReport = NearsEnd | Step | JobDone

EXECUTOR = ("muxserve.engine.executor",)
"""The executor's module; arguments may follow, which come before all others."""

_STABLE = 10.0
"""Seconds after which a restarted executor counts as healthy again."""
_LONGEST_PAUSE = 5.0
"""Seconds between restarts of an executor that keeps dying."""
_GRACE = 2.0
"""Seconds in which an executor that is asked to end has to."""


class ExecutorFailed(RuntimeError):
    """An executor did not start, or refused a model."""


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """What every executor of a worker is started with."""

    arena: AttachArena
    descriptors: tuple[int, ...]
    """The arena's, which stay open as long as the worker lives; on a GPU none."""
    device: str
    partition: str
    """The settings'."""
    cores: int
    timeout: float
    """Seconds until it must be ready."""
    log_level: str
    module: tuple[str, ...] = EXECUTOR


@dataclass(slots=True)
class _Model:
    message: AddModel
    fds: tuple[int, ...]
    added: asyncio.Future[None]


class ExecutorProcess:
    """Keeps one executor alive, whatever happens to it. Its state is the arena and the models added to it.

    environment: what it has in its own beside the worker's. on_report gets what is reported of jobs.
    on_change is called when it becomes ready and when it dies; `ready` then says which. A job that was
    submitted to an executor that died gets no JobDone.
    `broken` ends with an exception if supervision or one of these calls fails: a bug, and the worker's end.
    """

    def __init__(
        self,
        kind: Kind,
        options: ExecutorOptions,
        environment: Mapping[str, str],
        on_report: Callable[[JobReport], None],
        on_change: Callable[[], None],
    ) -> None:
        self.kind = kind
        self.pid = 0
        self.restarts = 0
        self.ready: Ready | None = None
        self._options = options
        self._environment = environment
        self._on_report = on_report
        self._on_change = on_change
        self._models: dict[str, _Model] = {}
        self._removed: dict[str, asyncio.Future[None]] = {}
        self._link: Link[Report] | None = None
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._becoming: asyncio.Future[Ready] = self._loop.create_future()
        self._supervisor: asyncio.Task[None] | None = None
        self.broken: asyncio.Future[None] = self._loop.create_future()

    @property
    def title(self) -> str:
        """For people."""
        return "the executor" if self.kind == "both" else f"the {self.kind} executor"

    async def start(self) -> None:
        """Returns when it is ready. Raises ExecutorFailed if the first attempt comes to nothing."""
        self._supervisor = asyncio.create_task(self._supervise(), name=f"executor-{self.kind}")
        self._supervisor.add_done_callback(self._supervisor_ended)
        await self._started

    async def stop(self) -> None:
        """End it: by asking, then by force."""
        if self._supervisor is None:
            return
        self._supervisor.cancel()
        await asyncio.wait((self._supervisor,))

    async def add_model(self, message: AddModel, descriptors: tuple[int, ...]) -> None:
        """Returns when jobs may name the model, now and after restarts. The descriptors, and what a handle
        stands for, must stay until `remove_model` has returned. Raises ExecutorFailed if it cannot be
        mapped."""
        model = _Model(message, descriptors, self._loop.create_future())
        self._models[message.model] = model
        self._send(message, model.fds)
        await model.added

    async def remove_model(self, name: str) -> None:
        """Returns when the executor has let go of the model's memory. Unknown names are ignored."""
        if self._models.pop(name, None) is None or self._link is None:
            return
        removed = self._removed[name] = self._loop.create_future()
        self._send(RemoveModel(name))
        await removed

    def submit(self, job: PrefillJob | DecodeJob) -> None:
        """Run a job; only while `ready`, and one of each kind at a time."""
        self._send(job)

    def end_lease(self, job: int) -> None:
        """End that decode job after the step that runs."""
        self._send(EndLease(job))

    def use_shares(self, job: int, shares: Shares) -> None:
        """Go on with that job on its part by these shares, from its next step on."""
        self._send(UseShares(job, shares))

    async def _supervise(self) -> None:
        pause = 0.0
        while True:
            born = self._loop.time()
            child, dead = self._spawn()
            try:
                await self._live(child, dead)
            finally:
                code = await self._end(child)
            if not self._started.done():
                reason = f"{self.title} ended with code {code} before it was ready"
                self._started.set_exception(ExecutorFailed(reason))
                return
            log.warning("executor lost", kind=self.kind, pid=child.pid, code=code)
            self.restarts += 1
            self._on_change()
            pause = 0.0 if self._loop.time() - born > _STABLE else min(_LONGEST_PAUSE, 2 * pause + 0.1)
            await asyncio.sleep(pause)

    def _supervisor_ended(self, supervisor: asyncio.Task[None]) -> None:
        if not supervisor.cancelled() and (error := supervisor.exception()) is not None:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        log.error("executor out of control", kind=self.kind, exc_info=error)
        if not self._started.done():
            self._started.set_exception(error)
        if not self.broken.done():
            self.broken.set_exception(error)

    def _spawn(self) -> tuple[Child, asyncio.Future[None]]:
        ours, theirs = Link.pair()
        options = self._options
        module, *arguments = options.module
        arguments += ["--fd", f"{theirs.fileno()}", "--kind", self.kind, "--device", options.device]
        arguments += ["--partition", options.partition, "--cores", f"{options.cores}"]
        arguments += ["--parent", f"{os.getpid()}", "--log-level", options.log_level]
        with theirs:
            child = Child(module, arguments, pass_fds=[theirs.fileno()], environment=self._environment)
        self._link = Link(ours, Report)
        self._becoming = self._loop.create_future()
        dead: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(ours.fileno(), self._readable, self._link, dead)
        self._send(options.arena, options.descriptors)
        for model in self._models.values():
            self._send(model.message, model.fds)
        return child, dead

    async def _live(self, child: Child, dead: asyncio.Future[None]) -> None:
        """Returns when the executor has died, or was not ready in time and has to."""
        ready = self._becoming
        await asyncio.wait((dead, ready), timeout=self._options.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            if not dead.done():
                log.error("executor is not ready in time", kind=self.kind, seconds=self._options.timeout)
                child.kill()
            return
        self.ready, self.pid = ready.result(), child.pid
        device, partition = self.ready.device, self.ready.partition
        log.info("executor ready", kind=self.kind, pid=self.pid, device=device, partition=partition)
        if not self._started.done():
            self._started.set_result(None)
        self._on_change()
        await dead

    async def _end(self, child: Child) -> int:
        """Have it end, if it lives; its exit code."""
        try:
            self._send(Shutdown())
            return await child.end(_GRACE)
        finally:
            self._detach()

    def _detach(self) -> None:
        """Forget the link to an executor that is gone."""
        self.ready, self.pid = None, 0
        if self._link is not None:
            self._loop.remove_reader(self._link.fileno())
            self._loop.remove_writer(self._link.fileno())
            self._link.close()
            self._link = None
        self._outbox.clear()
        while self._removed:
            _resolve(self._removed.popitem()[1])

    def _readable(self, link: Link[Report], dead: asyncio.Future[None]) -> None:
        try:
            while (received := link.try_receive()) is not None:
                self._handle(received[0])
        except LinkClosed:
            self._loop.remove_reader(link.fileno())
            _resolve(dead)
        except Exception as error:
            self._break(error)

    def _handle(self, report: Report) -> None:
        match report:
            case NearsEnd() | Step() | JobDone():
                self._on_report(report)
            case Ready():
                if not self._becoming.done():
                    self._becoming.set_result(report)
            case ModelAdded(model=name, error=error):
                if (model := self._models.get(name)) is None or model.added.done():
                    if error:
                        log.error("model lost at restart", kind=self.kind, model=name, error=error)
                elif error:
                    del self._models[name]
                    model.added.set_exception(ExecutorFailed(error))
                else:
                    model.added.set_result(None)
            case ModelRemoved(model=name):
                if (removed := self._removed.pop(name, None)) is not None:
                    _resolve(removed)

    def _send(self, message: msgspec.Struct, fds: tuple[int, ...] = ()) -> None:
        """Send now, or as soon as the socket has room. To an executor that is gone: nothing; its successor is
        told of the models at its start."""
        if self._link is None:
            return
        pieces = self._link.pieces(message)
        self._outbox.extend((piece, fds if i == 0 else ()) for i, piece in enumerate(pieces))
        self._flush()

    def _flush(self) -> None:
        if self._link is None:
            return
        fileno = self._link.fileno()
        try:
            while self._outbox:
                self._link.send_piece(*self._outbox[0], block=False)
                self._outbox.popleft()
        except BlockingIOError:
            self._loop.add_writer(fileno, self._flush)
            return
        except LinkClosed:
            self._outbox.clear()  # its death is noticed by the reader
        self._loop.remove_writer(fileno)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
