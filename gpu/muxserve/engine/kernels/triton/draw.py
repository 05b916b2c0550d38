"""Drawing a token from one row of scores: by rank, which takes no sort, or by id. Parts of `sample`.

Weights are float32, probabilities relative to the best score's; sums of them are float64.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from muxserve.engine.kernels.triton.language import jit, tl


@jit
def weight_at(score, best, temperature, min_p):
    """Probability relative to the best, float32, 0 where min_p rules it out."""
    weight = tl.exp(tl.math.div_rn(score - best, tl.zeros_like(score) + temperature))
    return tl.where(weight < min_p, 0.0, weight)


@jit
def _key(score):
    """int32 in the order of the scores; -0.0 is 0.0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _weight_of(key, best, temperature, min_p):
    """Weight, float64, of the score that has this key."""
    bits = key.to(tl.int32)
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return weight_at(score, best, temperature, min_p).to(tl.float64)


@jit
def _above(source, count, threshold, best, temperature, min_p, BLOCK: tl.constexpr):
    """Of `count` scores: (weight, number) of those whose keys are at least `threshold`, an int64."""
    i = tl.arange(0, BLOCK)
    mass = tl.full([BLOCK], 0, tl.float64)
    number = tl.full([BLOCK], 0, tl.int32)
    for start in tl.range(0, count, BLOCK):
        score = tl.load(source + start + i, mask=start + i < count, other=float("-inf"))
        taken = (_key(score).to(tl.int64) >= threshold) & (start + i < count)
        weight = weight_at(score, best, temperature, min_p).to(tl.float64)
        mass += tl.where(taken, weight, 0.0)
        number += taken.to(tl.int32)
    return tl.sum(mass, 0), tl.sum(number, 0)


@jit
def _bisect(
    source,
    count,
    low,
    need,
    best,
    temperature,
    min_p,
    COUNTED: tl.constexpr,
    PAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key, `low` at the least, at or above which there is at least `need` (PAST: more than that)
    in weight, or, COUNTED, in number: (key, weight above it, number above it, number of its own)."""
    high = tl.max(_key(tl.zeros([1], tl.float32) + best).to(tl.int64), 0)
    for _ in tl.range(0, 32):
        middle = low + (high - low + 1) // 2
        mass, number = _above(source, count, middle, best, temperature, min_p, BLOCK)
        there = number.to(tl.float64) if COUNTED else mass
        enough = there > need if PAST else there >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    _, own = _above(source, count, low, best, temperature, min_p, BLOCK)
    mass, number = _above(source, count, low + 1, best, temperature, min_p, BLOCK)
    return low, mass, number, own - number


@jit
def _nth_equal(scores, key, nth, vocabulary, BLOCK: tl.constexpr):
    """The nth (from 0) id, in their order, whose score has this key."""
    i = tl.arange(0, BLOCK)
    found = tl.full([], 0x7FFFFFFF, tl.int32)
    before = tl.full([], 0, tl.int32)
    for start in tl.range(0, vocabulary, BLOCK):
        score = tl.load(scores + start + i, mask=start + i < vocabulary, other=float("-inf"))
        equal = ((_key(score).to(tl.int64) == key) & (start + i < vocabulary)).to(tl.int32)
        rank = before + tl.cumsum(equal, 0) - 1
        here = tl.where((equal > 0) & (rank == nth), start + i, 0x7FFFFFFF)
        found = tl.minimum(found, tl.min(here, 0))
        before += tl.sum(equal, 0)
    return found


@jit
def draw_ranked(
    scores,
    candidates,
    count,
    total,
    held,
    best,
    uniform,
    top_k,
    top_p,
    temperature,
    min_p,
    vocabulary,
    BLOCK: tl.constexpr,
):
    """The token of a row that is filtered by rank."""
    limit = tl.minimum(tl.where(top_k > 0, top_k, vocabulary), vocabulary).to(tl.int32)
    near = tl.where(top_k > 0, limit <= count, top_p * total <= held)
    source, size = scores, vocabulary
    if near:
        source, size = candidates, count
    low = tl.full([], -(1 << 31), tl.int64)
    most, _ = _above(source, size, low, best, temperature, min_p, BLOCK)
    allowed = tl.full([], 0, tl.int32)  # of the tokens with the last key that is in
    need = top_p * total
    if top_k > 0:
        low, mass, number, _ = _bisect(
            source, size, low, limit.to(tl.float64), best, temperature, min_p, True, False, BLOCK
        )
        allowed = limit - number
        need = top_p * (mass + allowed.to(tl.float64) * _weight_of(low, best, temperature, min_p))
    last, mass, number, own = _bisect(
        source, size, low, tl.minimum(need, most), best, temperature, min_p, False, False, BLOCK
    )
    own = tl.where((top_k > 0) & (last == low), tl.minimum(own, allowed), own)
    weight = _weight_of(last, best, temperature, min_p)
    wanted = tl.ceil((need - mass) / tl.where(weight > 0, weight, 1.0))
    wanted = tl.minimum(tl.maximum(wanted, 1.0), own.to(tl.float64))
    goal = uniform * (mass + wanted * weight)
    key, mass, number, own = _bisect(source, size, last, goal, best, temperature, min_p, False, True, BLOCK)
    weight = _weight_of(key, best, temperature, min_p)
    own = tl.where(key == last, wanted, own.to(tl.float64))
    nth = tl.floor((goal - mass) / tl.where(weight > 0, weight, 1.0))
    nth = tl.minimum(tl.maximum(nth, 0.0), own - 1).to(tl.int32)
    return _nth_equal(scores, key, nth, vocabulary, BLOCK)


@jit
def draw_by_id(scores, total, best, uniform, temperature, min_p, vocabulary, BLOCK: tl.constexpr):
    """The token of a row that is not filtered by rank: the first id at which the running sum passes the
    random number's share of it all."""
    i = tl.arange(0, BLOCK)
    goal = uniform * total
    running = tl.full([], 0, tl.float64)
    begin = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.float64)
    for start in tl.range(0, vocabulary, BLOCK):
        score = tl.load(scores + start + i, mask=start + i < vocabulary, other=float("-inf"))
        after = running + tl.sum(weight_at(score, best, temperature, min_p).to(tl.float64), 0)
        passes = (running <= goal) & (after > goal)
        begin = tl.where(passes, start, begin)
        before = tl.where(passes, running, before)
        running = after
    score = tl.load(scores + begin + i, mask=begin + i < vocabulary, other=float("-inf"))
    weight = weight_at(score, best, temperature, min_p).to(tl.float64)
    past = before + tl.cumsum(weight, 0) > goal
    # A sum in another order may end just short of the goal: then it is the last one that has any weight.
    last = tl.max(tl.where(weight > 0, begin + i, 0), 0)
    return tl.minimum(tl.min(tl.where(past, begin + i, 0x7FFFFFFF), 0), last)


@jit
def _mix(bits):
    """SplitMix64's finaliser, of uint64."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@jit
def uniform_of(seed, position):
    """`engine.sampler.uniforms`, of one row."""
    state = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    bits = _mix(state + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    return (bits >> 12).to(tl.float64) * 2.220446049250313e-16
