"""What the policy sees of a unit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from muxserve.scheduler.policy.interface import ModelSnapshot, Pool, Running, RunningJob, Snapshot, Waiting
from muxserve.scheduler.requests import Request
from muxserve.scheduler.seats import Seats
from muxserve.v1 import common_pb2


def take(
    seats: Seats,
    requests: Iterable[Request],
    configs: Mapping[str, common_pb2.ModelConfig],
    quotas: Mapping[str, int],
    now: float,
) -> Snapshot:
    """The unit as it is: models that are loaded and configured, requests that may be served at `now`."""
    names = sorted(name for name in seats.shapes if name in configs)
    waiting: dict[str, list[Waiting]] = defaultdict(list)
    running: dict[str, list[Running]] = defaultdict(list)
    soon = {job.number for job in seats.jobs.values() if seats.ends_soon(job)}
    for request in requests:
        if seats.decodes(request):
            running[request.model].append(_running(request, seats, soon))
        elif not request.awaiting_resume and request.not_before <= now:
            waiting[request.model].append(_waiting(request, seats, soon))
    open_sequences: Counter[str] = Counter()
    held: Counter[str] = Counter()
    closing: Counter[str] = Counter()
    for sequence in seats.sequences.values():
        open_sequences[sequence.model] += 1
        (closing if sequence.request is None else held)[sequence.model] += seats.blocks(sequence)
    models = tuple(
        ModelSnapshot(
            model=name,
            tokens_per_block=(shape := seats.shapes[name]).tokens_per_block,
            blocks_per_span=shape.blocks_per_span,
            slots_free=max(0, shape.slots - open_sequences[name]),
            quota=quotas.get(name),
            waiting=tuple(waiting[name]),
            running=tuple(running[name]),
            held=held[name],
            closing=closing[name],
            pinned_quota=configs[name].quota_blocks,
            rate=configs[name].rate,
            ttft_target=configs[name].ttft_target,
            tpot_target=configs[name].tpot_target,
        )
        for name in names
    )
    jobs = tuple(
        RunningJob(
            job.number,
            job.kind,
            job.model,
            job.ending,
            ends_soon=job.number in soon,
            last_step=job.steps_left <= 1,
            fresh=seats.fresh(job),
        )
        for job in seats.jobs.values()
    )
    return Snapshot(models, Pool(seats.total_blocks, seats.available), jobs, seats.lanes, seats.joins)


def _waiting(request: Request, seats: Seats, soon: Collection[int]) -> Waiting:
    """`soon`: jobs that end soon. Of those that were not begun, which can be many, nothing changes."""
    if (sequence := request.sequence) is not None and sequence.jobs and sequence.jobs[0] in soon:
        return replace(_view(request), computed=seats.jobs[sequence.jobs[0]].ends[sequence.number])
    if sequence is not None or request.output:
        return _view(request)
    if request.view is None:
        request.view = _view(request)
    return request.view


def _view(request: Request) -> Waiting:
    sequence = request.sequence
    queued = request.queued
    return Waiting(
        request.number,
        request.arrival,
        request.known,
        computed=sequence.computed if sequence else 0,
        groups=sequence.groups if sequence else 0,
        open=sequence is not None,
        in_job=sequence is not None and bool(sequence.jobs),
        priority=queued.priority,
        limit=request.limit,
        tenant=queued.tenant,
        deadline=request.deadline,
        emitted=bool(request.output),
    )


def _running(request: Request, seats: Seats, soon: Collection[int]) -> Running:
    """`soon`: jobs that end soon. Nothing is to follow a job that computes known tokens of a sequence: what
    comes after these is not known yet."""
    sequence = request.sequence
    assert sequence is not None, "what runs has a seat"
    length, renew = request.known, False
    job = seats.jobs[sequence.jobs[0]] if sequence.jobs else None
    if job is not None and job.number in soon and job.kind == "decode" and request.running:
        after = seats.length(request)
        if job.ending:  # it does a step more or two, and hardly all
            after = min(after, max(length + 1, request.limit - 1))
        if after < request.limit:
            length, renew = after, True
    return Running(
        request.number,
        request.arrival,
        length,
        request.limit,
        sequence.groups,
        in_job=bool(sequence.jobs),
        decoded=sequence.decoded,
        renew=renew,
        priority=request.queued.priority,
        tenant=request.queued.tenant,
        prompt=request.prompt,
    )
