"""A sequence's tokens and their probabilities are its own: to the bit the same alone and in any batch, by any
number of threads, in leases of any length, whoever else leaves, joins or is stopped."""

from __future__ import annotations

import random
import select
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from msgspec import structs

from muxserve.engine.checkpoint import open_checkpoint
from muxserve.engine.cpu.jobs import NativeJob
from muxserve.engine.cpu.library import VARIANTS, cpu_flags
from muxserve.engine.messages import (
    LENGTH,
    STOP,
    UNFINISHED,
    DecodeJob,
    DecodeRow,
    PrefillChunk,
    PrefillJob,
    Sampling,
    Step,
    TokenLogprobs,
)
from muxserve.engine.spec import DType
from tests.engine.cpu import ALONE, HALF, CpuEngine
from tests.engine.model_factory import Family, make_model

HERE = [name for name, needed in VARIANTS.items() if needed <= cpu_flags()]
NEW, CHUNK = 12, 48
LENGTHS = (1, 2, 30, 47, 48, 100, 1018, 1100)
"""Of the prompts. Beyond 1,024 tokens a context is split; two prompts cross that, one while it decodes."""
CONTEXT = max(LENGTHS) + NEW

SHARES = {1: HALF, 2: ALONE}
"""That give a job so many threads."""


@dataclass(frozen=True)
class Asked:
    """What is asked for, in which slot."""

    slot: int
    prompt: list[int]
    sampling: Sampling
    limit: int


Told = tuple[int, int, TokenLogprobs | None]
"""A token, whether that finished its sequence, and its probabilities."""
Texts = dict[int, list[Told]]
"""By slot."""


def asked(vocabulary: int) -> list[Asked]:
    """Each with parameters of another kind."""
    chooser = random.Random(3)
    ways = (
        Sampling(temperature=0.0, logprobs=2),
        Sampling(temperature=0.8, seed=5, logprobs=0),
        Sampling(temperature=1.0, top_p=0.9, seed=6, frequency_penalty=0.5, logprobs=5),
        Sampling(temperature=1.2, top_k=20, min_p=0.01, seed=7, repetition_penalty=1.2, logprobs=1),
    )
    found = []
    for slot, length in enumerate(LENGTHS):
        prompt = chooser.choices(range(3, vocabulary), k=length)
        how = structs.replace(ways[slot % len(ways)], prompt_length=length)
        found.append(Asked(slot, prompt, how, length + NEW))
    return found


