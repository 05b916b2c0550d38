"""`Seats`: the worker as its scheduler sees it: models, blocks, open sequences, jobs that run.

Nothing is asked: a sequence holds ceil(tokens / T) block groups for the tokens that its jobs were allowed
to write, so the books follow from what was sent and what came back.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from muxserve.scheduler.policy.interface import DecodeJob, PrefillJob
from muxserve.scheduler.requests import Request, Sequence
from muxserve.v1 import common_pb2, worker_pb2

Send = Callable[[worker_pb2.JobsRequest], None]

LEAD = 4
LEAD_SECONDS = 0.02
"""Steps before a decode job's end when the job that is to follow it is decided on, so that it is at the
worker in time: as many as take so long, and so many at most. What joins the batch meanwhile has to wait for
that job's end, too."""
PREFILL_LEAD = 0.012
"""Seconds before a prefill job's end when the next one is decided on, for the same reason."""


@dataclass(slots=True, eq=False)
class Job:
    """A job that was sent and has not ended."""

    number: int
    kind: Literal["prefill", "decode"]
    model: str
    members: dict[int, Sequence] = field(default_factory=dict)
    """By sequence number. One that is closed stays until the job that runs ends; one that finished while
    decoding has left."""
    ends: dict[int, int] = field(default_factory=dict)
    """Prefill: where each sequence's chunk ends. Decode: tokens known of each sequence after all steps,
    unless it finishes before."""
    tokens: int = 0
    """Prefill: tokens to compute. Decode: tokens sampled so far."""
    steps: int = 1
    """Decode: most steps."""
    steps_left: int = 1
    """Decode: steps that were not heard of yet. Tokens of those that were may still be on their way."""
    ending: bool = False
    """Whether its lease was ended."""
    ordered: float = 0.0
    """Loop time at which it was sent."""
    lead: int = 1
    """Decode: steps before its end when the next one is decided on."""
    nearing: bool = False
    """Prefill: whether it will soon have ended."""
    context: int = 0
    """Tokens before those that it computes, over all of its sequences, when it was sent."""
    tenants: Counter[str] = field(default_factory=Counter)
    """`tokens` by tenant."""
    prompts: Counter[str] = field(default_factory=Counter)
    """Decode: tokens of prompts that it computes in its first step, by tenant."""


