"""The native sampler against the torch one on the same logits, and both against the definition."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from muxserve.engine.cpu.library import VARIANTS, cpu_flags
from muxserve.engine.messages import LENGTH, STOP, UNFINISHED, DecodeRow, Sampling
from muxserve.engine.sampler import SamplingBatch, sample, uniforms
from tests.engine.planted import CONTEXT, PlantedEngine
from tests.engine.sampling import (
    assert_chi_square,
    coarse_logits,
    distribution,
    interval,
    penalised,
    random_parameters,
    signed,
)

HERE = [name for name, needed in VARIANTS.items() if needed <= cpu_flags()]
ROWS = 250
EDGE = 1e-5
"""How far from the border between two tokens a random number may be and still draw either: native and torch
round the weights differently, and sum them in another order."""
STRAY = 1e-3
"""Rows of which so many may be drawn so near to a border that the two choose differently."""
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("vocabulary", [2, 9, 100, 703, 5000])
def test_tokens_are_those_of_the_torch_sampler(variant: str, vocabulary: int) -> None:
    """Every row is one of a batch of mixed parameters; the few that differ were drawn at a border."""
    chooser = random.Random(vocabulary)
    generator = torch.Generator().manual_seed(vocabulary)
    logits = coarse_logits(min(vocabulary, 40), vocabulary, generator)
    stray = 0
    with PlantedEngine(logits, slots=ROWS, threads=2, variant=variant) as engine:
        for _ in range(4):
            rows = [random_parameters(chooser) for _ in range(ROWS)]
            which = [chooser.randrange(len(logits)) for _ in rows]
            positions = [chooser.randint(row.prompt_length, CONTEXT - 1) for row in rows]
            limits = [chooser.choice([position, position + 1, CONTEXT]) for position in positions]
            shape = (ROWS, CONTEXT)
            tokens = torch.randint(0, vocabulary, shape, generator=generator, dtype=torch.int32)
            step = engine.draw(which, rows, positions, tokens, limits)
            batch = SamplingBatch.build(rows, slots=range(ROWS), limits=limits)
            want = sample(logits[which], batch, torch.tensor(positions), tokens)
            assert step.slots == tuple(range(ROWS))
            assert step.positions == tuple(positions)
            written = engine.tables.tokens[np.arange(ROWS), positions]
            assert written.tolist() == list(step.tokens)
            for i, row in enumerate(rows):
                if step.tokens[i] == int(want.tokens[i]):
                    assert step.finished[i] == int(want.finished[i])
                    check_logprobs(step.logprobs[i], want.logprobs[i])
                    continue
                stray += 1
                known = tokens[i, : positions[i]].tolist()
                scores = penalised(logits[which[i]].tolist(), known, row)
                (u,) = uniforms(torch.tensor([signed(row.seed)]), torch.tensor([positions[i]])).tolist()
                low, high = interval(scores, row, step.tokens[i])
                assert row.temperature > 0 and low - EDGE <= u <= high + EDGE
    assert stray <= STRAY * 4 * ROWS


def check_logprobs(got: Any, want: Any) -> None:
    """Either may be None."""
    assert (got is None) == (want is None)
    if got is not None:
        assert got.top_ids == want.top_ids
        assert got.logprob == pytest.approx(want.logprob, abs=2e-5)
        assert got.top_logprobs == pytest.approx(want.top_logprobs, abs=2e-5)


SMOOTH = torch.randn(1, 40, generator=torch.Generator().manual_seed(7)) * 2


@pytest.fixture(scope="module")
def smooth() -> Iterator[PlantedEngine]:
    with PlantedEngine(SMOOTH, slots=4000) as engine:
        yield engine


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
def test_many_seeds_follow_the_distribution(smooth: PlantedEngine, row: Sampling) -> None:
    count, times = 4000, 4
    expected = distribution(SMOOTH[0].tolist(), row)
    seen: Counter[int] = Counter()
    for part in range(times):
        rows = [msgspec.structs.replace(row, seed=part * count + i) for i in range(count)]
        seen.update(smooth.draw([0] * count, rows, [5] * count).tokens)
    assert set(seen) <= set(expected)
    assert_chi_square([seen[i] for i in expected], [p * count * times for p in expected.values()])


def test_the_same_seed_and_position_draw_the_same_token_for_ever() -> None:
    """The torch sampler promises the same values: a sequence that moves to a GPU continues the same text."""
    logits = torch.linspace(-2, 2, 1000)[None]
    rows = [Sampling(seed=s) for s in (0, 1, 2**63, 2**64 - 1)]
    with PlantedEngine(logits, slots=4) as engine:
        assert engine.draw([0] * 4, rows, [1, 1, 2, 3]).tokens == (913, 985, 193, 981)


@pytest.mark.parametrize("vocabulary", [1, 5, 16, 33, 1025])
def test_greedy_takes_the_lowest_id_of_equals_wherever_they_are(vocabulary: int) -> None:
    places = sorted({0, vocabulary // 2, vocabulary - 1})
    logits = torch.zeros(len(places), vocabulary)
    for row, place in enumerate(places):
        logits[row, place:] = 1.0
    with PlantedEngine(logits, slots=len(places)) as engine:
        rows = [GREEDY] * len(places)
        assert list(engine.draw(range(len(places)), rows, [1] * len(places)).tokens) == places


def test_logprobs_are_of_the_models_own_distribution_and_no_more_than_there_are_tokens() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    logits[0, 20] = logits[0, 30] = 9.0
    row = Sampling(temperature=0.0, logprobs=60, repetition_penalty=1.5, presence_penalty=1.0)
    want = logits[0].log_softmax(-1)
    with PlantedEngine(logits, slots=2) as engine:
        step = engine.draw([0, 0], [row, GREEDY], [1, 1])
    found, none = step.logprobs
    assert none is None and found is not None
    assert found.top_ids[:2] == (20, 30) and len(found.top_ids) == 50
    assert found.logprob == pytest.approx(float(want[step.tokens[0]]), abs=1e-5)
    assert found.top_logprobs == pytest.approx(want[list(found.top_ids)].tolist(), abs=1e-5)


def test_extreme_temperatures_and_forbidden_tokens_are_harmless() -> None:
    logits = torch.tensor([[3e38, -3e38, -math.inf, 1.0], [30.0, -30.0, -math.inf, 1.0]])
    filters = [(p, k, seed) for p in (1.0, 0.9) for k in (0, 4) for seed in range(50)]
    cold, hot = (
        [Sampling(temperature=t, top_p=p, top_k=k, seed=s) for p, k, s in filters] for t in (1e-4, 1e30)
    )
    with PlantedEngine(logits, slots=len(filters)) as engine:
        for which in (0, 1):
            assert set(engine.draw([which] * len(cold), cold, [1] * len(cold)).tokens) == {0}
        assert set(engine.draw([0] * len(hot), hot, [1] * len(hot)).tokens) == {0}
        assert set(engine.draw([1] * len(hot), hot, [1] * len(hot)).tokens) == {0, 1, 3}
        assert engine.draw([0], [Sampling(temperature=1e-6)], [1]).tokens == (0,)


def test_rows_finish_by_stop_token_before_length() -> None:
    stops = [(7, 0), (0,), (), (3,)]
    rows = [Sampling(temperature=0.0, stop_token_ids=s) for s in stops]
    with PlantedEngine(torch.eye(4) * 9, slots=4) as engine:
        step = engine.draw(range(4), rows, [4] * 4, limits=[6, 6, 5, 5])
    assert step.tokens == (0, 1, 2, 3)
    assert step.finished == (STOP, UNFINISHED, LENGTH, STOP)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 20, 36])
@pytest.mark.parametrize(
    "row",
    [GREEDY, Sampling(), Sampling(top_p=0.5), Sampling(top_k=3), Sampling(presence_penalty=1.0, logprobs=2)],
)
def test_rows_whose_logits_are_not_finite_are_named_and_the_others_go_on(
    bad: float, place: int, row: Sampling
) -> None:
    """A logit of -infinity alone is a forbidden token; it takes all of them to make a row of no choice."""
    logits = torch.zeros(3, 37)
    logits[2, slice(None) if bad == -math.inf else place] = bad
    with PlantedEngine(logits, slots=5) as engine:
        step = engine.draw([0, 2, 1, 2, 0], [row] * 5, [2] * 5)
        assert step.failed == (1, 3)
        assert step.slots == (0, 2, 4)
        alone = engine.draw([0], [row], [2])
        assert step.tokens[0] == step.tokens[2] == alone.tokens[0]
        assert step.logprobs[:1] == alone.logprobs


def test_a_row_that_fails_leaves_a_job_of_several_steps_alone() -> None:
    """Row 0 goes to token 1 and on to 0, for ever; row 2 is NaN."""
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0], [math.nan, 0.0, 0.0, 0.0]])
    with PlantedEngine(logits, slots=2) as engine:
        engine.tables.tokens[0, 0], engine.tables.tokens[1, 0] = 0, 2
        steps = engine.decode([DecodeRow(0, 1, 9, GREEDY), DecodeRow(1, 1, 9, GREEDY)], 5)
    assert [step.failed for step in steps] == [(1,), (), (), (), ()]
    assert [step.tokens for step in steps] == [(1,), (0,), (1,), (0,), (1,)]
    assert [step.positions for step in steps] == [(1,), (2,), (3,), (4,), (5,)]
