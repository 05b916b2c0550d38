"""Jobs over real executors: the right tokens, and every block back."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import grpc
import pytest
import torch

from muxserve.engine.checkpoint import open_checkpoint
from muxserve.v1 import common_pb2, worker_pb2
from muxserve.worker.lanes import MAX_WAITING
from tests.engine.greedy import our_greedy
from tests.worker.harness import Harness

pytestmark = pytest.mark.asyncio(loop_scope="session")

NEW = 20
STEPS = 100
"""Of a lease of the model `wide`: it takes long beside what sending a job takes, on a machine that has other
work too."""


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randrange(3, 200) for _ in range(length)] for length in lengths]


def expected(path: Path, dtype: str, asked: list[list[int]], new: int = NEW) -> list[list[int]]:
    """Greedy text of each prompt alone, by decoder and kernels without a worker."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(path, dtype)  # type: ignore[arg-type]
    return [our_greedy(checkpoint, [prompt], new, chunk=512)[0] for prompt in asked]


async def test_a_batch_of_mixed_lengths_gives_what_each_prompt_gives_alone(
    worker: Harness, llama: Path
) -> None:
    asked = prompts(1, 7, 8, 9, 40, 100)
    async with worker.stream() as stream:
        texts = await stream.generate("llama", asked, NEW, chunk=32, steps=5)
    assert texts == expected(llama, "float32", asked)


async def test_leases_of_any_length_give_the_same_text(worker: Harness, llama: Path) -> None:
    asked = prompts(12, 30)
    async with worker.stream() as stream:
        texts = [await stream.generate("llama", asked, NEW, steps=steps) for steps in (1, 3, 64)]
    assert texts == [expected(llama, "float32", asked)] * 3


async def test_decode_jobs_of_different_models_run_side_by_side_and_those_of_one_in_turn(
    worker: Harness, loaded_wide: Path
) -> None:
    executors = (await worker.info()).executors
    assert [executor.kind for executor in executors] == ["prefill", "decode", "decode"]
    async with worker.stream() as stream:
        numbers = {
            model: [await stream.open(model, prompt, STEPS + 20) for prompt in prompts(20, 33)]
            for model in ("wide", "qwen")
        }
        for model, both in numbers.items():
            chunks = {number: (0, length) for number, length in zip(both, (20, 33), strict=True)}
            assert not (await stream.prefill(model, chunks)).refused
        one, two = [await stream.start_decode("wide", [number], STEPS) for number in numbers["wide"]]
        other = await stream.start_decode("qwen", numbers["qwen"], 1)
        first = await stream.first_step(one)
        await stream.first_step(two)
        assert first.ended.is_set()
        await stream.result(two)
        assert stream.ended[-3:] == [other, one, two], "qwen would have had to wait for a lease"


async def test_that_a_prompt_nears_its_end_is_told_once_if_somebody_wants_to_know(
    worker: Harness, loaded_wide: Path
) -> None:
    async with worker.stream() as stream:
        numbers = [await stream.open("wide", prompt, 2) for prompt in prompts(500, 501)]
        jobs = [
            await stream.start_prefill("wide", {numbers[0]: (0, 500)}, lead=0.0),
            await stream.start_prefill("wide", {numbers[1]: (0, 501)}, lead=100.0),
        ]
        results = [await stream.result(job) for job in jobs]
        assert [result.nearing for result in results] == [[], [0]], "before its token"
        assert all(len(result.tokens) == 1 for result in results)


async def test_an_exclusive_decode_job_has_no_other_beside_it(worker: Harness) -> None:
    async with worker.stream() as stream:
        number, other = [await stream.open(model, prompts(20)[0], 80) for model in ("llama", "qwen")]
        await stream.prefill("llama", {number: (0, 20)})
        await stream.prefill("qwen", {other: (0, 20)})
        before = await stream.start_decode("llama", [number], 40)
        large = await stream.start_decode("qwen", [other], 20, exclusive=True)
        behind = await stream.start_decode("llama", [number], 10)
        await stream.first_step(large)
        assert (await stream.first_step(before)).ended.is_set()
        await stream.first_step(behind)
        assert (await stream.first_step(large)).ended.is_set()
        await stream.result(behind)


