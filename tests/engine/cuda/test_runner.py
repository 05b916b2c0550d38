"""Jobs on a GPU's runner say what they say on the CPU's, and go where their shares put them.

Kernels are interpreted, memory and lanes are the fakes': everything else is what runs on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from msgspec import structs

from muxserve.engine.checkpoint import Checkpoint, open_checkpoint
from muxserve.engine.cuda import decoding, prefilling
from muxserve.engine.errors import JobError, UnallocatedBlockError
from muxserve.engine.messages import (
    LENGTH,
    STOP,
    DecodeJob,
    DecodeRow,
    PrefillChunk,
    PrefillJob,
    Sampling,
    Shares,
    Step,
)
from tests.engine.cpu import CpuEngine
from tests.engine.cuda.gpu import GREEDY, GpuEngine
from tests.engine.model_factory import Family, make_model
from tests.engine.planted import planted_checkpoint

SLOTS, CONTEXT = 5, 64
PROMPTS = ([5, 9, 200, 31, 7], [3, 4, 8], [100] * 8, [7] * 16)


@dataclass
class Both:
    """The same model on both."""

    cpu: CpuEngine
    gpu: GpuEngine

    def prompts(self, prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
        """Enter them into the slots, from 0."""
        for tables in (self.cpu.tables, self.gpu.tables):
            tables.tokens.fill(0)
            for slot, prompt in enumerate(prompts):
                tables.tokens[slot, : len(prompt)] = prompt

    def prefill(self, chunks: Sequence[PrefillChunk]) -> Step | None:
        """What both say."""
        told = self.cpu.prefill(chunks)
        assert_same(self.gpu.prefill(chunks), [] if told is None else [told])
        return told

    def decode(self, rows: Sequence[DecodeRow], steps: int) -> list[Step]:
        """What both say."""
        told = self.cpu.decode(rows, steps)
        assert_same(self.gpu.decode(rows, steps), told)
        assert (self.cpu.tables.tokens == self.gpu.tables.tokens).all()
        return told


def assert_same(found: list[Step], expected: list[Step]) -> None:
    """But for the last bits of log-probabilities."""
    assert [structs.replace(step, logprobs=()) for step in found] == [
        structs.replace(step, logprobs=()) for step in expected
    ]
    for one, other in zip(found, expected, strict=True):
        for got, want in zip(one.logprobs, other.logprobs, strict=True):
            assert (got is None) == (want is None)
            if got is not None and want is not None:
                assert got.top_ids == want.top_ids
                assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
                assert got.top_logprobs == pytest.approx(want.top_logprobs, abs=1e-4)


def both_of(checkpoint: Checkpoint, directory: Path, context: int = CONTEXT) -> Iterator[Both]:
    torch.set_num_threads(1)
    with (
        CpuEngine(checkpoint, slots=SLOTS, context=context) as cpu,
        GpuEngine(checkpoint, directory, slots=SLOTS, context=context) as gpu,
    ):
        yield Both(cpu, gpu)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    path = tmp_path_factory.mktemp("runner")
    make_model("llama", path / "model", layers=2, heads=4, kv_heads=2)
    yield from both_of(open_checkpoint(path / "model", "float32"), path / "device")


def chunks_of(
    prompts: Sequence[Sequence[int]] = PROMPTS, sampling: Sequence[Sampling] | None = None
) -> list[PrefillChunk]:
    how = sampling or [GREEDY] * len(prompts)
    return [PrefillChunk(slot, 0, len(p), CONTEXT, how[slot]) for slot, p in enumerate(prompts)]


def rows_of(
    prompts: Sequence[Sequence[int]] = PROMPTS,
    sampling: Sequence[Sampling] | None = None,
    limits: Sequence[int] | None = None,
) -> list[DecodeRow]:
    how = sampling or [GREEDY] * len(prompts)
    return [
        DecodeRow(slot, len(p) + 1, limits[slot] if limits else CONTEXT, how[slot])
        for slot, p in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    ("family", "head_dim", "window"),
    [("qwen2", 64, None), ("qwen3", 128, None), ("mistral", 80, 7), ("gemma3_text", 64, 9)],
)
def test_families_say_what_they_say_on_cores(
    tmp_path: Path, family: Family, head_dim: int, window: int | None
) -> None:
    make_model(family, tmp_path / "model", layers=2, head_dim=head_dim, window=window)
    for both in both_of(open_checkpoint(tmp_path / "model", "float32"), tmp_path / "device"):
        both.prompts()
        both.prefill(chunks_of())
        both.decode(rows_of(), 3)


def test_a_prompt_in_chunks_then_leases_one_after_another(both: Both) -> None:
    both.prompts()
    for start in range(0, 16, 8):
        both.prefill(
            [
                PrefillChunk(slot, start, end, CONTEXT, GREEDY if end == len(prompt) else None)
                for slot, prompt in enumerate(PROMPTS)
                if start < (end := min(start + 8, len(prompt)))
            ]
        )
    for lease in range(3):
        rows = [structs.replace(row, length=row.length + 3 * lease) for row in rows_of()]
        both.decode(rows, 3)


def test_sampling_stops_limits_and_penalties(both: Both) -> None:
    how = [
        Sampling(temperature=0.8, seed=1 << 63, top_p=0.9, logprobs=3),
        Sampling(temperature=1.2, seed=7, top_k=5, repetition_penalty=1.3, prompt_length=3),
        Sampling(seed=3, min_p=0.05, presence_penalty=0.5, frequency_penalty=0.3, prompt_length=8),
        Sampling(temperature=0.0, logprobs=0),
    ]
    both.prompts()
    both.prefill(chunks_of(sampling=how))
    steps = both.decode(rows_of(sampling=how), 2)
    stop = steps[1].tokens[1]
    how[1] = structs.replace(how[1], stop_token_ids=(1, 2, stop))
    steps = both.decode(rows_of(sampling=how, limits=[8, CONTEXT, 40, 17 + 1]), 3)
    ends = {slot: end for step in steps for slot, end in zip(step.slots, step.finished, strict=True) if end}
    assert ends == {0: LENGTH, 1: STOP, 3: LENGTH}


def test_a_batch_ends_when_its_last_row_does(both: Both) -> None:
    both.prompts()
    both.prefill(chunks_of())
    steps = both.decode(rows_of(limits=[8, 6, 11, 19]), 9)
    assert len(steps) == 2


def test_prompts_longer_than_a_pass(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefilling, "_TOKENS", 12)
    monkeypatch.setattr(prefilling, "_SHORT", 8)
    both.prompts()
    told = both.cpu.prefill(chunks_of())
    assert told is not None
    steps = both.gpu.prefill(chunks_of())
    assert len(steps) == 3  # a pass ends two prompts, the next one, and the third the last
    assert sum((step.slots for step in steps), ()) == told.slots
    assert sum((step.tokens for step in steps), ()) == told.tokens
    both.decode(rows_of(), 2)


def test_shapes_that_come_again_are_graphs(both: Both) -> None:
    host = both.gpu.host
    both.prompts()
    both.prefill(chunks_of())
    both.decode(rows_of(), 4)
    captures, replays = host.captures, host.replays
    both.prompts()
    both.prefill(chunks_of())
    assert (host.captures - captures, host.replays - replays) in ((0, 1), (1, 1))
    captures, replays = host.captures, host.replays
    both.decode(rows_of(), 4)
    assert (host.captures, host.replays) == (captures, replays + 4)
    # Another batch of the same shape, of other sequences: the same graph.
    both.decode(rows_of()[::-1], 4)
    assert (host.captures, host.replays) == (captures, replays + 8)


def test_a_job_goes_where_its_shares_put_it(both: Both) -> None:
    runner, host, driver = both.gpu.runner, both.gpu.host, both.gpu.driver
    both.prompts()
    told = both.cpu.prefill(chunks_of())
    assert told is not None
    multiprocessors = []
    for shares in (Shares(), Shares(1, 0), Shares(0.3, 0.7), Shares(0.7, 0.7)):
        host.lanes.clear()
        assert_same(
            list(both.gpu.follow(runner.start(PrefillJob(0, "m", tuple(chunks_of()), shares)))), [told]
        )
        (stream,) = set(host.lanes)
        context = driver.streams[stream]
        multiprocessors.append(132 if context is None else driver.contexts[context].smCount)
    assert multiprocessors == [132, 132, 40, 64]  # in eights


def test_shares_that_change_take_effect_at_the_next_step(both: Both) -> None:
    both.prompts()
    both.prefill(chunks_of())
    expected = both.cpu.decode(rows_of(), 12)
    host, driver = both.gpu.host, both.gpu.driver
    host.lanes.clear()
    driver.waits.clear()
    job = both.gpu.runner.start(DecodeJob(0, "m", tuple(rows_of()), 12, Shares(0, 1)))
    steps = []
    for step in both.gpu.follow(job):
        steps.append(step)
        job.use_shares(Shares(0.5, 0.5))
    assert_same(steps, expected)
    lanes = list(dict.fromkeys(host.lanes))
    assert len(lanes) == 2
    assert driver.waits == [(lanes[1], lanes[0])]


def test_a_lease_that_is_ended_ends_early(both: Both) -> None:
    both.prompts()
    both.prefill(chunks_of())
    expected = both.cpu.decode(rows_of(), 14)
    job = both.gpu.runner.start(DecodeJob(0, "m", tuple(rows_of()), 14))
    steps = []
    for step in both.gpu.follow(job):
        steps.append(step)
        job.stop()
    assert 1 <= len(steps) < 14
    assert len(steps) == job.steps
    assert_same(steps, expected[: len(steps)])


def test_both_kinds_at_once(both: Both) -> None:
    both.prompts()
    both.prefill(chunks_of()[:2])
    expected = both.cpu.decode(rows_of()[:2], 10)
    told = both.cpu.prefill(chunks_of()[2:])
    decode = both.gpu.runner.start(DecodeJob(0, "m", tuple(rows_of()[:2]), 10, Shares(0.5, 0.5)))
    prefill = both.gpu.runner.start(PrefillJob(0, "m", tuple(chunks_of()[2:]), Shares(0.5, 0.5)))
    steps = list(both.gpu.follow(decode))
    assert_same(list(both.gpu.follow(prefill)), [told] if told is not None else [])
    assert_same(steps, expected)


@pytest.mark.parametrize(
    "bad",
    [
        DecodeRow(5, 6, CONTEXT, GREEDY),
        DecodeRow(-1, 6, CONTEXT, GREEDY),
        DecodeRow(1, 0, CONTEXT, GREEDY),
        DecodeRow(1, CONTEXT + 1, CONTEXT, GREEDY),
        DecodeRow(1, 1 << 62, CONTEXT, GREEDY),
    ],
)
def test_a_row_outside_of_the_tables_is_refused_before_anything_is_done(both: Both, bad: DecodeRow) -> None:
    both.prompts()
    both.prefill(chunks_of())
    with pytest.raises(JobError, match="no such slot or position"):
        both.gpu.decode([*rows_of(), bad], 4)
    both.decode(rows_of(), 2)


def test_a_row_whose_prompt_is_not_computed_is_refused_before_anything_is_done(both: Both) -> None:
    both.prompts()
    both.prefill(chunks_of())
    first, *others = rows_of()
    with pytest.raises(JobError, match="computes no prompts"):
        both.gpu.decode([structs.replace(first, start=0), *others], 4)
    both.decode([structs.replace(first, start=first.length - 1), *others], 2)


def test_what_a_job_gets_wrong_is_told_by_type(both: Both) -> None:
    both.prompts()
    with pytest.raises(JobError, match="no such slot or position"):
        both.gpu.prefill([PrefillChunk(0, 4, 4, CONTEXT)])
    both.gpu.tables.tokens[1, 1] = 1 << 30
    with pytest.raises(JobError, match="a known token"):
        both.gpu.prefill(chunks_of())
    both.gpu.tables.tokens[1, 1] = 4
    kept = both.gpu.tables.blocks[1, 3, :, 1].copy()
    both.gpu.tables.blocks[1, 3, :, 1] = -1
    with pytest.raises(UnallocatedBlockError, match="layer 1"):
        both.gpu.prefill(chunks_of())
    both.gpu.tables.blocks[1, 3, :, 1] = kept
    with pytest.raises(KeyError):
        both.gpu.runner.start(DecodeJob(0, "unknown", (), 1))
    both.prefill(chunks_of())


def test_batches_beyond_what_there_is_room_for_make_room(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = both.gpu.runner
    monkeypatch.setattr(decoding, "_ROWS", (2,))
    both.prompts()
    both.prefill(chunks_of())
    runner._decoding._rows.most = 1
    both.decode(rows_of()[:1], 3)
    both.decode(rows_of(), 3)


def test_a_row_whose_logits_are_not_finite_fails_alone(tmp_path: Path) -> None:
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    logits[3, 5] = float("nan")
    checkpoint = planted_checkpoint(logits)
    (tmp_path / "device").mkdir()
    with GpuEngine(checkpoint, tmp_path / "device", slots=4, context=16, block_bytes=256) as gpu:
        gpu.arena.tensor().zero_()
        gpu.tables.tokens[:, 3] = [0, 3, 1, 2]
        rows = [DecodeRow(slot, 4, 16, GREEDY) for slot in range(4)]
        (step,) = gpu.decode(rows, 1)
        assert step.failed == (1,)
        assert step.slots == (0, 2, 3)
        assert step.tokens == tuple(logits[[0, 1, 2]].argmax(1).tolist())


def test_a_model_that_goes_takes_its_graphs_along_and_may_come_again(both: Both) -> None:
    both.prompts()
    both.prefill(chunks_of())
    both.decode(rows_of(), 4)
    runner, command = both.gpu.runner, both.gpu.command
    other = structs.replace(command, model="other")
    runner.add(other, [os.dup(both.gpu.tables.fd)])
    before = len(runner._decoding.graphs)
    job = runner.start(DecodeJob(0, "other", tuple(rows_of()), 4))
    list(both.gpu.follow(job))
    assert len(runner._decoding.graphs) == before + 1
    runner.remove("other")
    runner.remove("other")
    assert len(runner._decoding.graphs) == before
    runner.add(command, [os.dup(both.gpu.tables.fd)])
    assert len(runner._decoding.graphs) == 0
    both.decode(rows_of(), 4)
