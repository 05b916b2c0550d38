"""The prefix cache over real executors: less is computed, and nothing else changes, to the last bit."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import pytest_asyncio

from muxserve.engine.arena import SharedArena
from muxserve.engine.spec import ITEMSIZE
from muxserve.v1 import worker_pb2
from tests.worker.harness import Harness, JobResult, Stream, running_worker

pytestmark = pytest.mark.asyncio(loop_scope="session")

SPAN = {"llama": 8, "qwen": 12}
"""Tokens of a block of 4 KiB."""
NEW = 12


def random_tokens(length: int, seed: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(3, 200) for _ in range(length)]


def counts(info: worker_pb2.WorkerInfo, model: str) -> worker_pb2.ModelBlocks:
    return next(each for each in info.pool.models if each.model == model)


def kv_bits(harness: Harness, number: int) -> bytes:
    """All KV that an open sequence has, in order: what is computed of it, in each layer and head."""
    session = harness.worker.sessions.current
    assert session is not None
    sequence = session.book.get(number)
    assert sequence is not None
    layout = sequence.model.shape.layout
    arena = cast(SharedArena, harness.worker.arena)
    ids = sequence.model.tables.groups(sequence.slot, sequence.spans)
    blocks = arena.data.reshape(arena.blocks, arena.block_bytes)[ids]  # [spans, blocks_per_span, bytes]
    row = layout.head_dim * ITEMSIZE[layout.dtype]
    words = blocks[:, :, : 2 * layout.tokens_per_block * row]
    rows = words.reshape(sequence.spans, layout.blocks_per_span, 2, layout.tokens_per_block, row)
    tokens = np.moveaxis(rows, 3, 1).reshape(sequence.spans * layout.tokens_per_block, -1)
    return tokens[: sequence.computed].tobytes()


async def prefilled(stream: Stream, model: str, prompts: list[list[int]]) -> tuple[list[int], JobResult]:
    """Sequences of which one job has computed the whole prompts."""
    numbers = [await stream.open(model, prompt, NEW) for prompt in prompts]
    chunks = {number: (0, len(prompt)) for number, prompt in zip(numbers, prompts, strict=True)}
    return numbers, await stream.prefill(model, chunks)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cold(llama: Path, qwen: Path) -> AsyncIterator[Harness]:
    """A worker without a prefix cache."""
    async with running_worker(prefix_cache=False) as harness:
        await harness.load("llama", llama)
        await harness.load("qwen", qwen, dtype="bfloat16")
        yield harness


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def caching(llama: Path, qwen: Path) -> AsyncIterator[Harness]:
    """One with."""
    async with running_worker() as harness:
        await harness.load("llama", llama)
        await harness.load("qwen", qwen, dtype="bfloat16")
        yield harness


@pytest_asyncio.fixture(loop_scope="session")
async def warm(caching: Harness) -> AsyncIterator[Harness]:
    """That one, knowing nothing yet."""
    pool = caching.worker.pool
    pool.free("llama", pool.allocate("llama", pool.available_blocks // 6, borrow=True))
    assert pool.free_blocks == pool.blocks
    yield caching
    await caching.assert_idle()


@pytest.mark.parametrize("model", ["llama", "qwen"])
@pytest.mark.parametrize("beyond", [1, 2, 7, 30])
async def test_kv_and_text_are_the_same_bit_for_bit_with_and_without(
    warm: Harness, cold: Harness, model: str, beyond: int
) -> None:
    shared = random_tokens(8 * SPAN[model], seed=beyond)
    asked = [shared + random_tokens(beyond, seed=100 + i) for i in range(3)]
    texts, kv = [], []
    for harness in (cold, warm):
        async with harness.stream() as stream:
            await stream.generate(model, [[*shared, 3]], NEW)  # the cache knows it now
            numbers, first = await prefilled(stream, model, asked)
            kv.append([kv_bits(harness, number) for number in numbers])
            rest = await stream.decode(model, numbers, NEW)
            texts.append([first.tokens[number] + rest.tokens[number] for number in numbers])
            cached = first.done.cached_tokens
    assert texts[0] == texts[1]
    assert kv[0] == kv[1]
    # A prompt that would leave one token alone computes its last span again.
    each = len(shared) if beyond > 1 else len(shared) - SPAN[model]
    assert cached == 3 * each


@pytest.mark.parametrize("model", ["llama", "qwen"])
async def test_prompts_that_join_a_decode_job_find_what_is_known_and_are_found(
    warm: Harness, cold: Harness, model: str
) -> None:
    """Two join whose beginning is known, later a third to which they are the same."""
    shared = random_tokens(3 * SPAN[model], seed=31)
    asked = [shared + random_tokens(n * SPAN[model] + 3, seed=32 + n) for n in (0, 2)]
    asked.append(asked[1] + random_tokens(2, seed=35))
    texts, kv, cached = [], [], []
    for harness in (cold, warm):
        async with harness.stream() as stream:
            before = counts(await harness.info(), model)
            await stream.generate(model, [[*shared, 3]], NEW)
            one, two, three = [await stream.open(model, prompt, NEW) for prompt in asked]
            first = await stream.decode(model, [one, two], 4, prompts=[one, two])
            kv.append([kv_bits(harness, number) for number in (one, two)])
            later = await stream.decode(model, [one, two, three], NEW, prompts=[three])
            texts.append([first.tokens.get(n, []) + later.tokens[n] for n in (one, two, three)])
            cached.append([first.done.cached_tokens, later.done.cached_tokens])
            after = counts(await harness.info(), model)
            assert after.prefix_query_tokens - before.prefix_query_tokens == sum(
                len(each) for each in [[*shared, 3], *asked]
            )
            assert after.prefix_hit_tokens - before.prefix_hit_tokens == sum(cached[-1])
    assert texts[0] == texts[1]
    assert kv[0] == kv[1]
    assert cached == [[0, 0], [6 * SPAN[model], 5 * SPAN[model]]]


async def test_chunks_of_any_size_find_what_is_known(warm: Harness, cold: Harness) -> None:
    shared = random_tokens(200, seed=3)
    asked = [shared + random_tokens(n, seed=n) for n in (9, 50)]
    async with cold.stream() as stream:
        expected = await stream.generate("llama", asked, NEW)
    async with warm.stream() as stream:
        for chunk in (1000, 64, 50, 7, 1):
            assert await stream.generate("llama", asked, NEW, chunk=chunk) == expected


async def test_requests_that_come_together_compute_their_common_prefix_once(llama: Path) -> None:
    """One job of 32 prompts with 400 tokens in common."""
    shared = random_tokens(400, seed=4)
    asked = [shared + random_tokens(16, seed=1000 + i) for i in range(32)]
    async with running_worker(slots=40) as harness:
        await harness.load("llama", llama)
        async with harness.stream() as stream:
            numbers, job = await prefilled(stream, "llama", asked)
            total = sum(map(len, asked))
            assert job.done.cached_tokens == 31 * 400
            assert total - job.done.cached_tokens <= 0.15 * total
            assert set(job.tokens) == set(numbers)
            pool = (await harness.info()).pool
            # A group that several sequences hold is counted once: 50 that all have, and two of each's own.
            assert counts(await harness.info(), "llama").held_blocks == (50 + 32 * 2) * 6
            assert pool.integrity_error == ""
            rest = await stream.decode("llama", numbers, NEW)
            texts = [job.tokens[number] + rest.tokens[number] for number in numbers]
        async with harness.stream() as stream:
            for prompt, text in list(zip(asked, texts, strict=True))[::8]:
                assert await stream.generate("llama", [prompt], NEW) == [text]
        await harness.assert_idle()


async def test_different_prefixes_in_one_job_each_go_ahead_once(warm: Harness) -> None:
    first, second = random_tokens(96, seed=5), random_tokens(96, seed=6)
    asked = [prefix + random_tokens(4, seed=i) for i, prefix in enumerate([first, second, first, second])]
    async with warm.stream() as stream:
        _, job = await prefilled(stream, "llama", asked)
        assert job.done.cached_tokens == 2 * 96
        assert job.done.steps == 2
        assert len(job.tokens) == 4


async def test_prompts_that_are_one_anothers_beginning_build_on_each_other(warm: Harness) -> None:
    whole = random_tokens(400, seed=7)
    asked = [whole[:100], whole[:200], whole[:400]]
    async with warm.stream() as stream:
        numbers, job = await prefilled(stream, "llama", asked)
        assert job.done.cached_tokens == 96 + 200
        assert set(job.tokens) == set(numbers)


async def test_little_in_common_is_not_waited_for(warm: Harness) -> None:
    shared = random_tokens(32, seed=8)
    async with warm.stream() as stream:
        _, job = await prefilled(stream, "llama", [shared + random_tokens(9, seed=i) for i in range(3)])
        assert (job.done.cached_tokens, job.done.steps) == (0, 1)


async def test_a_chunk_that_is_known_altogether_ends_at_once(warm: Harness) -> None:
    prompt = random_tokens(100, seed=9)
    async with warm.stream() as stream:
        [text] = await stream.generate("llama", [prompt], NEW)
        number = await stream.open("llama", prompt, NEW)
        first = await stream.prefill("llama", {number: (0, 60)})
        assert (first.outcome, first.done.steps, first.done.cached_tokens) == ("OK", 0, 60)
        assert first.done.seconds == 0
        last = await stream.prefill("llama", {number: (60, 100)})
        assert last.done.cached_tokens == 96 - 60
        rest = await stream.decode("llama", [number], NEW)
        assert last.tokens[number] + rest.tokens[number] == text


async def test_hits_are_counted_in_tokens(warm: Harness) -> None:
    prompt = random_tokens(100, seed=10)
    async with warm.stream() as stream:
        before = await warm.info()
        for _ in range(3):
            await stream.generate("llama", [prompt], NEW)
        info = await warm.info()
    assert counts(info, "qwen") == counts(before, "qwen")
    llama, was = counts(info, "llama"), counts(before, "llama")
    assert llama.prefix_query_tokens - was.prefix_query_tokens == 300
    assert llama.prefix_hit_tokens - was.prefix_hit_tokens == 192
    assert llama.cached_blocks == info.pool.cached_blocks == 12 * 6


async def test_what_is_cached_makes_room_for_any_model(warm: Harness) -> None:
    """2048 blocks: the first model's prefixes take most of them, the second then needs nearly all."""
    async with warm.stream() as stream:
        for seed in range(5):
            await stream.generate("llama", [random_tokens(500, seed)], 2)
        assert counts(await warm.info(), "llama").cached_blocks == 5 * 62 * 6
        asked = [random_tokens(480, seed) for seed in range(20, 28)]
        _, job = await prefilled(stream, "qwen", asked)
        assert not job.refused
        info = await warm.info()
        assert counts(info, "qwen").held_blocks + info.pool.cached_blocks + info.pool.free_blocks == 2048
        assert counts(info, "llama").cached_blocks < 5 * 62 * 6