class Bench:
    """Runs sequences on an engine in one way or another; each begins anew, in its own slot."""

    def __init__(self, engine: CpuEngine) -> None:
        self.engine = engine

    def prefill(self, wanted: Sequence[Asked], threads: int = 1) -> Texts:
        """In chunks, all together; the first token of each."""
        texts: Texts = {}
        self.know(wanted)
        for start in range(0, max(len(s.prompt) for s in wanted), CHUNK):
            chunks = []
            for s in wanted:
                end = min(len(s.prompt), start + CHUNK)
                if start < end:
                    how = s.sampling if end == len(s.prompt) else None
                    chunks.append(PrefillChunk(s.slot, start, end, s.limit, how))
            self.take(texts, self.engine.runner.run(PrefillJob(0, "m", tuple(chunks), SHARES[threads])))
        return texts

    def join(self, wanted: Sequence[Asked], others: Sequence[Asked], threads: int) -> Texts:
        """Three steps of a job that computes the last chunk of each prompt, beside others that decode."""
        texts = self.prefill(others, threads) if others else {}
        rows = list(self.rows(others, texts))
        self.know(wanted)
        for s in wanted:
            start = (len(s.prompt) - 1) // CHUNK * CHUNK
            for at in range(0, start, CHUNK):
                chunk = PrefillChunk(s.slot, at, at + CHUNK, s.limit)
                assert not list(self.engine.runner.run(PrefillJob(0, "m", (chunk,))))
            rows.insert(len(rows) // 2, DecodeRow(s.slot, len(s.prompt), s.limit, s.sampling, start))
        self.take(texts, self.engine.runner.run(DecodeJob(1, "m", tuple(rows), 3, SHARES[threads])))
        return texts

    def know(self, wanted: Sequence[Asked]) -> None:
        """Have the prompts in the table."""
        for s in wanted:
            self.engine.tables.tokens[s.slot] = 0
            self.engine.tables.tokens[s.slot, : len(s.prompt)] = s.prompt

    def decode(self, wanted: Sequence[Asked], texts: Texts, lease: int = NEW, threads: int = 1) -> Texts:
        """To their ends, in jobs of `lease` steps."""
        while rows := self.rows(wanted, texts):
            self.take(texts, self.engine.runner.run(DecodeJob(1, "m", rows, lease, SHARES[threads])))
        return texts

    @staticmethod
    def rows(wanted: Sequence[Asked], texts: Texts) -> tuple[DecodeRow, ...]:
        """Of those that have not ended."""
        return tuple(
            DecodeRow(s.slot, len(s.prompt) + len(texts[s.slot]), s.limit, s.sampling)
            for s in wanted
            if texts[s.slot][-1][1] == UNFINISHED
        )

    @staticmethod
    def take(texts: Texts, steps: Iterator[Step] | Sequence[Step]) -> None:
        """Append what the steps tell."""
        for step in steps:
            assert not step.failed
            for i, slot in enumerate(step.slots):
                told = (step.tokens[i], step.finished[i], step.logprobs[i] if step.logprobs else None)
                texts.setdefault(slot, []).append(told)


@dataclass
class Expected:
    """What each sequence says alone, on one thread, in one job."""

    bench: Bench
    wanted: list[Asked]
    texts: Texts


KINDS: list[tuple[Family, DType, str]] = [
    ("llama", "float32", ""),
    ("llama", "bfloat16", ""),
    ("llama", "bfloat16", "avx2"),
    ("llama", "float32", "generic"),
    ("gemma3_text", "bfloat16", ""),
    ("qwen3", "float32", ""),
]
"""Family, dtype, build of the library; "" is the best one for this machine."""


@pytest.fixture(
    scope="module", params=[kind for kind in KINDS if kind[2] in ["", *HERE]], ids=lambda kind: "-".join(kind)
)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Expected]:
    family, dtype, variant = request.param
    torch.set_num_threads(1)
    window = 64 if family == "gemma3_text" else None
    path = make_model(family, tmp_path_factory.mktemp(family), layers=2, heads=6, window=window)
    checkpoint = open_checkpoint(path, dtype)
    wanted = asked(checkpoint.spec.vocab_size)
    with CpuEngine(
        checkpoint, slots=len(wanted), context=CONTEXT, block_bytes=8192, threads=2, variant=variant
    ) as engine:
        bench = Bench(engine)
        texts: Texts = {}
        for s in wanted:
            texts |= bench.decode([s], bench.prefill([s]))
        assert all(len(text) == NEW for text in texts.values())
        assert len({token for text in texts.values() for token, _, _ in text}) > 20
        yield Expected(bench, wanted, texts)


@pytest.mark.parametrize(("lease", "threads"), [(1, 2), (5, 1), (NEW, 1), (NEW, 2)])
def test_in_a_batch_and_leases_of_any_length(alone: Expected, threads: int, lease: int) -> None:
    bench, wanted = alone.bench, alone.wanted
    order = random.Random(lease).sample(wanted, len(wanted))
    assert bench.decode(order, bench.prefill(order, threads), lease, threads) == alone.texts


@pytest.mark.parametrize("threads", [1, 2])
def test_prompts_that_begin_in_a_decode_job(alone: Expected, threads: int) -> None:
    """Alone, with or without a part that was computed before; all together; and beside others that decode."""
    bench, wanted = alone.bench, alone.wanted
    for joining in ([s] for s in wanted):
        texts = bench.join(joining, [], threads)
        assert bench.decode(joining, texts, NEW, threads) == {s.slot: alone.texts[s.slot] for s in joining}
    for joining in (wanted, wanted[::2], wanted[1::2], wanted[:1], wanted[-1:]):
        texts = bench.join(joining, [s for s in wanted if s not in joining], threads)
        assert bench.decode(wanted, texts, NEW, threads) == alone.texts


@pytest.mark.parametrize("seed", range(2))
def test_in_part_of_the_batch(alone: Expected, seed: int) -> None:
    some = random.Random(seed).sample(alone.wanted, 3)
    texts = alone.bench.decode(some, alone.bench.prefill(some, 2), 3, 2)
    assert texts == {s.slot: alone.texts[s.slot] for s in some}