async def test_two_models_of_different_head_size_and_dtype_decode_at_the_same_time(
    worker: Harness, llama: Path, qwen: Path
) -> None:
    asked = prompts(20, 33)
    async with worker.stream() as stream:
        first, second = await asyncio.gather(
            stream.generate("llama", asked, NEW, steps=2), stream.generate("qwen", asked, NEW, steps=2)
        )
    assert first == expected(llama, "float32", asked)
    assert second == expected(qwen, "bfloat16", asked)


async def test_a_recomputed_sequence_continues_the_same_text(worker: Harness) -> None:
    [prompt] = prompts(25)
    sampling = common_pb2.SamplingParams(temperature=1.0, top_p=0.9, seed=7, repetition_penalty=1.2)

    async def text(known: list[int]) -> list[int]:
        number = await stream.open(
            "llama",
            known,
            new=0,
            sampling=sampling,
            limit=len(prompt) + NEW,
            prompt_length=len(prompt),
        )
        first = await stream.prefill("llama", {number: (0, len(known))})
        rest = await stream.decode("llama", [number], NEW)
        await stream.close(number)
        return known + first.tokens[number] + rest.tokens[number]

    async with worker.stream() as stream:
        whole = await text(prompt)
        assert len(whole) == len(prompt) + NEW
        assert await text(whole[: len(prompt) + 9]) == whole


async def test_a_stop_token_finishes_a_row_and_the_others_go_on(worker: Harness) -> None:
    asked = prompts(10, 11)
    async with worker.stream() as stream:
        plain = await stream.generate("llama", asked, NEW)
        stop = plain[0][5]
        numbers = [
            await stream.open("llama", asked[0], NEW, stop=[stop]),
            await stream.open("llama", asked[1], NEW),
        ]
        await stream.prefill("llama", {n: (0, len(p)) for n, p in zip(numbers, asked, strict=True)})
        result = await stream.decode("llama", numbers, NEW)
        assert result.tokens[numbers[0]] == plain[0][1 : plain[0].index(stop) + 1]
        assert result.tokens[numbers[1]] == plain[1][1:]
        assert result.states == {
            numbers[0]: worker_pb2.SEQUENCE_STATE_STOP,
            numbers[1]: worker_pb2.SEQUENCE_STATE_LENGTH,
        }
        # What has finished takes part in nothing more.
        assert (await stream.decode("llama", numbers, 1)).refused == dict.fromkeys(numbers, "NOT_OPEN")


async def test_prompts_that_join_a_decode_job_give_what_each_gives_alone(
    worker: Harness, llama: Path
) -> None:
    assert (await worker.info()).prompts_join
    asked = prompts(9, 40, 30, 100, 1, 12, seed=21)
    new = [NEW, NEW, NEW, NEW, NEW, 1]
    async with worker.stream() as stream:
        numbers = [await stream.open("llama", prompt, n) for prompt, n in zip(asked, new, strict=True)]
        before = await stream.prefill("llama", {numbers[0]: (0, 9), numbers[1]: (0, 40)})
        assert not (await stream.prefill("llama", {numbers[2]: (0, 20)})).tokens
        # One that is computed is a row like any other, whatever it is called.
        joined = await stream.decode("llama", numbers, 3, prompts=numbers[1:])
        assert not joined.refused
        # What finishes goes first.
        assert [list(step.positions) for step in joined.steps[:2]] == [[12], [10, 41, 30, 100, 1]]
        rest = await stream.decode("llama", numbers[:5], NEW)
    texts = [
        before.tokens.get(number, []) + joined.tokens[number] + rest.tokens.get(number, [])
        for number in numbers
    ]
    alone = expected(llama, "float32", asked)
    assert texts == [text[:n] for text, n in zip(alone, new, strict=True)]


async def test_a_prompt_that_was_not_said_to_join_is_refused_alone(worker: Harness) -> None:
    asked = prompts(20, 21, 22, seed=22)
    async with worker.stream() as stream:
        numbers = [await stream.open("llama", prompt, 4) for prompt in asked]
        result = await stream.decode("llama", numbers, 2, prompts=numbers[1:])
        assert result.refused == {numbers[0]: "NOT_OPEN"}
        assert "decode before its prompt is computed" in result.done.error
        assert {n: len(tokens) for n, tokens in result.tokens.items()} == dict.fromkeys(numbers[1:], 2)


