"""From logits to tokens on a GPU, without a word to the host: what `engine.sampler` does, row by row.

There, filters by rank sort. Here nothing is sorted: each rank that matters (where top_k ends, where top_p's
mass is made up, where the random number falls) is the largest score at or above which there is so much, found
by bisection over the scores' bit patterns, with sums in float64. The same token comes out but where exp's
last bit moves a sum across the random number. Bisection goes over the few most likely tokens where these hold
the answer, else over the whole vocabulary.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from muxserve.engine.kernels.triton.draw import draw_by_id, draw_ranked, uniform_of, weight_at
from muxserve.engine.kernels.triton.language import New, jit, next_power_of_2, tl
from muxserve.engine.kernels.triton.penalties import penalise
from muxserve.engine.kernels.triton.tuning import SAMPLE
from muxserve.engine.messages import LENGTH, STOP, UNFINISHED
from muxserve.engine.sampler import GREEDY_BELOW, SamplingBatch, ranked


@dataclass(frozen=True, slots=True)
class DeviceSampled:
    """tokens: int64 `[R]`; finished: int8 `[R]`, as `Sampled` has it; bad: int8 `[R]`, 1 where the logits are
    NaN, infinite or all minus infinity: that row's token means nothing (see `SamplerError`)."""

    tokens: Tensor
    finished: Tensor
    bad: Tensor


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """chosen: float32 `[R]`; top_ids: int64 `[R, k]` and top: float32 `[R, k]`, most likely first."""

    chosen: Tensor
    top_ids: Tensor
    top: Tensor


def sample(
    logits: Tensor, batch: SamplingBatch, positions: Tensor, tokens: Tensor, *, new: New = torch.empty
) -> DeviceSampled:
    """Choose the token at `positions[r]` for each row r. Arguments as of `engine.sampler.sample`.

    Of `batch`, the host looks only at whether any row is random and any penalised, so that a graph that
    captures this serves every batch of R rows of which that holds, or of which less holds.
    """
    rows, vocabulary = logits.shape
    device = logits.device
    scores = penalise(logits, batch, positions, tokens, new=new) if batch.penalised.numel() else logits
    best = new((rows,), dtype=torch.float32, device=device)
    first = new((rows,), dtype=torch.int32, device=device)
    count = new((rows,), dtype=torch.int32, device=device)
    mass = new((rows, 2), dtype=torch.float64, device=device)
    candidates = new((rows, vocabulary) if batch.random else (1, 1), dtype=torch.float32, device=device)
    found = DeviceSampled(
        new((rows,), dtype=torch.int64, device=device),
        new((rows,), dtype=torch.int8, device=device),
        new((rows,), dtype=torch.int8, device=device),
    )
    weighed = (scores, candidates, best, first, count, mass, found.bad)
    how = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, scores.stride(0), vocabulary)
    stops = batch.stop_ids.shape[1]
    _weigh[rows,](
        *weighed,
        *how,
        GREEDY=GREEDY_BELOW,
        RANDOM=batch.random,
        BLOCK=SAMPLE.block,
        num_warps=SAMPLE.warps,
    )
    _choose[rows,](
        *weighed,
        found.tokens,
        found.finished,
        batch.seeds,
        positions,
        batch.limits,
        batch.stop_ids if stops else batch.limits,
        *how,
        STOPS=stops,
        ALL_STOPS=next_power_of_2(max(1, stops)),
        STOP=STOP,
        LENGTH=LENGTH,
        UNFINISHED=UNFINISHED,
        GREEDY=GREEDY_BELOW,
        RANDOM=batch.random,
        BLOCK=SAMPLE.block,
        num_warps=SAMPLE.warps,
    )
    return found


def logprobs(logits: Tensor, chosen: Tensor, most: int) -> DeviceLogprobs:
    """Log-probabilities of `chosen`, int64 `[R]`, and of each row's `most` most likely tokens, from the
    model's own logits. By torch: few requests ask for them, and its top-k needs no help."""
    logprob = logits.log_softmax(-1)
    ids = ranked(logits, min(most, logits.shape[1])) if most else chosen.new_empty((len(chosen), 0))
    return DeviceLogprobs(logprob.gather(1, chosen[:, None]).squeeze(1), ids, logprob.gather(1, ids))