def test_others_do_not_notice_who_leaves(alone: Expected) -> None:
    """Every second sequence ends early, of its length or of a token of its text."""
    wanted = []
    for s in alone.wanted:
        text = [token for token, _, _ in alone.texts[s.slot]]
        if s.slot % 4 == 1:
            s = replace(s, limit=len(s.prompt) + 2 + s.slot)
        elif s.slot % 4 == 3:
            s = replace(s, sampling=structs.replace(s.sampling, stop_token_ids=(text[s.slot], -1)))
        wanted.append(s)
    texts = alone.bench.decode(wanted, alone.bench.prefill(wanted, 2), NEW, 2)
    for s in alone.wanted:
        whole = alone.texts[s.slot]
        if s.slot % 4 == 1:
            assert texts[s.slot] == [
                *whole[: 1 + s.slot],
                (whole[1 + s.slot][0], LENGTH, whole[1 + s.slot][2]),
            ]
        elif s.slot % 4 == 3:
            end = [token for token, _, _ in whole].index(whole[s.slot][0])
            assert texts[s.slot] == [*whole[:end], (whole[end][0], STOP, whole[end][2])]
        else:
            assert texts[s.slot] == whole


def watch(engine: CpuEngine, job: NativeJob, each: Callable[[int], None]) -> list[Step]:
    """Collect until the end; `each` hears how many steps there have been whenever there are more."""
    steps: list[Step] = []
    while not job.ended:
        select.select([engine.runner], [], [])
        engine.runner.acknowledge()
        if found := job.collect():
            steps += found
            each(len(steps))
    return steps + job.collect()


def test_threads_that_come_and_go_change_nothing(alone: Expected) -> None:
    bench, wanted = alone.bench, alone.wanted
    texts = bench.prefill(wanted)
    job = bench.engine.runner.start(DecodeJob(1, "m", bench.rows(wanted, texts), NEW))
    bench.take(texts, watch(bench.engine, job, lambda steps: job.use_shares(SHARES[1 + steps % 2])))
    assert texts == alone.texts


def test_threads_that_come_and_go_in_a_prefill_change_nothing(alone: Expected) -> None:
    """The share of a long prefill changes between layers; which ones is the machine's to say."""
    bench, wanted = alone.bench, [s for s in alone.wanted if len(s.prompt) > 1000]
    texts = bench.prefill(wanted)
    first = {s.slot: bench.prefill([s], 2)[s.slot] for s in wanted}
    assert texts == first == {s.slot: alone.texts[s.slot][:1] for s in wanted}
    whole = [PrefillChunk(s.slot, 0, len(s.prompt), s.limit, s.sampling) for s in wanted]
    unchunked = list(bench.engine.runner.run(PrefillJob(0, "m", tuple(whole), HALF)))
    for threads in (1, 2):
        job = bench.engine.runner.start(PrefillJob(0, "m", tuple(whole), SHARES[threads]))
        job.use_shares(SHARES[3 - threads])
        assert watch(bench.engine, job, lambda steps: None) == unchunked


@pytest.mark.parametrize("after", [1, 4])
def test_a_job_that_is_stopped_goes_on_in_the_next_one(alone: Expected, after: int) -> None:
    bench, wanted = alone.bench, alone.wanted
    texts = bench.prefill(wanted, 2)
    job = bench.engine.runner.start(DecodeJob(1, "m", bench.rows(wanted, texts), NEW))
    steps = watch(bench.engine, job, lambda steps: job.stop() if steps >= after else None)
    assert after <= len(steps) == job.steps < NEW
    bench.take(texts, steps)
    assert bench.decode(wanted, texts, NEW, 2) == alone.texts


def test_a_job_that_nobody_listens_to_is_stopped(alone: Expected) -> None:
    """As when a worker's stream ends: what was computed stays good."""
    bench, wanted = alone.bench, alone.wanted
    texts = bench.prefill(wanted)
    steps = bench.engine.runner.run(DecodeJob(1, "m", bench.rows(wanted, texts), NEW))
    bench.take(texts, [next(steps)])
    steps.close()  # type: ignore[attr-defined]
    assert bench.decode(wanted, texts) == alone.texts