async def test_a_prompt_whose_job_has_no_step_is_computed_by_the_next_one(
    worker: Harness, loaded_wide: Path
) -> None:
    asked = prompts(5, 60, seed=23)
    async with worker.stream() as stream:
        running, late = [await stream.open("wide", prompt, STEPS + 50) for prompt in asked]
        await stream.prefill("wide", {running: (0, 5)})
        await stream.prefill("wide", {late: (0, 16)})
        job = await stream.start_decode("wide", [running], STEPS)
        await stream.first_step(job)
        waiting = await stream.start_decode("wide", [late], 8, prompts=[late])
        await stream.say(end_lease=worker_pb2.EndLease(job=waiting))
        ended = await stream.result(waiting)
        assert (ended.outcome, ended.done.steps, ended.refused) == ("OK", 0, {})
        await stream.say(end_lease=worker_pb2.EndLease(job=job))
        await stream.result(job)
        first = await stream.prefill("wide", {late: (16, 60)})
        rest = await stream.decode("wide", [late], NEW - 1)
    assert first.tokens[late] + rest.tokens[late] == expected(loaded_wide, "float32", asked[1:])[0]


async def test_positions_and_logprobs_come_with_each_token(worker: Harness) -> None:
    [prompt] = prompts(9)
    async with worker.stream() as stream:
        asks = await stream.open("llama", prompt, 4, logprobs=3)
        other = await stream.open("llama", prompt, 4)
        prefilled = await stream.prefill("llama", {asks: (0, 9), other: (0, 9)})
        decoded = await stream.decode("llama", [asks, other], 3)
        steps = [*prefilled.steps, *decoded.steps]
    assert [list(step.positions) for step in steps] == [[p, p] for p in (9, 10, 11, 12)]
    for step in steps:
        mine, none = step.logprobs
        assert none == common_pb2.Logprobs()
        assert next(top.token_id for top in mine.top) == mine.chosen.token_id == step.token_ids[0]
        assert mine.chosen.logprob < 0
        assert len(mine.top) == 3


async def test_a_chunk_that_does_not_end_the_prompt_samples_nothing(worker: Harness) -> None:
    [prompt] = prompts(30)
    async with worker.stream() as stream:
        number = await stream.open("llama", prompt, 4)
        assert (await stream.prefill("llama", {number: (0, 20)})).steps == []
        assert len((await stream.prefill("llama", {number: (20, 30)})).tokens[number]) == 1


async def test_end_lease_ends_a_decode_job_after_its_step(worker: Harness, loaded_wide: Path) -> None:
    [prompt] = prompts(5)
    async with worker.stream() as stream:
        number = await stream.open("wide", prompt, STEPS + 10)
        await stream.prefill("wide", {number: (0, 5)})
        job = await stream.start_decode("wide", [number], STEPS)
        await stream.first_step(job)
        await stream.say(end_lease=worker_pb2.EndLease(job=job))
        result = await stream.result(job)
        assert result.outcome == "OK"
        assert len(result.steps) == result.done.steps < STEPS
        # It stands where it ended, and goes on from there.
        more = await stream.decode("wide", [number], 2)
        assert list(more.steps[0].positions) == [result.steps[-1].positions[0] + 1]


async def test_jobs_wait_their_turn_in_order(worker: Harness) -> None:
    [prompt] = prompts(5)
    async with worker.stream() as stream:
        numbers = [await stream.open("llama", prompt, 30) for _ in range(2)]
        await stream.prefill("llama", dict.fromkeys(numbers, (0, 5)))
        jobs = [await stream.start_decode("llama", numbers, 4) for _ in range(3)]
        results = [await stream.result(job) for job in jobs]
        positions = [step.positions[0] for result in results for step in result.steps]
        assert positions == list(range(6, 18))


