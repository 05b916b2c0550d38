"""A worker with real executors in the test's process, and a scheduler's end of its Jobs stream."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from muxserve.common.rpc import RpcServer, channel
from muxserve.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from muxserve.worker.device import WorkerDevice, open_device
from muxserve.worker.service import SERVICE, WorkerServicer
from muxserve.worker.settings import WorkerSettings
from muxserve.worker.worker import Worker

GREEDY = common_pb2.SamplingParams(temperature=0.0, top_p=1.0, seed=0, repetition_penalty=1.0)
LIMIT = 60.0
"""Seconds after which a test gives up waiting."""


@dataclass
class Harness:
    """A worker that serves."""

    worker: Worker
    stub: worker_pb2_grpc.WorkerServiceAsyncStub
    address: str
    _epoch: int = 0

    async def load(self, name: str, path: Path, **options: Any) -> common_pb2.ModelShape:
        config = common_pb2.ModelConfig(name=name, path=str(path), **options)
        return (await self.stub.LoadModel(worker_pb2.LoadModelRequest(model=config), timeout=LIMIT)).shape

    async def inspect(self, name: str, path: Path, **options: Any) -> common_pb2.ModelShape:
        config = common_pb2.ModelConfig(name=name, path=str(path), **options)
        request = worker_pb2.InspectModelRequest(model=config)
        return (await self.stub.InspectModel(request, timeout=LIMIT)).shape

    async def unload(self, name: str) -> None:
        await self.stub.UnloadModel(worker_pb2.UnloadModelRequest(model=name), timeout=LIMIT)

    async def info(self) -> worker_pb2.WorkerInfo:
        return (await self.stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=LIMIT)).info

    async def assert_idle(self) -> None:
        """All blocks are free, or will be when the last stream has been cleaned up; the books balance."""
        async with asyncio.timeout(LIMIT):
            while (pool := (await self.info()).pool).free_blocks + pool.cached_blocks != pool.total_blocks:
                assert pool.integrity_error == ""
        assert pool.integrity_error == ""

    @asynccontextmanager
    async def stopped(self, kind: str) -> AsyncIterator[None]:
        """Executors of that kind stand still meanwhile."""
        pids = [executor.pid for executor in (await self.info()).executors if executor.kind == kind]
        assert pids and all(pids)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    @asynccontextmanager
    async def stream(self, epoch: int | None = None) -> AsyncIterator[Stream]:
        """A Jobs stream, of a higher epoch than all before unless `epoch` says otherwise."""
        self._epoch = max(self._epoch + 1, epoch or 0)
        epoch = epoch or self._epoch
        stream = Stream(self.stub.Jobs(), epoch)
        await stream.begin()
        try:
            yield stream
        finally:
            await stream.end()


@asynccontextmanager
async def running_worker(
    make_device: Callable[[WorkerSettings], WorkerDevice] = open_device, /, **settings: Any
) -> AsyncIterator[Harness]:
    """A worker of the test's own, with a small arena unless `settings` say otherwise."""
    values: dict[str, Any] = {
        "id": "worker-t",
        "arena": 8 * 2**20,
        "block_bytes": 4096,
        "cores": 1,
        "slots": 8,
    }
    values |= {"longest_wait": 0.0, **settings}  # every step is told at once
    chosen = WorkerSettings(**values)
    worker = Worker(chosen, "one", make_device(chosen))
    server = RpcServer("127.0.0.1:0", with_reflection=False)
    server.add(worker_pb2_grpc.add_WorkerServiceServicer_to_server, WorkerServicer(worker), SERVICE)
    try:
        address = await server.start()
        await worker.start()
        async with channel(address) as connection:
            yield Harness(worker, worker_pb2_grpc.WorkerServiceStub(connection), address)
    finally:
        await server.stop(0.5)
        await worker.stop()