async def test_what_was_not_used_for_longest_goes_first(warm: Harness) -> None:
    async with warm.stream() as stream:
        old, kept = random_tokens(500, 1), random_tokens(500, 2)
        for prompt in (kept, old, kept):
            await stream.generate("llama", [prompt], 2)
        await prefilled(stream, "llama", [random_tokens(500, seed) for seed in range(20, 24)])
        assert (await prefilled(stream, "llama", [kept]))[1].done.cached_tokens == 496
    async with warm.stream() as stream:
        assert (await prefilled(stream, "llama", [old]))[1].done.cached_tokens < 496


async def test_what_was_found_counts_towards_the_quota(warm: Harness) -> None:
    prompt = random_tokens(100, seed=11)
    async with warm.stream() as stream:
        await stream.generate("llama", [prompt], NEW)
        await stream.say(quotas=worker_pb2.SetQuotas(revision=1, blocks={"llama": 10 * 6}))
        number = await stream.open("llama", prompt, NEW)
        refused = await stream.result(await stream.start_prefill("llama", {number: (0, 100)}, borrow=False))
        assert refused.refused == {number: "OUT_OF_BLOCKS"}
        await stream.close(number)
        number = await stream.open("llama", prompt, NEW)
        first = await stream.result(await stream.start_prefill("llama", {number: (0, 80)}, borrow=False))
        assert first.done.cached_tokens == 80
        assert counts(await warm.info(), "llama").borrowed_blocks == 0
        await stream.say(quotas=worker_pb2.SetQuotas(revision=2, blocks={"llama": 2048}))
        await stream.close(number)