class Seats:
    """Empty and not connected until `connect`."""

    def __init__(self) -> None:
        self.shapes: dict[str, common_pb2.ModelShape] = {}
        """Models that are loaded."""
        self.lanes = 1
        """Decode jobs that run side by side."""
        self.joins = False
        """Whether decode jobs may have prompts."""
        self.total_blocks = 0
        self.sequences: dict[int, Sequence] = {}
        """All that hold a slot."""
        self.jobs: dict[int, Job] = {}
        self._send: Send | None = None
        self._last = 0
        self._step_seconds: dict[str, float] = {}
        """By model, of its last decode job."""

    @property
    def connected(self) -> bool:
        """Whether the Jobs stream is open."""
        return self._send is not None

    def connect(self, info: worker_pb2.WorkerInfo, send: Send) -> None:
        """The stream is open; the worker holds nothing of ours."""
        self._send = send
        self.update(info)

    def update(self, info: worker_pb2.WorkerInfo) -> None:
        """Models or executors have changed."""
        self.shapes = {loaded.model: loaded.shape for loaded in info.models}
        self.lanes = max(1, sum(executor.kind != "prefill" for executor in info.executors))
        self.joins = info.prompts_join
        self.total_blocks = info.pool.total_blocks

    def disconnect(self) -> None:
        """The stream has ended: every sequence is gone."""
        self._send = None
        for sequence in self.sequences.values():
            if sequence.request is not None:
                sequence.request.sequence = None
        self.sequences.clear()
        self.jobs.clear()

    def send(self, message: worker_pb2.JobsRequest) -> None:
        """Send, if connected."""
        if self._send is not None:
            self._send(message)

    # Books

    def groups(self, model: str, tokens: int) -> int:
        """Block groups that `tokens` tokens of `model` take."""
        return -(-tokens // self.shapes[model].tokens_per_block)

    def blocks(self, sequence: Sequence) -> int:
        """Blocks that it holds."""
        shape = self.shapes.get(sequence.model)
        return sequence.groups * shape.blocks_per_span if shape is not None else 0

    @property
    def available(self) -> int:
        """Blocks that no sequence holds."""
        return self.total_blocks - sum(map(self.blocks, self.sequences.values()))

    # Orders

    def prefill(self, order: PrefillJob, requests: Iterable[Request]) -> None:
        """Send a prefill job, and open its sequences where they are not. `requests` match the order's
        chunks."""
        job = self._new_job("prefill", order.model)
        chunks = []
        for chunk, request in zip(order.chunks, requests, strict=True):
            sequence = request.sequence or self._open(request)
            self._join(job, sequence, chunk.end)
            job.ends[sequence.number] = chunk.end
            job.tokens += chunk.end - chunk.start
            job.tenants[request.queued.tenant] += chunk.end - chunk.start
            job.context += chunk.start
            chunks.append(
                worker_pb2.PrefillJob.Chunk(sequence=sequence.number, start=chunk.start, end=chunk.end)
            )
        message = worker_pb2.PrefillJob(
            job=job.number,
            model=job.model,
            chunks=chunks,
            share=order.share,
            borrow=order.borrow,
            lead_seconds=PREFILL_LEAD,
        )
        self.send(worker_pb2.JobsRequest(prefill=message))

    def decode(self, order: DecodeJob, requests: Iterable[Request]) -> Job:
        """Send a decode job, and open the sequences of its prompts where they are not. `requests` match the
        order's sequences, and after them its prompts."""
        job = self._new_job("decode", order.model)
        job.steps = job.steps_left = order.steps
        job.lead = min(
            LEAD, math.ceil(LEAD_SECONDS / self._step_seconds.get(order.model, LEAD_SECONDS / LEAD))
        )
        prompts = {chunk.sequence: chunk for chunk in order.prompts}
        joining = []
        for request in requests:
            sequence, length = request.sequence, self.length(request)
            if (chunk := prompts.get(request.number)) is not None:
                sequence = sequence or self._open(request)
                joining.append(sequence.number)
                job.prompts[request.queued.tenant] += chunk.end - chunk.start
                job.context += chunk.start
            else:
                job.context += length
            assert sequence is not None, "the policy decodes what runs"
            job.ends[sequence.number] = length + order.steps
            # The last token's KV is never written.
            self._join(job, sequence, min(job.ends[sequence.number] - 1, request.limit - 1))
            sequence.decoded = True
        message = worker_pb2.DecodeJob(
            job=job.number,
            model=job.model,
            sequences=job.members,
            steps=order.steps,
            share=order.share,
            lead=job.lead,
            borrow=order.borrow,
            exclusive=order.exclusive,
            prompts=joining,
        )
        self.send(worker_pb2.JobsRequest(decode=message))
        return job

    def end_lease(self, number: int) -> None:
        """End a decode job after the step that runs. A prefill job runs to its end."""
        job = self.jobs[number]
        if job.kind == "decode" and not job.ending:
            job.ending = True
            self.send(worker_pb2.JobsRequest(end_lease=worker_pb2.EndLease(job=number)))

    def close(self, sequences: Iterable[Sequence]) -> None:
        """Give their slots and blocks back; of those in a job when it ends, for which a lease is ended."""
        numbers = []
        for sequence in sequences:
            if sequence.request is not None:
                sequence.request.sequence = None
                sequence.request = None
            if sequence.number not in self.sequences:
                continue
            numbers.append(sequence.number)
            if not sequence.jobs:
                del self.sequences[sequence.number]
            for job in sequence.jobs:
                self.end_lease(job)
        if numbers:
            self.send(worker_pb2.JobsRequest(close=worker_pb2.CloseSequences(sequences=numbers)))

    # What came back

    def progress(self, number: int, steps: int) -> Job | None:
        """So many steps of that job have ended; the job, None: unknown."""
        job = self.jobs.get(number)
        if job is not None and job.kind == "decode":
            job.steps_left = max(0, job.steps - steps)
        return job

    def near(self, number: int) -> None:
        """That prefill job will soon have ended; ignored if it has."""
        if (job := self.jobs.get(number)) is not None:
            job.nearing = True

    def ends_soon(self, job: Job) -> bool:
        """Whether it will soon have ended, and no other job waits to follow it."""
        if job.kind == "prefill":
            return job.nearing and all(each is job or each.kind != "prefill" for each in self.jobs.values())
        return (job.ending or job.steps_left <= job.lead) and self.followed(job) is None

    def decodes(self, request: Request) -> bool:
        """Whether it decodes, or will with the first step of the decode job that it is in."""
        sequence = request.sequence
        if sequence is None or request.running:
            return sequence is not None
        return bool(sequence.jobs) and self.jobs[sequence.jobs[0]].kind == "decode"

    def fresh(self, job: Job) -> bool:
        """Whether it is a decode job that no step was heard of."""
        return job.kind == "decode" and job.steps_left == job.steps

    def followed(self, job: Job) -> Job | None:
        """Another job of its kind and model."""
        others = (each for each in self.jobs.values() if each is not job)
        return next((each for each in others if (each.kind, each.model) == (job.kind, job.model)), None)

    def length(self, request: Request) -> int:
        """Tokens known of a request when the job that it is in, if there is one, has run to its end; fewer if
        its lease is ended."""
        sequence = request.sequence
        if sequence is None or not sequence.jobs:
            return request.known
        return max(self.jobs[number].ends.get(sequence.number, 0) for number in sequence.jobs)

    def leave(self, sequence: Sequence) -> None:
        """It finished while decoding: the worker has taken it out of the job's batch, and will out of that of
        the job that is to follow."""
        if sequence.jobs and self.jobs[sequence.jobs[0]].kind == "decode":
            self._withdraw(sequence)

    def end(self, number: int, steps: int, seconds: float) -> Job | None:
        """A job has ended, after so many steps and seconds: its members are out of it, and those that were
        closed are gone. None: unknown job."""
        job = self.jobs.pop(number, None)
        if job is None:
            return None
        if job.kind == "decode" and steps and seconds > 0:
            self._step_seconds[job.model] = seconds / steps
        short = job.steps - steps if job.kind == "decode" else 0
        for sequence in job.members.values():
            sequence.jobs.remove(number)
            if sequence.request is None and not sequence.jobs:
                del self.sequences[sequence.number]
            elif short and sequence.jobs:
                self._begins_earlier(sequence, job, short)
        return job

    def _begins_earlier(self, sequence: Sequence, ended: Job, short: int) -> None:
        """The job that follows the one that ended goes on from so many tokens less of the sequence than was
        thought, and so holds less."""
        following = self.jobs[sequence.jobs[0]]
        following.ends[sequence.number] -= short
        following.context -= short
        if (request := sequence.request) is not None:
            tokens = max(ended.ends[sequence.number], following.ends[sequence.number]) - 1
            sequence.groups = self.groups(ended.model, min(tokens, request.limit - 1))

    def lose(self, sequences: Iterable[Sequence]) -> list[Request]:
        """The worker has closed these itself; returns the requests that lost their seats."""
        lost = []
        for sequence in sequences:
            self._withdraw(sequence)
            self.sequences.pop(sequence.number, None)
            if sequence.request is not None:
                sequence.request.sequence = None
                lost.append(sequence.request)
                sequence.request = None
        return lost

    def _withdraw(self, sequence: Sequence) -> None:
        """It takes part in no job any more."""
        for number in sequence.jobs:
            del self.jobs[number].members[sequence.number]
        sequence.jobs.clear()

    def _new_job(self, kind: Literal["prefill", "decode"], model: str) -> Job:
        self._last += 1
        job = self.jobs[self._last] = Job(self._last, kind, model)
        job.ordered = asyncio.get_running_loop().time()
        return job

    def _join(self, job: Job, sequence: Sequence, tokens: int) -> None:
        sequence.groups = max(sequence.groups, self.groups(job.model, tokens))
        sequence.jobs.append(job.number)
        job.members[sequence.number] = sequence

    def _open(self, request: Request) -> Sequence:
        self._last += 1
        sequence = Sequence(self._last, request.model, request)
        self.sequences[sequence.number] = request.sequence = sequence
        queued = request.queued
        message = worker_pb2.OpenSequence(
            sequence=sequence.number,
            model=request.model,
            token_ids=[*queued.prompt_tokens, *request.output],
            prompt_length=len(queued.prompt_tokens),
            sampling=queued.sampling,
            stop_token_ids=queued.stop_token_ids,
            limit=request.limit,
            logprobs=queued.logprobs if queued.HasField("logprobs") else None,
        )
        self.send(worker_pb2.JobsRequest(open=message))
        return sequence
