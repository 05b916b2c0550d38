"""The gateway: holds clients' requests from admission to their last token."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from muxserve.common.documents import PlacementStore
from muxserve.common.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ServiceError,
    Unavailable,
)
from muxserve.common.queue import RequestQueue
from muxserve.common.registry import Registry
from muxserve.gateway import prompts
from muxserve.gateway.attach import SchedulerLinks
from muxserve.gateway.catalog import Catalog, ServedModel
from muxserve.gateway.detokenizer import SilentDetokenizer, detokenizer
from muxserve.gateway.output import Output
from muxserve.gateway.requests import UNFINISHED, LiveRequest, RequestTable, cancel
from muxserve.gateway.settings import GatewaySettings
from muxserve.gateway.stops import StopMatcher
from muxserve.gateway.tokenizer import Tokenizer, TokenizerMissing
from muxserve.gateway.validation import check_request, queued_request
from muxserve.gateway.withdrawals import Withdrawal, Withdrawals
from muxserve.v1 import inference_pb2, scheduler_pb2

THREADS = 2
"""Threads for long prompts and for loading tokenizers."""
STOPPING_RETRY = 1.0
"""Seconds after which clients of a gateway that stops are told to try again."""

OnEnd = Callable[[Callable[[], None]], None]
Write = Callable[[inference_pb2.GenerateResponse], Awaitable[None]]


class Gateway:
    """Owns the requests in flight; everything else it asks for."""

    def __init__(
        self,
        settings: GatewaySettings,
        gateway_id: str,
        registry: Registry,
        placements: PlacementStore,
        queue: RequestQueue,
    ) -> None:
        """`gateway_id` differs for each process."""
        self._settings = settings
        self._id = gateway_id
        self._placements = placements
        self._queue = queue
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="text")
        self._table = RequestTable(settings.max_requests, settings.longest_wait)
        self._withdrawals = Withdrawals(queue)
        self._changed = asyncio.Event()
        self._empty = asyncio.Event()
        self._draining = False
        self.catalog = Catalog(self._threads, self._changed.set)
        self._links = SchedulerLinks(registry, gateway_id, self._table, self._changed.set)

    @property
    def ready(self) -> bool:
        """Whether requests would be served: a model is ready or can be woken, and a scheduler listens."""
        return self.catalog.any_served and self._links.attached and not self._draining

    async def wait_for_change(self) -> None:
        """Wait until `ready` may have changed."""
        await self._changed.wait()
        self._changed.clear()

    async def run(self) -> None:
        """The background work. Returns only by being cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_placement(), name="placement")
            tasks.create_task(self._links.run(), name="scheduler links")
            tasks.create_task(self._withdrawals.run(), name="withdrawals")

    async def drain(self) -> None:
        """Take no more requests; give those in flight the time that the settings say, then end them."""
        self._draining = True
        self._changed.set()
        if len(self._table):
            self._empty.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.drain):
                    await self._empty.wait()
        for live in self._table:
            live.fail(Unavailable("the gateway is stopping", STOPPING_RETRY))
            self._release(live)
        await self._withdrawals.flush(1.0)
        await self._links.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def generate(
        self,
        request: inference_pb2.GenerateRequest,
        request_id: str,
        time_remaining: float | None,
        on_end: OnEnd,
        write: Write,
    ) -> None:
        """Serve a request, `write` its answer piece by piece. Raises ServiceError, and what `write` raises.

        `time_remaining` in seconds; `on_end` registers what to call when the call is over, however it ends.
        """
        if self._draining:
            raise Unavailable("the gateway is stopping", STOPPING_RETRY)
        self._table.check_room()
        check_request(request)
        seconds = self._settings.default_deadline if time_remaining is None else time_remaining
        model = self.catalog.admit(request.model, seconds)
        tokenizer = await self._tokenizer(request, model)
        queued = await self._resolve(request, model, tokenizer)
        self._stamp(queued, request_id, seconds)
        live = self._table.open(queued, eager=bool(request.stop))
        late = DeadlineExceeded(f"the request did not end within {seconds:.3g} s")
        expiry = asyncio.get_running_loop().call_later(seconds, live.fail, late)
        admission = self._queue.admit(queued, self._settings.max_waiting)
        live.admission = asyncio.create_task(admission, name=f"admit {live.id}")

        def release() -> None:
            expiry.cancel()
            self._release(live)

        on_end(release)
        try:
            # Shielded: an admission that is on its way has to be known, to be withdrawn.
            await asyncio.shield(live.admission)
            text = SilentDetokenizer() if tokenizer is None else detokenizer(tokenizer.decoding)
            stops = StopMatcher(request.stop) if request.stop else None
            output = Output(request_id, len(queued.prompt_tokens), text, stops)
            finish_reason = UNFINISHED
            while finish_reason == UNFINISHED:
                response = output.respond(await live.take())
                finish_reason = response.finish_reason
                await write(response)
        finally:
            release()

    async def _tokenizer(
        self, request: inference_pb2.GenerateRequest, model: ServedModel
    ) -> Tokenizer | None:
        """None: the checkpoint has none, and the request can do without."""
        try:
            return await self.catalog.tokenizer(model)
        except TokenizerMissing:
            if request.WhichOneof("input") != "prompt_tokens":
                raise
            if request.stop:
                reason = f'model "{model.name}" has no tokenizer, so there is no text to find them in'
                raise InvalidArgument("stop", reason) from None
            return None

    async def _resolve(
        self, request: inference_pb2.GenerateRequest, model: ServedModel, tokenizer: Tokenizer | None
    ) -> scheduler_pb2.QueuedRequest:
        given = request.WhichOneof("input") or ""
        prompt: Sequence[int] = request.prompt_tokens.ids
        if tokenizer is not None and given != "prompt_tokens":
            prompt = await prompts.encode(request, tokenizer, model.shape.context_length, self._threads)
        return queued_request(request, prompts.FIELDS[given], prompt, model.shape)

    def _stamp(self, queued: scheduler_pb2.QueuedRequest, request_id: str, seconds: float) -> None:
        """Add ids and times. Clients choose request ids, so that two may be equal: ours has a suffix."""
        now = time.time()
        queued.request_id = f"{request_id}~{uuid.uuid4().hex[:12]}"
        queued.gateway_id = self._id
        queued.accepted_unix_ms = round(now * 1000)
        queued.deadline_unix_ms = round((now + seconds) * 1000)

    def _release(self, live: LiveRequest) -> None:
        """Forget a request; where schedulers have not ended it, see that they do. Idempotent."""
        if not self._table.close(live):
            return
        if not len(self._table):
            self._empty.set()
        if live.finish_reason == UNFINISHED:
            self._links.send(live.scheduler_id, cancel(live.id))
            if live.admission is not None:
                self._withdrawals.add(Withdrawal(live.queued.model, live.admission))

    async def _follow_placement(self) -> None:
        async for placement in self._placements.watch():
            self.catalog.update(placement)
            self._give_up()

    def _give_up(self) -> None:
        """Fail requests that no scheduler has or will take: their model has failed while they waited."""
        for live in self._table:
            if live.attempt:
                continue
            try:
                self.catalog.check(live.queued.model)
            except ServiceError as error:
                live.fail(error)
