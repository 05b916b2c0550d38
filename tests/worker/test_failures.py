"""What dies, and what is left: executors come back, nothing else notices, nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from muxserve.engine.arena import SharedArena
from muxserve.v1 import worker_pb2
from tests.worker.harness import LIMIT, Harness, Stream, running_worker
from tests.worker.random_orders import give_random_orders

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = [7, 11, 13, 17, 19]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile(wide: Path) -> AsyncIterator[Harness]:
    """A worker of this module's own, whose executors are killed: a job of 299 steps of its model still runs
    then, however late that is."""
    async with running_worker() as harness:
        await harness.load("llama", wide)
        yield harness


def pid_of(info: worker_pb2.WorkerInfo, kind: str) -> int:
    return next(executor.pid for executor in info.executors if executor.kind == kind)


def kill(pid: int) -> None:
    assert pid, "of an executor that is there; 0 would be the tests themselves"
    os.kill(pid, signal.SIGKILL)


async def restarted(stream: Stream, kind: str, before: int) -> worker_pb2.WorkerInfo:
    """The state that the stream is told of once another executor is ready."""
    async with asyncio.timeout(LIMIT):
        while pid_of(info := await stream.infos.get(), kind) in (0, before):
            pass
    return info


async def test_a_killed_decode_executor_costs_its_own_job_and_comes_back(fragile: Harness) -> None:
    async with fragile.stream() as stream:
        [whole] = await stream.generate("llama", [PROMPT], 300)
        numbers = [await stream.open("llama", PROMPT, 300) for _ in range(2)]
        await stream.prefill("llama", dict.fromkeys(numbers, (0, 5)))
        pid = pid_of(await fragile.info(), "decode")
        job = await stream.start_decode("llama", numbers[:1], 299)
        await stream.first_step(job)
        kill(pid)
        result = await stream.result(job)
        assert result.outcome == "EXECUTOR_LOST"
        got = result.tokens[numbers[0]]
        assert got == whole[1 : 1 + len(got)]
        # Its sequence is closed; one that was in no job is as it was, and is decoded by the next executor.
        assert (await stream.decode("llama", numbers, 299)).tokens == {numbers[1]: whole[1:]}
        info = await restarted(stream, "decode", pid)
        assert [executor.restarts for executor in info.executors] == [0, 1]
    await fragile.assert_idle()


async def test_a_killed_prefill_executor_does_not_disturb_decode(fragile: Harness) -> None:
    async with fragile.stream() as stream:
        [whole] = await stream.generate("llama", [PROMPT], 200)
        number = await stream.open("llama", PROMPT, 200)
        await stream.prefill("llama", {number: (0, 5)})
        job = await stream.start_decode("llama", [number], 199)
        pid = pid_of(await fragile.info(), "prefill")
        kill(pid)
        assert (await stream.result(job)).tokens[number] == whole[1:]
        await restarted(stream, "prefill", pid)
        assert await stream.generate("llama", [PROMPT], 200) == [whole]
    await fragile.assert_idle()


async def test_a_model_loaded_while_an_executor_is_away_is_known_to_its_successor(
    fragile: Harness, qwen: Path
) -> None:
    async with fragile.stream() as stream:
        kill(pid_of(await fragile.info(), "decode"))
        await fragile.load("qwen", qwen)
        assert len((await stream.generate("qwen", [PROMPT], 8))[0]) == 8
    await fragile.unload("qwen")


async def test_a_job_that_fails_leaves_the_executor_and_its_neighbours_alone(fragile: Harness) -> None:
    """A token that is not in the vocabulary, put into the table behind the worker's back."""
    tables = fragile.worker.models.loaded[0].tables
    async with fragile.stream() as stream:
        bad, good = [await stream.open("llama", PROMPT, 20) for _ in range(2)]
        await stream.prefill("llama", dict.fromkeys((bad, good), (0, 5)))
        slot = next(
            slot for slot in range(8) if tables.blocks[0, slot, 0, 0] >= 0 and tables.owner(slot) == bad
        )
        tables.tokens[slot, 5] = 10**6
        jobs = [await stream.start_decode("llama", [number], 5) for number in (bad, good)]
        failed, went_on = [await stream.result(job) for job in jobs]
        assert (failed.outcome, went_on.outcome) == ("FAILED", "OK")
        assert "JobError: a known token" in failed.done.error
        assert (await stream.decode("llama", [bad, good], 1)).refused == {bad: "NOT_OPEN"}
    assert [executor.restarts for executor in (await fragile.info()).executors] == [1, 2]
    await fragile.assert_idle()


async def test_a_sequence_whose_logits_are_not_finite_fails_alone(fragile: Harness) -> None:
    """NaN, put into the blocks of one sequence behind everybody's back."""
    tables = fragile.worker.models.loaded[0].tables
    async with fragile.stream() as stream:
        [whole] = await stream.generate("llama", [PROMPT], 20)
        bad, good = [await stream.open("llama", PROMPT, 20) for _ in range(2)]
        await stream.prefill("llama", dict.fromkeys((bad, good), (0, 5)))
        slot = next(
            slot for slot in range(8) if tables.blocks[0, slot, 0, 0] >= 0 and tables.owner(slot) == bad
        )
        block = int(tables.blocks[0, slot, 0, 0])
        assert isinstance(fragile.worker.arena, SharedArena)
        fragile.worker.arena.data[block * 4096 : (block + 1) * 4096] = 0xFF
        result = await stream.decode("llama", [bad, good], 19)
        assert result.outcome == "OK"
        assert result.tokens == {good: whole[1:]}
        assert result.refused == {bad: "NOT_OPEN"}
        assert "not finite" in result.done.error
        await stream.close(good)
        await fragile.assert_idle()


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_a_scheduler_does_every_job_ends_and_every_block_comes_back(
    fragile: Harness, seed: int
) -> None:
    await give_random_orders(fragile, PROMPT, seed)
    async with fragile.stream() as stream:
        assert len((await stream.generate("llama", [PROMPT], 20))[0]) == 20
