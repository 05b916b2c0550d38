"""Sampling against a reference that takes one row and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muxserve.engine.messages import LENGTH, STOP, UNFINISHED, Sampling
from muxserve.engine.sampler import Sampled, SamplerError, SamplingBatch, ranked, sample, uniforms
from tests.engine.sampling import (
    assert_chi_square,
    coarse_logits,
    distribution,
    interval,
    penalised,
    signed,
)

CONTEXT = 12
FAR = CONTEXT + 100


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def draw(
    logits: Tensor, rows: Sequence[Sampling], positions: Sequence[int], tokens: Tensor | None = None
) -> Sampled:
    """Row r lives in slot r."""
    if tokens is None:
        tokens = torch.zeros(len(rows), CONTEXT, dtype=torch.int32)
    batch = SamplingBatch.build(rows, slots=range(len(rows)), limits=[FAR] * len(rows))
    before = logits.clone()
    sampled = sample(logits, batch, torch.tensor(positions), tokens)
    assert torch.equal(logits, before)
    return sampled


@st.composite
def parameters(draw_: st.DrawFn, *, random: bool | None = None, logprobs: bool = True) -> Sampling:
    if random is None:
        random = draw_(st.booleans())
    return Sampling(
        temperature=draw_(st.sampled_from([0.2, 0.7, 1.0, 1.9])) if random else 0.0,
        top_p=draw_(st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05])),
        top_k=draw_(st.sampled_from([0, 1, 2, 5, 70, 10_000])),
        min_p=draw_(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
        seed=draw_(st.integers(0, 2**64 - 1)),
        repetition_penalty=draw_(st.sampled_from([1.0, 1.0, 2.0, 0.5])),
        presence_penalty=draw_(st.sampled_from([0.0, 0.0, 0.75, -2.0])),
        frequency_penalty=draw_(st.sampled_from([0.0, 0.0, 0.5, -0.25])),
        prompt_length=draw_(st.integers(1, 6)),
        logprobs=draw_(st.sampled_from([-1, 0, 3])) if logprobs else -1,
        stop_token_ids=draw_(st.sampled_from([(), (0,), (3, 1, 2)])),
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_is_drawn_is_in_the_support_of_the_reference_and_at_its_quantile(data: st.DataObject) -> None:
    vocabulary = data.draw(st.sampled_from([2, 9, 100, 700]))
    rows = data.draw(st.lists(parameters(random=True, logprobs=False), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = coarse_logits(len(rows), vocabulary, generator)
    positions = [data.draw(st.integers(r.prompt_length, CONTEXT)) for r in rows]
    tokens = torch.randint(0, vocabulary, (len(rows), CONTEXT), generator=generator, dtype=torch.int32)
    got = draw(logits, rows, positions, tokens).tokens.tolist()
    uniform = uniforms(torch.tensor([signed(r.seed) for r in rows]), torch.tensor(positions)).tolist()
    for r, row in enumerate(rows):
        scores = penalised(logits[r].tolist(), tokens[r, : positions[r]].tolist(), row)
        low, high = interval(scores, row, got[r])
        assert low - 1e-5 <= uniform[r] <= high + 1e-5


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_greedy_rows_take_the_best_penalised_logit_and_the_lowest_id_of_equals(data: st.DataObject) -> None:
    vocabulary = data.draw(st.sampled_from([2, 9, 100]))
    rows = data.draw(st.lists(parameters(random=False), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = coarse_logits(len(rows), vocabulary, generator)
    positions = [data.draw(st.integers(r.prompt_length, CONTEXT)) for r in rows]
    tokens = torch.randint(0, vocabulary, (len(rows), CONTEXT), generator=generator, dtype=torch.int32)
    got = draw(logits, rows, positions, tokens).tokens.tolist()
    for r, row in enumerate(rows):
        scores = penalised(logits[r].tolist(), tokens[r, : positions[r]].tolist(), row)
        assert got[r] == scores.index(max(scores))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_batch(data: st.DataObject) -> None:
    vocabulary = data.draw(st.sampled_from([5, 100, 3001]))
    rows = data.draw(st.lists(parameters(), min_size=2, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = coarse_logits(len(rows), vocabulary, generator)
    positions = torch.tensor([data.draw(st.integers(r.prompt_length, CONTEXT)) for r in rows])
    tokens = torch.randint(0, vocabulary, (len(rows), CONTEXT), generator=generator, dtype=torch.int32)
    batch = SamplingBatch.build(rows, slots=range(len(rows)), limits=[FAR] * len(rows))
    together = sample(logits, batch, positions, tokens)
    order = data.draw(st.permutations(range(len(rows))))
    some = order[: data.draw(st.integers(1, len(rows)))]
    other = SamplingBatch.build([rows[i] for i in some], slots=some, limits=[FAR] * len(some))
    apart = sample(logits[some], other, positions[some], tokens)
    assert apart.tokens.tolist() == together.tokens[some].tolist()
    assert apart.finished.tolist() == together.finished[some].tolist()
    assert list(apart.logprobs or [None] * len(some)) == [
        together.logprobs[i] if together.logprobs else None for i in some
    ]
    keep = torch.tensor([i in some for i in range(len(rows))])
    selected = sample(logits[keep], batch.select(keep), positions[keep], tokens)
    assert selected.tokens.tolist() == together.tokens[keep].tolist()


@pytest.mark.parametrize(
    "row",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, min_p=0.05),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.2, top_p=0.8),
        Sampling(temperature=0.9, top_k=12, top_p=0.9, min_p=0.01),
    ],
)
def test_many_seeds_follow_the_distribution(row: Sampling) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(7)) * 2
    count = 20_000
    rows = [msgspec.structs.replace(row, seed=seed) for seed in range(count)]
    got = draw(logits.expand(count, -1), rows, [5] * count, torch.zeros(count, CONTEXT, dtype=torch.int32))
    expected = distribution(logits[0].tolist(), row)
    seen = torch.bincount(got.tokens, minlength=40)
    assert set(seen.nonzero().flatten().tolist()) <= set(expected)
    assert_chi_square([int(seen[i]) for i in expected], [p * count for p in expected.values()])


def test_uniforms_are_uniform_and_independent_over_neighbouring_seeds_and_positions() -> None:
    side, bins = 400, 20
    seeds = torch.arange(side).repeat_interleave(side) - side // 2
    positions = torch.arange(side).repeat(side)
    grid = uniforms(seeds, positions).view(side, side)
    assert float(grid.min()) >= 0
    assert float(grid.max()) < 1
    cells = (grid * bins).long()
    assert_chi_square(torch.bincount(cells.flatten()).tolist(), [side * side / bins] * bins)
    neighbours = {
        "next position": (cells[:, :-1], cells[:, 1:]),
        "next seed": (cells[:-1], cells[1:]),
        "next of both": (cells[:-1, :-1], cells[1:, 1:]),
        "seed + 1, position - 1": (cells[1:, :-1], cells[:-1, 1:]),
    }
    for one, other in neighbours.values():
        pairs = torch.bincount((one * bins + other).flatten(), minlength=bins * bins)
        assert_chi_square(pairs.tolist(), [one.numel() / bins**2] * bins**2)


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**40))
def test_uniforms_are_splitmix64_of_the_mixed_seed(seed: int, position: int) -> None:
    whole = 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & whole
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & whole
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    bits = mix(mix(seed + golden & whole) + (position + 1) * golden & whole)
    got = uniforms(torch.tensor([signed(seed)]), torch.tensor([position]))
    assert float(got) == (bits >> 12) / 2**52


def test_every_bit_of_seed_and_position_matters_and_none_is_random() -> None:
    base = uniforms(torch.tensor([0]), torch.tensor([0]))
    powers = torch.tensor([signed(1 << i) for i in range(64)])
    by_seed = uniforms(powers, torch.zeros(64, dtype=torch.int64))
    by_position = uniforms(torch.zeros(40, dtype=torch.int64), powers[:40])
    values = torch.cat([base, by_seed, by_position])
    assert values.unique().numel() == values.numel()
    assert torch.equal(by_seed, uniforms(powers, torch.zeros(64, dtype=torch.int64)))


def test_the_same_seed_and_position_draw_the_same_token_for_ever() -> None:
    """These values are a promise: a sequence resumed by a newer release continues the same text."""
    logits = torch.linspace(-2, 2, 1000).repeat(4, 1)
    rows = [Sampling(seed=s) for s in (0, 1, 2**63, 2**64 - 1)]
    assert draw(logits, rows, [1, 1, 2, 3]).tokens.tolist() == [913, 985, 193, 981]


def test_extreme_temperatures_and_forbidden_tokens_are_harmless() -> None:
    logits = torch.tensor([[3e38, -3e38, -math.inf, 1.0]]).repeat(4, 1)
    rows = [Sampling(temperature=t, top_p=p) for t in (1e-4, 1e30) for p in (1.0, 0.9)]
    chosen = draw(logits, rows, [1] * 4).tokens.tolist()
    assert chosen[:2] == [0, 0]
    assert 2 not in chosen
    assert draw(logits[:1], [Sampling(temperature=1e-6)], [1]).tokens.tolist() == [0]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 20] = logits[1, 30] = 9.0
    rows = [
        Sampling(temperature=0.0, logprobs=0),
        Sampling(temperature=0.0, logprobs=60, repetition_penalty=1.5),
        Sampling(temperature=0.0),
    ]
    sampled = draw(logits, rows, [1, 1, 1])
    want = logits.log_softmax(-1)
    first, second, third = sampled.logprobs
    assert third is None
    assert first is not None and second is not None
    assert first.top_ids == ()
    assert first.logprob == pytest.approx(float(want[0, sampled.tokens[0]]), abs=1e-6)
    assert second.top_ids[:2] == (20, 30)
    assert len(second.top_ids) == 50
    assert list(second.top_logprobs) == pytest.approx(want[1, list(second.top_ids)].tolist(), abs=1e-6)
    assert draw(logits, [Sampling()] * 3, [1] * 3).logprobs == ()


def test_rows_finish_by_stop_token_before_length() -> None:
    logits = torch.eye(4)[[0, 1, 2, 3]] * 9
    stops = [(7, 0), (0,), (), (3,)]
    rows = [Sampling(temperature=0.0, stop_token_ids=s) for s in stops]
    batch = SamplingBatch.build(rows, slots=range(4), limits=[6, 6, 5, 5])
    sampled = sample(logits, batch, torch.tensor([4] * 4), torch.zeros(4, CONTEXT, dtype=torch.int32))
    assert sampled.finished.dtype == torch.int8
    assert sampled.finished.tolist() == [STOP, UNFINISHED, LENGTH, STOP]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "row", [Sampling(temperature=0.0), Sampling(top_p=0.5), Sampling(presence_penalty=1.0)]
)
def test_rows_whose_logits_are_not_finite_are_named(bad: float, row: Sampling) -> None:
    logits = torch.zeros(4, 9)
    logits[1, 4] = bad
    logits[3] = -math.inf
    with pytest.raises(SamplerError, match=r"row 1, 3 ") as caught:
        draw(logits, [row] * 4, [2] * 4)
    assert caught.value.rows == (1, 3)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_ranked_sorts_by_value_then_id(count: int, seed: int) -> None:
    scores = coarse_logits(2, 300, torch.Generator().manual_seed(seed))
    scores[:, 50] = -0.0
    scores[1, 60:70] = -math.inf
    for row, ids in zip(scores.tolist(), ranked(scores, count).tolist(), strict=True):
        assert ids == sorted(range(300), key=lambda i: (-row[i], i))[:count]