async def test_too_many_waiting_jobs_fail_at_once(worker: Harness) -> None:
    [prompt] = prompts(5)
    async with worker.stream() as stream:
        number = await stream.open("llama", prompt, 400)
        await stream.prefill("llama", {number: (0, 5)})
        async with worker.stopped("decode"):  # so that the first one does not end before the last one comes
            jobs = [await stream.start_decode("llama", [number], 20) for _ in range(MAX_WAITING + 2)]
            last = await stream.result(jobs[-1])
        assert last.outcome == "FAILED"
        assert "waiting" in last.done.error


async def test_what_does_not_fit_the_pool_is_refused_alone(worker: Harness) -> None:
    """2048 blocks; a sequence of 512 tokens takes 64 spans of 6 blocks."""
    asked = prompts(500, 500, 500, 500, 500, 500)
    async with worker.stream() as stream:
        numbers = [await stream.open("llama", prompt, 12) for prompt in asked]
        chunks = dict.fromkeys(numbers, (0, 500))
        result = await stream.prefill("llama", chunks)
        assert result.refused == {numbers[5]: "OUT_OF_BLOCKS"}
        assert set(result.tokens) == set(numbers[:5])
        assert result.done.available_blocks == 2048 - 5 * 63 * 6
        await stream.close(numbers[0])
        again = await stream.prefill("llama", {numbers[5]: (0, 500)})
        assert not again.refused
        # Five steps need a 64th span each: 158 blocks are free, enough for all.
        decoded = await stream.decode("llama", numbers[1:], 11)
        assert not decoded.refused
        pool = (await worker.info()).pool
        assert pool.models[0].held_blocks == 5 * 64 * 6
        assert pool.models[0].peak_blocks >= 5 * 64 * 6


async def test_a_job_that_may_not_borrow_is_held_to_the_quota(worker: Harness) -> None:
    """A span of 8 tokens is 6 blocks: 14 of them fit the quota, the pool has many more."""
    asked = prompts(56, 56)
    async with worker.stream() as stream:
        await stream.say(quotas=worker_pb2.SetQuotas(revision=9, blocks={"llama": 14 * 6}))
        numbers = [await stream.open("llama", prompt, 20) for prompt in asked]
        chunks = dict.fromkeys(numbers, (0, 56))
        within = await stream.result(await stream.start_prefill("llama", chunks, borrow=False))
        assert not within.refused
        kept = await stream.result(await stream.start_decode("llama", numbers, 4, borrow=False))
        assert kept.refused == dict.fromkeys(numbers, "OUT_OF_BLOCKS")
        assert not (await stream.decode("llama", numbers, 4)).refused
        assert (await worker.info()).pool.models[0].borrowed_blocks == 2 * 6
        await stream.say(quotas=worker_pb2.SetQuotas(revision=10, blocks={"llama": 2048}))


async def test_more_sequences_than_slots_wait_for_one(worker: Harness) -> None:
    asked = prompts(*[4] * 9)
    async with worker.stream() as stream:
        numbers = [await stream.open("llama", prompt, 4) for prompt in asked]
        result = await stream.prefill("llama", dict.fromkeys(numbers, (0, 4)))
        assert result.refused == {numbers[8]: "OUT_OF_SLOTS"}
        await stream.close(numbers[0])
        assert not (await stream.prefill("llama", {numbers[8]: (0, 4)})).refused


async def test_unknown_models_and_sequences_are_refused(worker: Harness) -> None:
    [prompt] = prompts(4)
    async with worker.stream() as stream:
        nowhere = await stream.open("nobody", prompt, 4)
        assert (await stream.prefill("nobody", {nowhere: (0, 4)})).refused == {nowhere: "NO_MODEL"}
        assert (await stream.decode("llama", [99], 4)).refused == {99: "NOT_OPEN"}


