"""A worker without an engine: it speaks WorkerService, keeps real books of blocks and slots, and its tokens
are a function of everything before them, so that a recomputation that goes wrong shows."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

from muxserve.common.errors import Aborted
from muxserve.common.rpc import RpcServer
from muxserve.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from tests.support.ports import free_port

OUT_OF_BLOCKS = worker_pb2.REFUSAL_REASON_OUT_OF_BLOCKS
OUT_OF_SLOTS = worker_pb2.REFUSAL_REASON_OUT_OF_SLOTS
NOT_OPEN = worker_pb2.REFUSAL_REASON_NOT_OPEN
NO_MODEL = worker_pb2.REFUSAL_REASON_NO_MODEL
RUNNING = worker_pb2.SEQUENCE_STATE_RUNNING
STOP = worker_pb2.SEQUENCE_STATE_STOP
LENGTH = worker_pb2.SEQUENCE_STATE_LENGTH


def next_token(tokens: Sequence[int]) -> int:
    """What this worker's models say after `tokens`."""
    return zlib.crc32(b"".join(token.to_bytes(4, "little") for token in tokens)) % 1000


def completion(prompt: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> list[int]:
    """The undisturbed output."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def shape(
    tokens_per_block: int = 4, blocks_per_span: int = 2, slots: int = 8, context: int = 512
) -> common_pb2.ModelShape:
    return common_pb2.ModelShape(
        architecture="fake",
        context_length=context,
        vocab_size=1000,
        tokens_per_block=tokens_per_block,
        blocks_per_span=blocks_per_span,
        slots=slots,
    )


@dataclass
class OpenSequence:
    opened: worker_pb2.OpenSequence
    tokens: list[int]
    computed: int = 0
    groups: int = 0
    seated: bool = False
    busy: bool = False
    finished: bool = False
    closing: bool = False

    @property
    def decodes(self) -> bool:
        return self.computed == len(self.tokens) - 1

    @property
    def goes_on(self) -> bool:
        """Whether there is more to sample than the next token, unless that is a stop token."""
        return len(self.tokens) + 1 < self.opened.limit


@dataclass
class Stream:
    """One scheduler's Jobs stream."""

    worker: FakeWorker
    out: asyncio.Queue[worker_pb2.JobsResponse | None] = field(default_factory=asyncio.Queue)
    sequences: dict[int, OpenSequence] = field(default_factory=dict)
    lanes: dict[str, deque[Any]] = field(default_factory=lambda: {"prefill": deque(), "decode": deque()})
    wake: dict[str, asyncio.Event] = field(
        default_factory=lambda: {"prefill": asyncio.Event(), "decode": asyncio.Event()}
    )
    ending: set[int] = field(default_factory=set)
    running: dict[str, Any] = field(default_factory=dict)

    def receive(self, request: worker_pb2.JobsRequest) -> None:
        match request.WhichOneof("kind"):
            case "open":
                sequence = OpenSequence(request.open, list(request.open.token_ids))
                self.sequences[request.open.sequence] = sequence
                self.seat(sequence)
            case "prefill" | "decode" as kind:
                self.worker.jobs.append(getattr(request, kind))
                self.lanes[kind].append(getattr(request, kind))
                self.wake[kind].set()
            case "end_lease":
                self.end_lease(request.end_lease.job)
            case "close":
                for number in request.close.sequences:
                    if (closed := self.sequences.get(number)) is not None:
                        closed.closing = True
                        self.leave(number, busy=closed.busy)
            case "quotas":
                self.worker.quotas = dict(request.quotas.blocks)
                self.worker.quota_revision = request.quotas.revision

    def seat(self, sequence: OpenSequence) -> bool:
        slots = self.worker.shapes[sequence.opened.model].slots
        if not sequence.seated and self.worker.seated(sequence.opened.model) < slots:
            sequence.seated = True
        return sequence.seated

    def leave(self, number: int, busy: bool) -> None:
        sequence = self.sequences[number]
        sequence.busy = busy
        if sequence.closing and not busy:
            del self.sequences[number]

    def end_lease(self, job: int) -> None:
        for waiting in self.lanes["decode"]:
            if waiting.job == job:
                self.lanes["decode"].remove(waiting)
                self.done(job)
                return
        self.ending.add(job)

    def done(
        self, job: int, outcome: worker_pb2.JobOutcome.ValueType = worker_pb2.JOB_OUTCOME_OK, **more: Any
    ) -> None:
        done = worker_pb2.JobDone(job=job, outcome=outcome, available_blocks=self.worker.available, **more)
        self.out.put_nowait(worker_pb2.JobsResponse(done=done))

    def admit(self, number: int, model: str, tokens: int) -> worker_pb2.RefusalReason.ValueType | None:
        """Reserve blocks; the reason of a refusal, if it is one."""
        sequence = self.sequences.get(number)
        if model not in self.worker.shapes:
            return NO_MODEL
        if sequence is None or sequence.finished or sequence.busy or sequence.closing:
            return NOT_OPEN
        if self.worker.refuse:
            return self.worker.refuse.pop(0)
        if not self.seat(sequence):
            return OUT_OF_SLOTS
        layout = self.worker.shapes[model]
        groups = max(sequence.groups, -(-tokens // layout.tokens_per_block))
        if (groups - sequence.groups) * layout.blocks_per_span > self.worker.available:
            return OUT_OF_BLOCKS
        sequence.groups, sequence.busy = groups, True
        self.worker.peak = max(self.worker.peak, self.worker.blocks - self.worker.available)
        return None

    async def lane(self, kind: str) -> None:
        """Run jobs of one executor, one at a time."""
        while True:
            await self.wake[kind].wait()
            if not self.lanes[kind]:
                self.wake[kind].clear()
                continue
            job = self.running[kind] = self.lanes[kind].popleft()
            await (self.prefill(job) if kind == "prefill" else self.decode(job))
            self.running.pop(kind, None)

    async def prefill(self, job: worker_pb2.PrefillJob) -> None:
        refused, taken = [], []
        for chunk in job.chunks:
            if reason := self.admit(chunk.sequence, job.model, chunk.end):
                refused.append(worker_pb2.Refusal(sequence=chunk.sequence, reason=reason))
            else:
                assert self.sequences[chunk.sequence].computed == chunk.start
                assert chunk.start < chunk.end <= len(self.sequences[chunk.sequence].tokens)
                taken.append(chunk)
        tokens = sum(chunk.end - chunk.start for chunk in taken)
        await self.worker.pace("prefill", tokens)
        if job.lead_seconds:
            nearing = worker_pb2.JobNearing(job=job.job)
            self.out.put_nowait(worker_pb2.JobsResponse(nearing=nearing))
            await self.worker.pace("prefill", tokens)
        await self.filled("prefill")
        if self.lost("prefill", job.job, [chunk.sequence for chunk in taken]):
            return
        ended = []
        for chunk in taken:
            sequence = self.sequences[chunk.sequence]
            sequence.computed = chunk.end
            if chunk.end == len(sequence.tokens):
                ended.append(chunk.sequence)
        self.step(job.job, ended)
        for chunk in taken:
            self.leave(chunk.sequence, busy=False)
        self.worker.prefills_followed.append(bool(self.lanes["prefill"]))
        self.done(job.job, refused=refused, steps=1, seconds=0.001)

    async def decode(self, job: worker_pb2.DecodeJob) -> None:
        refused, batch = [], []
        for number in job.sequences:
            sequence = self.sequences.get(number)
            tokens = min(len(sequence.tokens) + job.steps - 1, sequence.opened.limit - 1) if sequence else 0
            if reason := self.admit(number, job.model, tokens):
                refused.append(worker_pb2.Refusal(sequence=number, reason=reason))
            else:
                batch.append(number)
                assert number in job.prompts or self.sequences[number].decodes
        steps = 0
        while batch and steps < job.steps and job.job not in self.ending:
            await self.worker.pace("decode", len(batch))
            if steps + 1 == job.steps and any(self.sequences[number].goes_on for number in batch):
                await self.filled("decode")
            if self.lost("decode", job.job, batch):
                return
            for number in batch:
                sequence = self.sequences[number]
                sequence.computed = len(sequence.tokens)
                layout = self.worker.shapes[job.model]
                assert sequence.computed <= sequence.groups * layout.tokens_per_block
            steps += 1
            self.step(job.job, batch, steps)
            for number in [n for n in batch if self.sequences[n].finished]:
                batch.remove(number)
                self.leave(number, busy=False)
        if batch and steps < job.steps:
            await self.filled("decode")
        for number in batch:
            self.leave(number, busy=False)
        ends = self.worker.followed if steps == job.steps else self.worker.cut_short
        if batch or steps == job.steps:
            ends.append(bool(self.lanes["decode"]))
        self.done(job.job, refused=refused, steps=steps, seconds=0.001 * steps)

    async def filled(self, kind: str) -> None:
        """Wait for the job that is to follow, as long as the worker has patience. Nobody is told meanwhile
        that the one that runs is about to end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.worker.patience):
                while self.worker.patience and not self.lanes[kind]:
                    self.wake[kind].clear()
                    await self.wake[kind].wait()

    def step(self, job: int, numbers: Sequence[int], steps: int = 1) -> None:
        event = worker_pb2.StepEvents(job=job, steps=steps)
        for number in numbers:
            sequence = self.sequences[number]
            token = next_token(sequence.tokens)
            sequence.tokens.append(token)
            state = STOP if token in sequence.opened.stop_token_ids else RUNNING
            if state == RUNNING and len(sequence.tokens) >= sequence.opened.limit:
                state = LENGTH
            sequence.finished = state != RUNNING
            event.sequences.append(number)
            event.positions.append(len(sequence.tokens) - 1)
            event.token_ids.append(token)
            event.counts.append(1)
            event.states.append(state)
            if sequence.opened.HasField("logprobs"):
                chosen = common_pb2.TokenLogprob(token_id=token, logprob=-0.5)
                event.logprobs.append(common_pb2.Logprobs(chosen=chosen))
        if numbers:
            self.out.put_nowait(worker_pb2.JobsResponse(step=event))

    def lost(self, kind: str, job: int, members: Sequence[int]) -> bool:
        if kind not in self.worker.kill:
            return False
        self.worker.kill.remove(kind)
        for number in list(members):
            self.sequences[number].closing = True
            self.leave(number, busy=False)
        self.done(job, worker_pb2.JOB_OUTCOME_EXECUTOR_LOST, error="the executor died")
        return True


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """`blocks` of arena and these models. Set `kill`, `refuse` and `gate` to make trouble."""

    def __init__(self, blocks: int, shapes: dict[str, common_pb2.ModelShape], seconds: float = 0.001) -> None:
        self.blocks, self.shapes, self.seconds = blocks, shapes, seconds
        self.kill: list[str] = []
        """Executors that die in their next step."""
        self.refuse: list[worker_pb2.RefusalReason.ValueType] = []
        """Reasons with which the next sequences are refused."""
        self.gate = asyncio.Event()
        """Cleared: executors stand still."""
        self.gate.set()
        self.jobs: list[Any] = []
        self.followed: list[bool] = []
        """Whether another decode job waited when one had run to its end."""
        self.cut_short: list[bool] = []
        """The same when the lease was ended."""
        self.prefills_followed: list[bool] = []
        """The same of prefill jobs."""
        self.patience = 0.0
        """Seconds for which the last step of a job goes on, if need be, until the job that is to follow is
        there: only a scheduler that does not send it is too late then."""
        self.peak = 0
        self.quotas: dict[str, int] = {}
        self.quota_revision = 0
        self.streams = 0
        self._stream: Stream | None = None
        self._epoch = 0
        self._server: RpcServer | None = None
        self.address = f"127.0.0.1:{free_port()}"

    @property
    def sequences(self) -> dict[int, OpenSequence]:
        return self._stream.sequences if self._stream else {}

    @property
    def available(self) -> int:
        used = (s.groups * self.shapes[s.opened.model].blocks_per_span for s in self.sequences.values())
        return self.blocks - sum(used)

    def seated(self, model: str) -> int:
        return sum(s.seated for s in self.sequences.values() if s.opened.model == model)

    async def pace(self, kind: str, tokens: int) -> None:
        await self.gate.wait()
        await asyncio.sleep(self.seconds)

    async def start(self) -> str:
        """Serve, at the same address every time."""
        self._server = RpcServer(self.address)
        self._server.add(
            worker_pb2_grpc.add_WorkerServiceServicer_to_server, self, "muxserve.v1.WorkerService"
        )
        self.address = await self._server.start()
        return self.address

    async def stop(self) -> None:
        """Gone at once, with everything that it held."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def info(self) -> worker_pb2.WorkerInfo:
        return worker_pb2.WorkerInfo(
            worker_id="worker-0",
            device="cpu",
            compute_units=2,
            pool=worker_pb2.PoolState(total_blocks=self.blocks, free_blocks=self.available),
            prompts_join=True,
            models=[worker_pb2.LoadedModel(model=name, shape=one) for name, one in self.shapes.items()],
        )

    def changed(self) -> None:
        """Tell the scheduler that models have changed."""
        assert self._stream is not None
        self._stream.out.put_nowait(worker_pb2.JobsResponse(info=self.info()))

    async def Jobs(
        self,
        request_iterator: AsyncIterator[worker_pb2.JobsRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[worker_pb2.JobsResponse]:
        hello = (await anext(request_iterator)).hello
        if hello.epoch < self._epoch:
            raise Aborted("an older epoch")
        self._epoch = hello.epoch
        if self._stream is not None:
            self._stream.out.put_nowait(None)
        stream = self._stream = Stream(self)
        self.streams += 1

        async def read() -> None:
            async for request in request_iterator:
                stream.receive(request)
            stream.out.put_nowait(None)

        tasks = [
            asyncio.create_task(part) for part in (read(), stream.lane("prefill"), stream.lane("decode"))
        ]
        for task in tasks:
            task.add_done_callback(_surface)
        try:
            yield worker_pb2.JobsResponse(info=self.info())
            while (response := await stream.out.get()) is not None:
                yield response
        finally:
            for task in tasks:
                task.cancel()
            if self._stream is stream:
                self._stream = None
        if hello.epoch < self._epoch:
            raise Aborted("replaced")


def _surface(task: asyncio.Task[None]) -> None:
    """An assertion that failed in a lane is an error of the test."""
    if not task.cancelled() and (error := task.exception()) is not None:
        asyncio.get_running_loop().call_exception_handler({"message": "fake worker", "exception": error})