async def test_a_model_that_goes_takes_its_prefixes_along(warm: Harness, llama: Path) -> None:
    prompt = random_tokens(100, seed=12)
    async with warm.stream() as stream:
        [text] = await stream.generate("llama", [prompt], NEW)
        await warm.unload("llama")
        pool = (await warm.info()).pool
        assert (pool.cached_blocks, pool.free_blocks) == (0, pool.total_blocks)
        await warm.load("llama", llama)
        number, again = await prefilled(stream, "llama", [prompt])
        assert again.done.cached_tokens == 0
        rest = await stream.decode("llama", number, NEW)
        assert again.tokens[number[0]] + rest.tokens[number[0]] == text


async def test_a_job_that_was_lost_publishes_nothing(warm: Harness, cold: Harness) -> None:
    shared = random_tokens(440, seed=13)
    asked = [shared + random_tokens(20, seed=i) for i in range(4)]
    async with cold.stream() as stream:
        expected = await stream.generate("llama", asked, NEW)
    async with warm.stream() as stream:
        numbers = [await stream.open("llama", prompt, NEW) for prompt in asked]
        pid = next(each.pid for each in (await warm.info()).executors if each.kind == "prefill")
        os.kill(pid, signal.SIGSTOP)
        job = await stream.start_prefill("llama", dict.fromkeys(numbers, (0, 460)))
        async with asyncio.timeout(10):
            while not counts(await warm.info(), "llama").held_blocks:
                pass
        os.kill(pid, signal.SIGKILL)
        lost = await stream.result(job)
        assert lost.outcome == "EXECUTOR_LOST"
        assert (await warm.info()).pool.cached_blocks == 0
        # All of the order's sequences are closed, those whose turn had not come too.
        assert (await stream.prefill("llama", dict.fromkeys(numbers, (0, 460)))).refused == dict.fromkeys(
            numbers, "NOT_OPEN"
        )
        assert await stream.generate("llama", asked, NEW) == expected


async def test_outputs_are_kept_where_that_is_wanted(llama: Path) -> None:
    prompt = random_tokens(90, seed=14)
    for wanted in (False, True):
        async with running_worker(prefix_outputs=wanted) as harness:
            await harness.load("llama", llama)
            async with harness.stream() as stream:
                [text] = await stream.generate("llama", [prompt], 40)
                _, job = await prefilled(stream, "llama", [[*prompt, *text, 5, 6, 7]])
                assert job.done.cached_tokens == ((90 + 39) // 8 * 8 if wanted else 88)


async def test_the_cache_can_be_switched_off(cold: Harness) -> None:
    prompt = random_tokens(100, seed=15)
    async with cold.stream() as stream:
        for _ in range(2):
            _, job = await prefilled(stream, "llama", [prompt, prompt])
            assert (job.done.cached_tokens, job.done.steps) == (0, 1)
    info = await cold.info()
    assert (info.pool.cached_blocks, counts(info, "llama").prefix_hit_tokens) == (0, 0)
    await cold.assert_idle()
