"""What sampling means, one row and one token at a time, for tests of the samplers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from muxserve.engine.messages import Sampling


def signed(bits: int) -> int:
    """A uint64 as the int64 with the same bits."""
    return bits - 2**64 if bits >= 2**63 else bits


def coarse_logits(rows: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Multiples of 1/4, so that ties are everywhere, as with bfloat16 weights, and penalties stay exact."""
    return (torch.randn(rows, vocabulary, generator=generator) * 12).round() / 4


def penalised(logits: list[float], tokens: list[int], parameters: Sampling) -> list[float]:
    """tokens: the known ones, prompt first."""
    found = list(logits)
    for token in set(tokens):
        r = parameters.repetition_penalty
        found[token] = found[token] / r if found[token] > 0 else found[token] * r
    output = tokens[parameters.prompt_length :]
    for token in set(output):
        found[token] -= parameters.frequency_penalty * output.count(token) + parameters.presence_penalty
    return found


def distribution(logits: list[float], parameters: Sampling) -> dict[int, float]:
    """Token → probability after temperature, min_p, top_k and top_p, each on what the one before left."""
    best = max(logits)
    weights = {i: math.exp((x - best) / parameters.temperature) for i, x in enumerate(logits)}
    weights = {i: w for i, w in weights.items() if w >= parameters.min_p}
    order = sorted(weights, key=lambda i: (-logits[i], i))
    if parameters.top_k > 0:
        order = order[: parameters.top_k]
    total = sum(weights[i] for i in order)
    kept: list[int] = []
    mass = 0.0
    for i in order:
        if kept and mass >= parameters.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    return {i: weights[i] / mass for i in kept}


def interval(logits: list[float], parameters: Sampling, token: int) -> tuple[float, float]:
    """Random numbers that draw `token` by inverse CDF: in rank order where there is a filter by rank, in id
    order where there is none. KeyError if nothing does."""
    support = distribution(logits, parameters)
    probability = support[token]
    order = list(support) if parameters.top_k or parameters.top_p < 1 else sorted(support)
    before = sum(support[i] for i in order[: order.index(token)])
    return before, before + probability


def random_parameters(chooser: random.Random, most_prompt: int = 6) -> Sampling:
    """Any mixture of everything, a third of them greedy."""
    choose = chooser.choice
    return Sampling(
        temperature=choose([0.0, 0.0, 0.2, 0.7, 1.0, 1.9]),
        top_p=choose([1.0, 1.0, 0.999, 0.9, 0.5, 0.05]),
        top_k=choose([0, 0, 1, 2, 5, 70, 10_000]),
        min_p=choose([0.0, 0.0, 0.02, 0.3, 1.0]),
        seed=chooser.getrandbits(64),
        repetition_penalty=choose([1.0, 1.0, 2.0, 0.5]),
        presence_penalty=choose([0.0, 0.0, 0.75, -2.0]),
        frequency_penalty=choose([0.0, 0.0, 0.5, -0.25]),
        prompt_length=chooser.randint(1, most_prompt),
        logprobs=choose([-1, 0, 3]),
        stop_token_ids=choose([(), (0,), (3, 1, 2)]),
    )


def assert_chi_square(seen: Sequence[float], expected: Sequence[float]) -> None:
    """Cells that expect under five are pooled. The bound is 5 standard deviations of the statistic."""
    large = [i for i, e in enumerate(expected) if e >= 5]
    small = [i for i, e in enumerate(expected) if e < 5]
    cells = [(seen[i], expected[i]) for i in large]
    if sum(expected[i] for i in small) >= 5:
        cells.append((sum(seen[i] for i in small), sum(expected[i] for i in small)))
    statistic = sum((s - e) ** 2 / e for s, e in cells)
    freedom = max(len(cells) - 1, 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
