"""From logits to tokens: vectorised over the rows of a batch, keyed by (seed, position), on any device.

The order is that of vLLM's V1 sampler, so that a request means the same here as there:
1. log-probabilities, where asked for, from the model's own logits;
2. repetition penalty over prompt and output, then frequency and presence penalty over the output;
3. rows with temperature 0 take the most likely token;
4. temperature; min_p on the tempered probabilities; top_k; top_p on what is left (each filter renormalises);
5. one draw by inverse CDF.

Ties, in an argmax or at the edge of a filter, go to the lower token id. A row's result depends on its own
logits, parameters, tokens and position and on nothing else: not on the other rows, their order, or the number
of threads. So sums are running sums along a row, and which way a row takes is decided by that row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muxserve.engine.messages import LENGTH, STOP, UNFINISHED, Sampling, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""

_ELEMENTS = 1 << 18
"""Rows times vocabulary that is worked on at once: temporaries stay in a core's cache, and small."""

_CANDIDATES = 64
"""Most likely tokens that top_p looks at before it looks at more of them."""


class SamplerError(ValueError):
    """Rows whose logits are not numbers to choose by: NaN, infinite, or all minus infinity.

    Nothing has been sampled for any row. `rows` names them; the caller may go on with the others
    (`SamplingBatch.select`).
    """

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(f"logits of row {', '.join(map(str, rows))} are not finite")
        self.rows = rows


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens: int64 `[R]`. finished: int8 `[R]`, UNFINISHED, STOP or LENGTH. logprobs: an entry per row, None
    for rows that did not ask; empty if none did."""

    tokens: Tensor
    finished: Tensor
    logprobs: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of R rows as tensors: built once per job, used at each of its steps.

    slots: int64, rows of the token table. limits: int64, lengths at which a row finishes. stop_ids: int64
    `[R, S]`, padded with -1. random: whether any row is not greedy. The last five: indices of the rows that
    want something done to them; a random row is in `with_top_k`, or `with_top_p`, or `unfiltered`.
    """

    parameters: tuple[Sampling, ...]
    random: bool
    slots: Tensor
    limits: Tensor
    stop_ids: Tensor
    seeds: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    prompt_lengths: Tensor
    penalised: Tensor
    unfiltered: Tensor
    with_top_k: Tensor
    with_top_p: Tensor
    with_logprobs: Tensor

    @staticmethod
    def build(
        rows: Sequence[Sampling], *, slots: Sequence[int], limits: Sequence[int], device: str = "cpu"
    ) -> SamplingBatch:
        """slots[r], limits[r]: the slot of row r, and the sequence length at which it finishes."""

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def floats(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def where(flags: Sequence[bool]) -> Tensor:
            return integers([i for i, flag in enumerate(flags) if flag])

        most_stops = max((len(r.stop_token_ids) for r in rows), default=0)
        stops = [[*r.stop_token_ids, *[-1] * (most_stops - len(r.stop_token_ids))] for r in rows]
        random = [r.temperature >= GREEDY_BELOW for r in rows]
        top_k = [r.top_k > 0 for r in rows]
        top_p = [r.top_p < 1 and r.top_k <= 0 for r in rows]
        return SamplingBatch(
            parameters=tuple(rows),
            random=any(random),
            slots=integers(slots),
            limits=integers(limits),
            stop_ids=integers([i for row in stops for i in row]).view(len(rows), most_stops),
            seeds=integers([_signed(r.seed) for r in rows]),
            temperature=floats([r.temperature for r in rows]),
            top_k=integers([r.top_k for r in rows]),
            top_p=torch.tensor([r.top_p for r in rows], dtype=torch.float64, device=device),
            min_p=floats([r.min_p for r in rows]),
            repetition=floats([r.repetition_penalty for r in rows]),
            presence=floats([r.presence_penalty for r in rows]),
            frequency=floats([r.frequency_penalty for r in rows]),
            prompt_lengths=integers([r.prompt_length for r in rows]),
            penalised=where(
                [
                    r.repetition_penalty != 1 or r.presence_penalty != 0 or r.frequency_penalty != 0
                    for r in rows
                ]
            ),
            unfiltered=where([a and not (k or p) for a, k, p in zip(random, top_k, top_p, strict=True)]),
            with_top_k=where([a and k for a, k in zip(random, top_k, strict=True)]),
            with_top_p=where([a and p for a, p in zip(random, top_p, strict=True)]),
            with_logprobs=where([r.logprobs >= 0 for r in rows]),
        )

    def select(self, keep: Tensor) -> SamplingBatch:
        """The batch of those rows for which `keep`, bool `[R]`, is true."""
        rows = keep.nonzero().flatten()
        return SamplingBatch.build(
            [self.parameters[i] for i in rows.tolist()],
            slots=self.slots[rows].tolist(),
            limits=self.limits[rows].tolist(),
            device=str(self.slots.device),
        )


def sample(logits: Tensor, batch: SamplingBatch, positions: Tensor, tokens: Tensor) -> Sampled:
    """Choose the token at `positions[r]` for each row r.

    logits: float32 `[R, V]`, left as they are; minus infinity forbids a token. positions: int64 `[R]`, the
    number of known tokens. tokens: int32 `[slots, context]`, the token table, read up to the position by
    penalties; what is sampled is for the caller to write. Raises SamplerError.
    """
    scores = _penalise(logits, batch, positions, tokens)
    best, chosen = scores.max(dim=-1)
    if not bool(best.isfinite().all()):
        raise SamplerError(tuple((~best.isfinite()).nonzero().flatten().tolist()))
    if batch.random:
        uniform = uniforms(batch.seeds, positions)
        for rows in _parts(batch.unfiltered, logits):
            running = _weights(scores[rows], best[rows], batch, rows).cumsum(-1, dtype=torch.float64)
            goal = uniform[rows, None] * running[:, -1:]
            chosen[rows] = torch.searchsorted(running, goal, right=True).squeeze(1)
        for rows in _parts(batch.with_top_k, logits):
            chosen[rows] = _draw_top_k(scores[rows], best[rows], uniform[rows], batch, rows)
        for rows in _parts(batch.with_top_p, logits):
            chosen[rows] = _draw_top_p(scores[rows], best[rows], uniform[rows], batch, rows)
    stopped = (chosen[:, None] == batch.stop_ids).any(dim=1)
    full = positions + 1 >= batch.limits
    finished = torch.full_like(chosen, UNFINISHED, dtype=torch.int8)
    finished.masked_fill_(full, LENGTH).masked_fill_(stopped, STOP)
    return Sampled(chosen, finished, _logprobs(logits, batch, chosen))


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One float64 in [0, 1) per row, a multiple of 2^-52, from (seed, position) alone; both int64.

    The position-th output of a SplitMix64 stream whose state is the mixed seed (Steele, Lea, Flood, "Fast
    splittable pseudorandom number generators", 2014): two rounds of its finaliser.
    """
    state = _mix(seeds + _GOLDEN)
    bits = _mix(state + (positions + 1) * _GOLDEN)
    return _shift_right(bits, 12).double() * 2.0**-52


def _signed(bits: int) -> int:
    """A uint64 as the int64 with the same bits."""
    bits &= (1 << 64) - 1
    return bits - (1 << 64) if bits >> 63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift of int64."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64 bits; int64 arithmetic wraps."""
    bits = (bits ^ _shift_right(bits, 30)) * _MIX[0]
    bits = (bits ^ _shift_right(bits, 27)) * _MIX[1]
    return bits ^ _shift_right(bits, 31)


def _parts(rows: Tensor, logits: Tensor) -> Iterator[Tensor]:
    """`rows` in parts of bounded size."""
    if rows.numel():
        yield from torch.split(rows, max(1, _ELEMENTS // logits.shape[1]))


def _penalise(logits: Tensor, batch: SamplingBatch, positions: Tensor, tokens: Tensor) -> Tensor:
    """`logits` themselves if no row has a penalty, else a copy with penalties applied."""
    if not batch.penalised.numel():
        return logits
    scores = logits.clone()
    for rows in _parts(batch.penalised, logits):
        known = positions[rows, None]
        places = torch.arange(int(known.max()), device=logits.device)
        ids = tokens[batch.slots[rows], : places.shape[0]].long()
        seen = places < known
        ids = torch.where(seen, ids, ids[:, :1])  # what lies past the position repeats the first token
        part = scores[rows]
        repetition = batch.repetition[rows, None]
        values = part.gather(1, ids)
        part.scatter_(1, ids, torch.where(values > 0, values / repetition, values * repetition))
        output = seen & (places >= batch.prompt_lengths[rows, None])
        counts = torch.zeros_like(part).scatter_add_(1, ids, output.to(part.dtype))
        part -= batch.frequency[rows, None] * counts
        part -= batch.presence[rows, None] * (counts > 0)
        scores[rows] = part
    return scores


def _weights(scores: Tensor, best: Tensor, batch: SamplingBatch, rows: Tensor) -> Tensor:
    """Tempered probabilities relative to the most likely token's, float32; 0 for what min_p rules out."""
    weights = ((scores - best[:, None]) / batch.temperature[rows, None]).exp_()
    return weights.masked_fill_(weights < batch.min_p[rows, None], 0)


def _draw_top_k(scores: Tensor, best: Tensor, uniform: Tensor, batch: SamplingBatch, rows: Tensor) -> Tensor:
    """Token ids for `rows`, which have a top_k; the other arguments but `batch` are of these rows alone."""
    limit = batch.top_k[rows].clamp(max=scores.shape[1])
    ids = ranked(scores, int(limit.max()))
    running = _weights(scores.gather(1, ids), best, batch, rows).cumsum(-1, dtype=torch.float64)
    mass = batch.top_p[rows] * running.gather(1, limit[:, None] - 1).squeeze(1)
    return _draw_ranked(ids, running, mass, limit, uniform)


def _draw_top_p(scores: Tensor, best: Tensor, uniform: Tensor, batch: SamplingBatch, rows: Tensor) -> Tensor:
    """The same for rows with a top_p and no top_k.

    Looks at the most likely tokens only, and at more of them for rows where these do not make up the mass.
    Running sums over ranks do not change when more ranks are looked at, so neither does the choice.
    """
    mass = _weights(scores, best, batch, rows).cumsum(-1, dtype=torch.float64)[:, -1] * batch.top_p[rows]
    chosen = torch.empty_like(rows)
    left = torch.arange(rows.shape[0], device=rows.device)
    count = _CANDIDATES
    while left.numel():
        count = min(count, scores.shape[1])
        ids = ranked(scores[left], count)
        weights = _weights(scores[left].gather(1, ids), best[left], batch, rows[left])
        running = weights.cumsum(-1, dtype=torch.float64)
        limit = torch.full_like(left, count)
        chosen[left] = _draw_ranked(ids, running, mass[left], limit, uniform[left])
        if count == scores.shape[1]:
            break
        left = left[running[:, -1] < mass[left]]
        count *= 8
    return chosen


def _draw_ranked(ids: Tensor, running: Tensor, mass: Tensor, limit: Tensor, uniform: Tensor) -> Tensor:
    """Draw among the first `limit` ranks, and of these from the shortest prefix that makes up `mass`.

    ids: int64 `[r, n]`, most likely first; running: float64 `[r, n]`, sums of their weights; others `[r]`.
    """
    kept = torch.minimum((running < mass[:, None]).sum(1) + 1, limit)
    goal = uniform * running.gather(1, kept[:, None] - 1).squeeze(1)
    rank = torch.searchsorted(running, goal[:, None], right=True)
    return ids.gather(1, rank).squeeze(1)


def ranked(scores: Tensor, count: int) -> Tensor:
    """Ids of each row's `count` largest, largest first, equal ones by id: `[R, V]` to int64 `[R, count]`.

    The sort key has 64 bits: the score, as an integer in the same order, then the id, reversed. All
    keys differ, so the result is the same whatever the algorithm, the device or the count.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0, for they are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    reverse_ids = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    keys = (ordered.long() << 32) | reverse_ids
    return scores.shape[1] - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)


def _logprobs(logits: Tensor, batch: SamplingBatch, chosen: Tensor) -> tuple[TokenLogprobs | None, ...]:
    """One entry per row, or nothing if no row asks."""
    if not batch.with_logprobs.numel():
        return ()
    found: list[TokenLogprobs | None] = [None] * logits.shape[0]
    for rows in _parts(batch.with_logprobs, logits):
        indices = rows.tolist()
        wanted = [min(batch.parameters[i].logprobs, logits.shape[1]) for i in indices]
        logprobs = logits[rows].log_softmax(-1)
        own = logprobs.gather(1, chosen[rows, None]).squeeze(1).tolist()
        top = ranked(logits[rows], max(wanted))
        top_ids, top_logprobs = top.tolist(), logprobs.gather(1, top).tolist()
        for i, k, logprob, ids, values in zip(indices, wanted, own, top_ids, top_logprobs, strict=True):
            found[i] = TokenLogprobs(logprob, tuple(ids[:k]), tuple(values[:k]))
    return tuple(found)