@pytest.mark.parametrize(
    ("tokens", "limit", "word"),
    [([5, 384], 10, "token_ids"), ([], 10, "token_ids"), ([5], 1, "limit"), ([5], 513, "limit")],
)
async def test_a_sequence_that_makes_no_sense_is_not_opened(
    worker: Harness, tokens: list[int], limit: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with worker.stream() as stream:
        number = await stream.open("llama", tokens, 0, limit=limit)
        assert (await stream.prefill("llama", {number: (0, 1)})).refused == {number: "NOT_OPEN"}
    assert word in capsys.readouterr().out


async def test_a_chunk_out_of_order_closes_its_sequence_and_no_other(worker: Harness) -> None:
    asked = prompts(20, 20)
    async with worker.stream() as stream:
        wrong, right = [await stream.open("llama", prompt, 4) for prompt in asked]
        result = await stream.prefill("llama", {wrong: (5, 20), right: (0, 20)})
        assert result.refused == {wrong: "NOT_OPEN"}
        assert "0 of 20 tokens computed" in result.done.error
        assert set(result.tokens) == {right}
        early = await stream.open("llama", asked[0], 4)
        assert (await stream.decode("llama", [early], 1)).refused == {early: "NOT_OPEN"}


async def test_closing_while_a_job_runs_frees_when_it_ends(worker: Harness, loaded_wide: Path) -> None:
    [prompt] = prompts(5)
    async with worker.stream() as stream:
        number = await stream.open("wide", prompt, STEPS + 10)
        await stream.prefill("wide", {number: (0, 5)})
        job = await stream.start_decode("wide", [number], STEPS)
        await stream.first_step(job)
        await stream.close(number)
        await stream.say(end_lease=worker_pb2.EndLease(job=job))
        done = (await stream.result(job)).done
        assert done.available_blocks == 2048
        assert done.steps < STEPS


async def test_the_end_of_a_stream_frees_everything_it_held(worker: Harness) -> None:
    asked = prompts(100, 200)
    async with worker.stream() as stream:
        numbers = [await stream.open("llama", prompt, 300) for prompt in asked]
        await stream.prefill("llama", {n: (0, len(p)) for n, p in zip(numbers, asked, strict=True)})
        await stream.first_step(await stream.start_decode("llama", numbers, 250))
        await stream.start_prefill("llama", {await stream.open("llama", asked[0], 8): (0, 100)})
        pool = (await worker.info()).pool
        assert pool.free_blocks + pool.cached_blocks < 2048
    # The next stream begins when all that is over.
    async with worker.stream() as stream:
        info = stream.infos.get_nowait() if not stream.infos.empty() else await worker.info()
        assert info.pool.free_blocks + info.pool.cached_blocks == 2048
        assert [model.open_sequences for model in info.models] == [0, 0]


async def test_the_newest_stream_of_the_highest_epoch_is_heard(worker: Harness) -> None:
    [prompt] = prompts(50)
    async with worker.stream(epoch=1005) as old:
        number = await old.open("llama", prompt, 400)
        await old.prefill("llama", {number: (0, 50)})
        await old.first_step(await old.start_decode("llama", [number], 300))
        async with worker.stream(epoch=1006) as new:
            await old.closed()
            assert old.error and old.error.code() is grpc.StatusCode.ABORTED
            async with worker.stream(epoch=1005) as late:
                await late.closed()
                assert late.error and late.error.code() is grpc.StatusCode.ABORTED
            assert await new.generate("llama", [prompt], 3) != []


async def test_a_stream_that_does_not_begin_with_hello_is_refused(worker: Harness) -> None:
    call = worker.stub.Jobs()
    await call.write(worker_pb2.JobsRequest(end_lease=worker_pb2.EndLease(job=1)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_quotas_are_kept_by_revision_and_what_is_above_is_borrowed(worker: Harness) -> None:
    [prompt] = prompts(100)
    async with worker.stream() as stream:
        await stream.say(quotas=worker_pb2.SetQuotas(revision=2, blocks={"llama": 30, "absent": 5}))
        await stream.say(quotas=worker_pb2.SetQuotas(revision=1, blocks={"llama": 1000}))
        number = await stream.open("llama", prompt, 4)
        await stream.prefill("llama", {number: (0, 100)})
        llama = (await worker.info()).pool.models[0]
        assert (llama.quota_blocks, llama.held_blocks, llama.borrowed_blocks) == (30, 78, 48)
        await stream.say(quotas=worker_pb2.SetQuotas(revision=3, blocks={"llama": 2048}))