@jit
def _weigh(
    scores,
    candidates,
    best_out,
    first_out,
    count_out,
    mass_out,
    bad_out,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    stride,
    vocabulary,
    GREEDY: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its best score and that one's lowest id; if it is drawn, the sum of its weights; if it is
    filtered by rank, its candidates (scores within 12 temperatures of the best), their number and weight."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    i = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.full([BLOCK], 0, tl.int32)
    nans = tl.full([BLOCK], 0, tl.int32)
    for start in tl.range(0, vocabulary, BLOCK):
        score = tl.load(scores + start + i, mask=start + i < vocabulary, other=float("-inf"))
        nans += (score != score).to(tl.int32)
        where = tl.where(score > highest, start + i, where)
        highest = tl.where(score > highest, score, highest)
    best = tl.max(highest, 0)
    first = tl.min(tl.where(highest == best, where, 0x7FFFFFFF), 0)
    bad = (tl.sum(nans, 0) > 0) | (best == float("inf")) | (best == float("-inf"))
    tl.store(bad_out + row, bad.to(tl.int8))
    tl.store(best_out + row, best)
    tl.store(first_out + row, first)
    temperature = tl.load(temperatures + row)
    if RANDOM:  # noqa: SIM102  (settled when it compiles; the other is not)
        if (temperature >= GREEDY) & (bad == 0):
            min_p = tl.load(min_ps + row)
            filtered = (tl.load(top_ks + row) > 0) | (tl.load(top_ps + row) < 1)
            lowest = tl.where(filtered, best - 12 * temperature, float("inf"))
            total = tl.full([], 0, tl.float64)
            held = tl.full([BLOCK], 0, tl.float64)
            count = tl.full([], 0, tl.int32)
            for start in tl.range(0, vocabulary, BLOCK):
                score = tl.load(scores + start + i, mask=start + i < vocabulary, other=float("-inf"))
                weight = weight_at(score, best, temperature, min_p).to(tl.float64)
                total += tl.sum(weight, 0)
                near = (score >= lowest) & (start + i < vocabulary)
                held += tl.where(near, weight, 0.0)
                rank = count + tl.cumsum(near.to(tl.int32), 0) - 1
                tl.store(candidates + row * vocabulary + rank, score, mask=near)
                count += tl.sum(near.to(tl.int32), 0)
            tl.store(mass_out + 2 * row, total)
            tl.store(mass_out + 2 * row + 1, tl.sum(held, 0))
            tl.store(count_out + row, count)


@jit
def _choose(
    scores,
    candidates,
    bests,
    firsts,
    counts,
    masses,
    bads,
    tokens_out,
    finished_out,
    seeds,
    positions,
    limits,
    stop_ids,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    stride,
    vocabulary,
    STOPS: tl.constexpr,
    ALL_STOPS: tl.constexpr,
    STOP: tl.constexpr,
    LENGTH: tl.constexpr,
    UNFINISHED: tl.constexpr,
    GREEDY: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its token, and whether that ends it."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(firsts + row)
    position = tl.load(positions + row)
    if RANDOM:
        temperature, best = tl.load(temperatures + row), tl.load(bests + row)
        if (temperature >= GREEDY) & (tl.load(bads + row) == 0):
            min_p, top_p = tl.load(min_ps + row), tl.load(top_ps + row)
            top_k = tl.load(top_ks + row)
            total, held = tl.load(masses + 2 * row), tl.load(masses + 2 * row + 1)
            uniform = uniform_of(tl.load(seeds + row), position)
            own = scores + row * stride
            if (top_k > 0) | (top_p < 1):
                token = draw_ranked(
                    own, candidates + row * vocabulary, tl.load(counts + row), total, held, best, uniform,
                    top_k, top_p, temperature, min_p, vocabulary, BLOCK,
                )  # fmt: skip
            else:
                token = draw_by_id(own, total, best, uniform, temperature, min_p, vocabulary, BLOCK)
    tl.store(tokens_out + row, token.to(tl.int64))
    finished = tl.where(position + 1 >= tl.load(limits + row), LENGTH, UNFINISHED)
    if STOPS > 0:
        i = tl.arange(0, ALL_STOPS)
        stops = tl.load(stop_ids + row * STOPS + i, mask=i < STOPS, other=-1)
        stopped = tl.max((stops == token).to(tl.int32), 0)
        finished = tl.where(stopped > 0, STOP, finished)
    tl.store(finished_out + row, finished.to(tl.int8))
