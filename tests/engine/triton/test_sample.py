"""Sampling on the device against the sampler on the host, token for token."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from muxserve.engine.kernels.triton import sample as on_device
from muxserve.engine.kernels.triton.penalties import penalise
from muxserve.engine.messages import LENGTH, STOP, UNFINISHED, Sampling
from muxserve.engine.sampler import Sampled, SamplingBatch, _penalise, sample
from tests.engine.sampling import coarse_logits, random_parameters

CONTEXT = 12


def both(
    logits: Tensor,
    rows: Sequence[Sampling],
    positions: Sequence[int],
    limits: Sequence[int],
    tokens: Tensor,
    device: torch.device,
) -> tuple[on_device.DeviceSampled, Sampled]:
    slots = list(range(len(rows)))[::-1]
    here = SamplingBatch.build(rows, slots=slots, limits=limits)
    there = SamplingBatch.build(rows, slots=slots, limits=limits, device=str(device))
    at = torch.tensor(positions)
    got = on_device.sample(logits.to(device), there, at.to(device), tokens.to(device))
    return got, sample(logits, here, at, tokens)


@pytest.mark.parametrize(("vocabulary", "seed"), [(2, 1), (9, 2), (100, 3), (700, 4), (5000, 5)])
@pytest.mark.parametrize("coarse", [True, False])
def test_the_token_is_the_one_that_the_host_draws(
    device: torch.device, vocabulary: int, seed: int, coarse: bool
) -> None:
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [random_parameters(chooser) for _ in range(5)]
    logits = (
        coarse_logits(5, vocabulary, generator) if coarse else torch.randn(5, vocabulary, generator=generator)
    )
    positions = [chooser.randint(row.prompt_length, CONTEXT) for row in rows]
    limits = [chooser.randint(3, CONTEXT + 2) for _ in rows]
    tokens = torch.randint(0, vocabulary, (5, CONTEXT), generator=generator, dtype=torch.int32)
    got, want = both(logits, rows, positions, limits, tokens, device)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert got.finished.tolist() == want.finished.tolist()
    assert not got.bad.any()


@pytest.mark.parametrize(
    "row",
    [
        Sampling(temperature=1.3),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=30.0, top_p=0.999),  # too flat for the candidates to hold it
        Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.01),
    ],
)
def test_rows_of_one_kind_over_several_blocks_of_the_vocabulary(device: torch.device, row: Sampling) -> None:
    logits = torch.randn(1, 9000, generator=torch.Generator().manual_seed(3)).expand(4, -1) * 3
    rows = [
        Sampling(temperature=row.temperature, top_p=row.top_p, top_k=row.top_k, min_p=row.min_p, seed=seed)
        for seed in (0, 1, 2**63, 2**64 - 1)
    ]
    tokens = torch.zeros(4, CONTEXT, dtype=torch.int32)
    got, want = both(logits, rows, [1, 2, 3, 4], [99] * 4, tokens, device)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert len(set(got.tokens.tolist())) > 1


def test_penalties_are_those_of_the_host_to_the_bit(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    chooser = random.Random(0)
    rows = [random_parameters(chooser) for _ in range(8)]
    logits = torch.randn(8, 5000, generator=generator)
    tokens = torch.randint(0, 40, (8, 4200), generator=generator, dtype=torch.int32)
    positions = torch.tensor([chooser.randint(row.prompt_length, 4200) for row in rows])
    here = SamplingBatch.build(rows, slots=range(8), limits=[9] * 8)
    there = SamplingBatch.build(rows, slots=range(8), limits=[9] * 8, device=str(device))
    got = penalise(logits.to(device), there, positions.to(device), tokens.to(device))
    assert torch.equal(got.cpu(), _penalise(logits, here, positions, tokens))


def test_rows_whose_logits_are_not_finite_are_marked_and_their_neighbours_drawn(device: torch.device) -> None:
    logits = torch.zeros(5, 9)
    logits[1, 4], logits[2, 4], logits[3] = math.nan, math.inf, -math.inf
    logits[:, 0] += torch.tensor([9.0, 0.0, 0.0, 0.0, 9.0])
    rows = [Sampling(temperature=0.01, top_p=0.5)] * 4 + [Sampling(temperature=0.0)]
    batch = SamplingBatch.build(rows, slots=range(5), limits=[9] * 5, device=str(device))
    tokens = torch.zeros(5, CONTEXT, dtype=torch.int32, device=device)
    got = on_device.sample(logits.to(device), batch, torch.ones(5, dtype=torch.int64, device=device), tokens)
    assert got.bad.tolist() == [0, 1, 1, 1, 0]
    assert got.tokens[[0, 4]].tolist() == [0, 0]


def test_extreme_temperatures_and_forbidden_tokens_are_harmless(device: torch.device) -> None:
    logits = torch.tensor([[3e38, -3e38, -math.inf, 1.0]]).repeat(4, 1)
    rows = [Sampling(temperature=t, top_p=p) for t in (1e-4, 3e38) for p in (1.0, 0.9)]
    tokens = torch.zeros(4, CONTEXT, dtype=torch.int32)
    got, want = both(logits, rows, [1] * 4, [9] * 4, tokens, device)
    assert got.tokens.tolist() == want.tokens.tolist()


def test_rows_finish_by_stop_token_before_length(device: torch.device) -> None:
    rows = [Sampling(temperature=0.0, stop_token_ids=s) for s in ((7, 0), (0,), (), (3,))]
    batch = SamplingBatch.build(rows, slots=range(4), limits=[6, 6, 5, 5], device=str(device))
    tokens = torch.zeros(4, CONTEXT, dtype=torch.int32, device=device)
    got = on_device.sample(
        torch.eye(4, device=device), batch, torch.full((4,), 4, dtype=torch.int64, device=device), tokens
    )
    assert got.tokens.tolist() == [0, 1, 2, 3]
    assert got.finished.tolist() == [STOP, UNFINISHED, LENGTH, STOP]


def test_logprobs_are_of_the_models_own_distribution(device: torch.device) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 20] = logits[1, 30] = 9.0
    chosen = torch.tensor([4, 30, 7])
    got = on_device.logprobs(logits.to(device), chosen.to(device), 2)
    want = logits.log_softmax(-1)
    assert got.top_ids[1].tolist() == [20, 30]
    assert torch.allclose(got.chosen.cpu(), want[[0, 1, 2], chosen])
    assert torch.allclose(got.top.cpu(), want.gather(1, got.top_ids.cpu()))
    assert on_device.logprobs(logits.to(device), chosen.to(device), 0).top_ids.shape == (3, 0)