@dataclass
class JobResult:
    """What came back of a job."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    """By sequence, in order."""
    states: dict[int, int] = field(default_factory=dict)
    steps: list[worker_pb2.StepEvents] = field(default_factory=list)
    nearing: list[int] = field(default_factory=list)
    """How many steps had come each time that it was said to near its end."""
    done: worker_pb2.JobDone = field(default_factory=worker_pb2.JobDone)
    first: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at its first step."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def refused(self) -> dict[int, str]:
        name = worker_pb2.RefusalReason.Name
        return {r.sequence: name(r.reason).removeprefix("REFUSAL_REASON_") for r in self.done.refused}

    @property
    def outcome(self) -> str:
        return worker_pb2.JobOutcome.Name(self.done.outcome).removeprefix("JOB_OUTCOME_")


class Stream:
    """A scheduler's end of a Jobs stream."""

    def __init__(self, call: Any, epoch: int) -> None:
        self._call = call
        self._writing = asyncio.Lock()  # gRPC takes one write at a time
        self._epoch = epoch
        self._numbers = itertools.count(1)
        self._jobs: dict[int, JobResult] = {}
        self._reader: asyncio.Task[None] | None = None
        self.infos: asyncio.Queue[worker_pb2.WorkerInfo] = asyncio.Queue()
        self.ended: list[int] = []
        """Jobs in the order in which the worker said that they ended: what a test asks when the machine
        that it runs on may have stopped it for as long as a job takes."""
        self.error: grpc.aio.AioRpcError | None = None

    async def begin(self) -> None:
        await self.say(hello=worker_pb2.JobsRequest.Hello(scheduler_id="s", epoch=self._epoch))
        self._reader = asyncio.create_task(self._read())
        info = asyncio.create_task(self.infos.get())
        async with asyncio.timeout(LIMIT):
            await asyncio.wait((info, self._reader), return_when=asyncio.FIRST_COMPLETED)
        info.cancel()

    async def end(self) -> None:
        self._call.cancel()
        if self._reader:
            await asyncio.wait((self._reader,))

    async def closed(self) -> None:
        """Returns when the worker has ended the stream."""
        assert self._reader
        async with asyncio.timeout(LIMIT):
            await asyncio.wait((self._reader,))

    async def say(self, **kind: Any) -> None:
        async with self._writing:
            with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                await self._call.write(worker_pb2.JobsRequest(**kind))

    async def open(
        self,
        model: str,
        tokens: Sequence[int],
        new: int,
        *,
        sampling: common_pb2.SamplingParams = GREEDY,
        stop: Iterable[int] = (),
        logprobs: int | None = None,
        limit: int | None = None,
        prompt_length: int | None = None,
    ) -> int:
        """Open a sequence that ends after `new` more tokens; its number."""
        number = next(self._numbers)
        opening = worker_pb2.OpenSequence(
            sequence=number,
            model=model,
            token_ids=tokens,
            prompt_length=len(tokens) if prompt_length is None else prompt_length,
            sampling=sampling,
            stop_token_ids=list(stop),
            limit=limit or len(tokens) + new,
            logprobs=logprobs,
        )
        await self.say(open=opening)
        return number

    async def close(self, *numbers: int) -> None:
        await self.say(close=worker_pb2.CloseSequences(sequences=numbers))

    async def start_prefill(
        self,
        model: str,
        chunks: Mapping[int, tuple[int, int]],
        share: float = 1.0,
        borrow: bool = True,
        lead: float = 0.0,
    ) -> int:
        job = self._new_job()
        each = [
            worker_pb2.PrefillJob.Chunk(sequence=number, start=start, end=end)
            for number, (start, end) in chunks.items()
        ]
        order = worker_pb2.PrefillJob(
            job=job, model=model, chunks=each, share=share, borrow=borrow, lead_seconds=lead
        )
        await self.say(prefill=order)
        return job

    async def start_decode(
        self,
        model: str,
        numbers: Iterable[int],
        steps: int,
        share: float = 1.0,
        borrow: bool = True,
        exclusive: bool = False,
        prompts: Iterable[int] = (),
    ) -> int:
        job = self._new_job()
        order = worker_pb2.DecodeJob(
            job=job,
            model=model,
            sequences=numbers,
            steps=steps,
            share=share,
            borrow=borrow,
            exclusive=exclusive,
            prompts=prompts,
        )
        await self.say(decode=order)
        return job

    async def prefill(self, model: str, chunks: Mapping[int, tuple[int, int]]) -> JobResult:
        return await self.result(await self.start_prefill(model, chunks))

    async def decode(
        self, model: str, numbers: Iterable[int], steps: int, prompts: Iterable[int] = ()
    ) -> JobResult:
        return await self.result(await self.start_decode(model, numbers, steps, prompts=prompts))

    async def first_step(self, job: int) -> JobResult:
        """Returns when the job's first tokens are there."""
        async with asyncio.timeout(LIMIT):
            await self._jobs[job].first.wait()
        return self._jobs[job]

    async def result(self, job: int) -> JobResult:
        """Returns when the job has ended."""
        async with asyncio.timeout(LIMIT):
            await self._jobs[job].ended.wait()
        return self._jobs[job]

    async def generate(
        self, model: str, prompts: Sequence[Sequence[int]], new: int, *, chunk: int = 1 << 30, steps: int = 8
    ) -> list[list[int]]:
        """`new` greedy tokens of each prompt: chunked prefill of all together, then leases of all."""
        numbers = {await self.open(model, prompt, new): list(prompt) for prompt in prompts}
        texts: dict[int, list[int]] = {number: [] for number in numbers}
        for start in range(0, max(map(len, prompts)), chunk):
            chunks = {
                number: (start, min(start + chunk, len(prompt)))
                for number, prompt in numbers.items()
                if len(prompt) > start
            }
            _extend(texts, await self.prefill(model, chunks))
        while going := [number for number, text in texts.items() if len(text) < new]:
            _extend(texts, await self.decode(model, going, steps))
        await self.close(*numbers)
        return list(texts.values())

    def _new_job(self) -> int:
        job = next(self._numbers)
        self._jobs[job] = JobResult()
        return job

    async def _read(self) -> None:
        try:
            async for response in self._call:
                match response.WhichOneof("kind"):
                    case "info":
                        self.infos.put_nowait(response.info)
                    case "step":
                        self._on_step(response.step)
                    case "nearing":
                        result = self._jobs[response.nearing.job]
                        result.nearing.append(len(result.steps))
                    case "done":
                        result = self._jobs[response.done.job]
                        result.done = response.done
                        result.ended.set()
                        self.ended.append(response.done.job)
        except grpc.aio.AioRpcError as error:
            self.error = error
        except asyncio.CancelledError:
            pass

    def _on_step(self, step: worker_pb2.StepEvents) -> None:
        result = self._jobs[step.job]
        rest = list(step.token_ids)
        for number, count, state in zip(step.sequences, step.counts, step.states, strict=True):
            result.tokens.setdefault(number, []).extend(rest[:count])
            result.states[number] = state
            rest = rest[count:]
        result.steps.append(step)
        result.first.set()


def _extend(texts: dict[int, list[int]], result: JobResult) -> None:
    assert result.outcome == "OK", result.done
    assert not result.refused
    for number, tokens in result.tokens.items():
        texts[number] += tokens
