"""A scheduler that does whatever it likes, and executors that are killed meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Sequence

from muxserve.v1 import worker_pb2
from tests.worker.harness import LIMIT, Harness, Stream


async def give_random_orders(harness: Harness, prompt: Sequence[int], seed: int) -> None:
    """Orders for "llama", most of them sensible, mostly without waiting; executors are killed meanwhile.
    In the end every job has ended, every block is free, and all executors are back."""
    chooser = random.Random(seed)
    dead = {0}
    async with harness.stream() as stream:
        lengths: dict[int, int] = {}
        jobs: list[int] = []
        for turn in range(100):
            tokens = list(prompt) * chooser.randint(1, 60)
            lengths[await stream.open("llama", tokens, 100)] = len(tokens)
            await _order(stream, chooser, lengths, jobs)
            if turn in (40, 80):
                dead.add(await _kill(harness, chooser, dead))
        results = [await stream.result(job) for job in jobs]
        assert {result.outcome for result in results} <= {"OK", "FAILED", "EXECUTOR_LOST"}
        assert any(result.steps for result in results)
    await harness.assert_idle()
    harness.worker.models.loaded[0].tables.check_integrity()
    async with asyncio.timeout(LIMIT):
        while dead & {executor.pid for executor in (await harness.info()).executors}:
            pass


async def _order(stream: Stream, chooser: random.Random, lengths: dict[int, int], jobs: list[int]) -> None:
    """One order; a job's number is added to `jobs`."""
    some = chooser.sample(sorted(lengths), min(len(lengths), chooser.randint(1, 5)))
    match chooser.choice(["prefill", "prefill", "decode", "decode", "end", "close", "wait"]):
        case "prefill":
            early = chooser.random() < 0.1
            chunks = {number: (0, lengths[number] - early) for number in some}
            jobs.append(await stream.start_prefill("llama", chunks, 0.5))
        case "decode":
            steps, joining = chooser.choice([1, 8, 100]), chooser.choice([[], some[:2], some])
            jobs.append(await stream.start_decode("llama", some, steps, 0.5, prompts=joining))
        case "end" if jobs:
            await stream.say(end_lease=worker_pb2.EndLease(job=chooser.choice(jobs)))
        case "close":
            await stream.close(*some)
        case "wait" if jobs:
            await stream.result(jobs[-1])


async def _kill(harness: Harness, chooser: random.Random, dead: set[int]) -> int:
    """One of the executors that live; its process id."""
    async with asyncio.timeout(LIMIT):
        while not (found := {each.pid for each in (await harness.info()).executors} - dead):
            pass
    victim = chooser.choice(sorted(found))
    os.kill(victim, signal.SIGKILL)
    return victim
